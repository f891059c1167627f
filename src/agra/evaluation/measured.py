"""Results of trained methods on a benchmark, measured with runs/methods.sh or runs/metaworld.sh and kept with the package.

Every row is a folder NAME_SEED: row.json describes the training, random.jsonl and zero.jsonl are results files of all
trials with random and with zero action noise. A row whose `noises` name one of them has that file alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agra.evaluation.results import Results, read_results
from agra.types import ActionNoise

FOLDER = Path(__file__).parent / "measured"
NOISES: tuple[ActionNoise, ...] = ("random", "zero")


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """A trained and evaluated method."""

    name: str
    seed: int
    info: Mapping[str, Any]
    """The training: recipe, commit, checksums, parameters, losses, visual reliance."""
    results: Mapping[ActionNoise, Results]


def measured(benchmark: str, folder: Path = FOLDER) -> Sequence[MeasuredRow]:
    """Read the rows of a benchmark, by name and seed. A benchmark without rows has an empty list."""
    rows = []
    for path in sorted((folder / benchmark).glob("*/row.json")):
        info = json.loads(path.read_text())
        noises = info.get("noises", NOISES)
        results: dict[ActionNoise, Results] = {noise: read_results(path.parent / f"{noise}.jsonl") for noise in noises}
        rows.append(MeasuredRow(name=info["name"], seed=info["seed"], info=info, results=results))
    return rows
