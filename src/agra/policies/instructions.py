"""Tokens of instructions at inference: known ones from a checkpoint's file, others from the text encoder.

A checkpoint holds the tokens of its training instructions in `instructions.safetensors`, one tensor named after each
text. A robot that needs no other instructions needs no text encoder, which has 7B parameters for Cosmos.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from agra.wam.text import TextEncoder

FILE = "instructions.safetensors"
_CACHED = 64
"""Number of instructions kept in memory. It is bounded, since a server's clients choose the instructions."""


class Instructions:
    """Looks up or encodes instructions. The text encoder is loaded at its first use."""

    def __init__(
        self,
        load: Callable[[], TextEncoder] | None,
        known: Mapping[str, Tensor] | None = None,
        *,
        projection: nn.Module | None = None,
    ) -> None:
        """`load` makes the text encoder. None allows known instructions alone. `known` maps texts to tokens (L, E).

        `projection` is the part of the text encoder that comes from the checkpoint, if there is one.
        """
        self._load, self.known, self.projection = load, known or {}, projection
        self._encoding = Lock()  # tokenizers raise errors when two threads use one
        self.tokens = lru_cache(maxsize=_CACHED)(self._tokens)
        """(L, E) float32 tokens of an instruction, as in training."""

    @cached_property
    def encoder(self) -> TextEncoder:
        """The text encoder. Raises ValueError for a policy of known instructions alone."""
        if self._load is None:
            raise ValueError("this policy was loaded for its known instructions alone, without a text encoder")
        return self._load()

    def load(self) -> None:
        """Load the text encoder now, unless the policy has none."""
        if self._load is not None:
            _ = self.encoder

    def take_encoder(self, other: "Instructions") -> None:
        """Take over the text encoder that `other`, of the same `TextConfig` and device, has loaded.

        Where the projections differ it is loaded instead, and where `other` has loaded none nothing happens.
        """
        if self._load is None or "encoder" not in vars(other):
            return
        if _weights_equal(self.projection, other.projection):
            self.encoder, self._encoding = other.encoder, other._encoding
        else:
            self.load()

    def _tokens(self, instruction: str) -> Float[Tensor, "L E"]:
        if instruction in self.known:
            return self.known[instruction].float()
        if self._load is None:
            raise ValueError(
                f"instruction {instruction!r}: not among the {len(self.known)} known ones ({_examples(self.known)}), "
                "and this policy was loaded without a text encoder; use one of them, or load the policy with its "
                "encoder"
            )
        # Rounded to float16, as in training's cache.
        encoder = self.encoder
        with self._encoding:
            return encoder.encode([instruction])[0].half().float()


class StoredInstructions(Mapping[str, Tensor]):
    """Tokens in a checkpoint's file, read one instruction at a time."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a damaged file."""
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._texts = frozenset(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error

    def __getitem__(self, instruction: str) -> Tensor:
        if instruction not in self._texts:
            raise KeyError(instruction)
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(instruction)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._texts))

    def __len__(self) -> int:
        return len(self._texts)


def _weights_equal(first: nn.Module | None, second: nn.Module | None) -> bool:
    if first is None or second is None:
        return first is second
    weights, others = first.state_dict(), second.state_dict()
    same_names = weights.keys() == others.keys()
    return same_names and all(torch.equal(value.cpu(), others[name].cpu()) for name, value in weights.items())


def _examples(texts: Iterable[str], count: int = 3) -> str:
    listed = sorted(texts)
    return ", ".join(map(repr, listed[:count])) + (" ..." if len(listed) > count else "")
