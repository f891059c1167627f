"""Checksums of a dataset's files. They detect damage that still decodes, and identify a dataset without reading it.

`meta/checksums.json` maps each file, relative to the dataset, to its SHA-256. `LeRobotWriter` writes it,
`agra doctor --seal` adds it to any dataset, and LeRobot ignores it. A sealed dataset has this file, and each of its
files is verified before its first use.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from agra import files
from agra.data.lerobot.json_parquet import REMEDY, read_json, write_json

CHECKSUMS = "meta/checksums.json"
_READ = (".json", ".jsonl", ".parquet", ".mp4")


def dataset_files(root: Path) -> list[str]:
    """Return the names, relative to `root`, of all files under meta, data and videos, sorted.

    Symbolic links are followed. The checksums, hidden files (a viewer's .DS_Store) and temporary ones are left out.
    """
    walks = [os.walk(root / top, followlinks=True) for top in ("meta", "data", "videos")]
    paths = [Path(folder) / name for walk in walks for folder, _, names in walk for name in names]
    names = sorted(path.relative_to(root).as_posix() for path in paths if path.is_file())
    return [name for name in names if name != CHECKSUMS and not name.endswith(".tmp") and not _is_hidden(name)]


def seal(root: Path) -> Path:
    """Write the checksums of all files as they are now. Returns the checksum file."""
    write_json(root / CHECKSUMS, {name: files.sha256(root / name) for name in dataset_files(root)})
    return root / CHECKSUMS


class Seal:
    """The checksums of a dataset. Empty where the dataset is not sealed."""

    def __init__(self, root: Path) -> None:
        """Read the checksums. Raises ValueError for a damaged checksum file."""
        self.root = root
        path = root / CHECKSUMS
        self.checksums: Mapping[str, str] = read_json(path) if path.is_file() else {}
        self._verified: set[Path] = set()

    @property
    def names(self) -> list[str]:
        """Names of the files to verify: the sealed ones, and any other that could be read as part of the dataset."""
        sealed = [name for name in self.checksums if not _is_hidden(name)]
        others = [name for name in dataset_files(self.root) if name.endswith(_READ)] if self.checksums else []
        return sorted({*sealed, *others})

    def verify(self, path: Path) -> None:
        """Compare a file with its checksum, once. Does nothing where the dataset is not sealed.

        Raises FileNotFoundError for a missing file and ValueError for changed contents.
        """
        if not self.checksums or path in self._verified:
            return
        name = path.relative_to(self.root).as_posix()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
        if files.sha256(path) != self.checksums.get(name):
            raise ValueError(
                f"{path}: contents differ from the checksum in {CHECKSUMS}; {REMEDY}. If the change is intended, run: "
                f"agra doctor {self.root} --seal"
            )
        self._verified.add(path)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names and contents of all files.

        For a sealed dataset the checksums stand for the contents.
        """
        contents = self.checksums or {name: files.sha256(self.root / name) for name in dataset_files(self.root)}
        lines = "".join(f"{name} {contents[name]}\n" for name in sorted(contents))
        return hashlib.sha256(lines.encode()).hexdigest()


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(name).parts)
