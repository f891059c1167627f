"""Tokens of instructions on disk, one file for each distinct text, shared by all datasets of a cache folder.

Thousands of episodes share a few dozen texts, and Cosmos's tokens take 1 MB each: keyed by episode they would fill memory.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from agra.data.features.cache import damaged, save_arrays, verified

_NAME = "tokens"


class InstructionTokens:
    """The tokens (L, E) float16 of every text in `folder`. The last ones read stay in memory, up to `memory_limit` bytes."""

    def __init__(self, folder: Path, *, memory_limit: int = 2 * 2**30) -> None:
        self.folder, self._limit = folder, memory_limit
        self._memory: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The distinct texts that have no tokens yet, in their order."""
        return [text for text in dict.fromkeys(texts) if not self._path(text).is_file()]

    def write(self, text: str, tokens: np.ndarray) -> None:
        """Keep the tokens of a text."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_arrays(self._path(text), {_NAME: tokens}, {"folder": self.folder.name, "text": text})

    def read(self, text: str) -> np.ndarray:
        """(L, E) float16. Raises FileNotFoundError with the remedy, ValueError for a damaged file."""
        if text in self._memory:
            self._memory.move_to_end(text)
            return self._memory[text]
        tokens = self._load(text)
        self._memory[text] = tokens
        self._bytes += tokens.nbytes
        while self._bytes > self._limit and len(self._memory) > 1:
            self._bytes -= self._memory.popitem(last=False)[1].nbytes
        return tokens

    def _load(self, text: str) -> np.ndarray:
        path = self._path(text)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the instruction {text!r} is not prepared; run agra prepare")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata()
                if metadata != {"folder": self.folder.name, "text": text}:
                    raise ValueError(damaged(path, f"its metadata is {metadata}"))
                return verified(file.get_tensor(_NAME), file.get_tensor(f"{_NAME}/crc32"), path, _NAME)
        except (SafetensorError, OSError) as error:
            raise ValueError(damaged(path, error)) from error

    def _path(self, text: str) -> Path:
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
