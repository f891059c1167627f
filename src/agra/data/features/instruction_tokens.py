"""Instruction tokens on disk, one file for each distinct text, shared by all datasets of a cache folder.

Thousands of episodes share a few dozen texts, and Cosmos's tokens take 1 MB each, so files by episode would fill
memory.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from agra.data.features.cache import damaged, save_arrays, verified

_NAME = "tokens"


class InstructionTokens:
    """The tokens (L, E) float16 of the texts in `folder`.

    Recently read ones stay in memory, up to `memory_limit` bytes.
    """

    def __init__(self, folder: Path, *, memory_limit: int = 2 * 2**30) -> None:
        self.folder, self._limit = folder, memory_limit
        self._memory: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()  # the prefetching threads read together

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Return the distinct texts without tokens, in order."""
        return [text for text in dict.fromkeys(texts) if not self._path(text).is_file()]

    def write(self, text: str, tokens: np.ndarray) -> None:
        """Write the tokens of a text. Raises OSError, naming the file, where the disk is full."""
        save_arrays(self._path(text), {_NAME: tokens}, {"folder": self.folder.name, "text": text})

    def read(self, text: str) -> np.ndarray:
        """Return the tokens (L, E) float16 of a text.

        Raises FileNotFoundError, which names the remedy, where they are missing, and ValueError for a damaged file.
        """
        with self._lock:
            if text in self._memory:
                self._memory.move_to_end(text)
                return self._memory[text]
        tokens = self._load(text)
        with self._lock:
            if text not in self._memory:  # another thread may have read it meanwhile
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
