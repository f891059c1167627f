"""Checksums of a dataset's files: damage that still decodes is found, and a dataset's identity costs no reading.

`meta/checksums.json` maps each file, relative to the dataset, to its SHA-256. Our writer leaves it; `agra doctor --seal`
adds it to any dataset; LeRobot ignores it. Where it is, every file is verified before its first use.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from agra import files
from agra.data.lerobot.json_parquet import REMEDY, read_json, write_json

CHECKSUMS = "meta/checksums.json"


def dataset_files(root: Path) -> list[str]:
    """The dataset's files relative to `root`, in order: everything under meta, data and videos but the checksums."""
    found = [f for folder in ("meta", "data", "videos") for f in (root / folder).rglob("*") if f.is_file()]
    names = sorted(f.relative_to(root).as_posix() for f in found)
    return [name for name in names if name != CHECKSUMS and not name.endswith(".tmp")]


def seal(root: Path) -> Path:
    """Write the checksums of all files as they are now; returns where."""
    write_json(root / CHECKSUMS, {name: files.sha256(root / name) for name in dataset_files(root)})
    return root / CHECKSUMS


class Seal:
    """A dataset's checksums, where it has them."""

    def __init__(self, root: Path) -> None:
        """Raises ValueError for a damaged checksum file."""
        self.root = root
        path = root / CHECKSUMS
        self.checksums: Mapping[str, str] = read_json(path) if path.is_file() else {}
        self._verified: set[Path] = set()

    def verify(self, path: Path) -> None:
        """Compare a file with its checksum, once. Raises FileNotFoundError or ValueError naming it; unsealed passes."""
        if not self.checksums or path in self._verified:
            return
        name = path.relative_to(self.root).as_posix()
        if not path.is_file():
            raise FileNotFoundError(f"{path}: file is missing; {REMEDY}")
        if files.sha256(path) != self.checksums.get(name):
            raise ValueError(
                f"{path}: its contents are not those that {CHECKSUMS} knows; {REMEDY}, or, if it was changed on purpose,"
                f" run: agra doctor {self.root} --seal"
            )
        self._verified.add(path)

    def fingerprint(self) -> str:
        """SHA-256 over names and contents of all files; a sealed dataset's contents are taken from its checksums."""
        contents = self.checksums or {name: files.sha256(self.root / name) for name in dataset_files(self.root)}
        lines = "".join(f"{name} {contents[name]}\n" for name in sorted(contents))
        return hashlib.sha256(lines.encode()).hexdigest()
