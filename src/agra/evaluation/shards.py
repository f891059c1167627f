"""Shards: parts of an evaluation or a collection that several machines play, and their union."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from agra import files
from agra.evaluation.results import Results, read_results, write_results

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index`, from 0, of `count`: every `count`-th item from number `index` on."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard: expected I/N with I from 0 to N - 1, got {self.index}/{self.count}")

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """The shard's items."""
        return items[self.index :: self.count]

    def path(self, output: Path) -> Path:
        """The shard's own output, such as results.shard-0-of-4.jsonl for results.jsonl."""
        return output.with_name(f"{output.stem}.shard-{self.index}-of-{self.count}{output.suffix}")


def parse_shard(text: str) -> Shard:
    """Read I/N, such as 0/4. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"shard: expected I/N, such as 0/4 for the first of four, got {text!r}")
    return Shard(index=int(match[1]), count=int(match[2]))


def shard_paths(output: Path) -> list[Path]:
    """The outputs of all shards of `output` that exist, in no particular order."""
    name = re.compile(rf"{re.escape(output.stem)}\.shard-\d+-of-\d+{re.escape(output.suffix)}")
    return [path for path in output.parent.glob("*.shard-*") if name.fullmatch(path.name)]


def merge_results(output: str | Path) -> Results:
    """Write the results file `output` from its shards beside it. It equals that of a single evaluation but for its times.

    Videos are in the folder of `output` already. The shards stay. Raises FileNotFoundError without shards, and ValueError
    for shards with different headers, a trial in two of them, or missing trials.
    """
    output = Path(output)
    paths = sorted(shard_paths(output))
    if not paths:
        raise FileNotFoundError(f"{output}: no shards beside it; write them with: agra evaluate --shard I/N")
    with files.lock(output.parent, f".{output.name}.lock", output=output):
        earlier = [output] if output.is_file() else []
        parts = {path: read_results(path, partial=True) for path in (*paths, *earlier)}
        header = parts[paths[0]].header
        for path, part in parts.items():
            for key in header:
                if part.header.get(key) != header[key]:
                    raise ValueError(
                        f"{path}: {key} is {part.header.get(key)!r}, but {header[key]!r} in {paths[0].name}; "
                        "remove the shards of another evaluation"
                    )
        trials = [trial for path in paths for trial in parts[path].trials]
        names = [trial.trial for trial in trials]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{output}: trial {min(repeated)!r} is in two shards; remove those of another number")
        if len(trials) != header["num_trials"]:
            held = ", ".join(f"{path.name} {len(parts[path].trials)}" for path in paths)
            raise ValueError(
                f"{output}: the shards hold {len(trials)} of {header['num_trials']} trials ({held}); "
                "run the unfinished ones again"
            )
        return write_results(output, header, trials)
