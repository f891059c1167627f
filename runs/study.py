"""The page of runs/study.sh: python runs/study.py writes the finished rows into docs/study.md, between its two marks.

Every arm is pooled over its seeds. A difference pairs an arm with its reference by seed and trial. Its interval comes from a
bootstrap that draws seeds, and one set of trials for all of them: 10,000 resamples, 95 %. With one seed it covers the trials
alone, and with few seeds that differ it is too narrow.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from agra import files
from agra.evaluation.measured import MeasuredRow, measured
from agra.evaluation.statistics import crossed_bootstrap
from agra.types import REGIMES

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "study.md"
BEGIN, END = "<!-- rows of the study: python runs/study.py -->", "<!-- end of the rows -->"
REFERENCES = (("agra", "wam"), ("_short_no_video_loss", "_short"), ("_both", "_few"))
"""An arm's reference is the arm whose name has the second part instead of the first."""
INTERACTIONS = (("agra_both", "agra_few", "wam_both", "wam_few"),)
"""Four arms whose difference of differences is asked for: the first two against the last two."""
Outcomes = dict[tuple[int, str], float]
"""Success by seed and trial."""


def main() -> None:
    """Write the tables of all finished rows."""
    folder = Path(os.environ.get("MEASURED", ROOT / "docs" / "study"))
    bundled = [row for row in measured("tabletop") if row.name in ("wam", "agra") and row.seed == 0]
    arms = by_arm([*bundled, *measured(folder.name, folder.parent)])
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    files.write_text(PAGE, f"{before}{BEGIN}\n\n{markdown(arms)}\n{END}{after}")
    print(f"{PAGE}: {sum(map(len, arms.values()))} rows of {len(arms)} arms")


def by_arm(rows: Sequence[MeasuredRow]) -> dict[str, list[MeasuredRow]]:
    """Group the rows by name, in the order of their seeds."""
    arms: dict[str, list[MeasuredRow]] = {}
    for row in sorted(rows, key=lambda row: (row.name, row.seed)):
        arms.setdefault(row.name, []).append(row)
    return arms


def references(name: str, arms: Mapping[str, Sequence[MeasuredRow]]) -> list[str]:
    """Name the arms that an arm is compared with."""
    swapped = [name.replace(ours, theirs) for ours, theirs in REFERENCES if ours in name]
    if name.startswith(("agra_short_", "wam_short_", "freeze_short")):  # one setting changed
        swapped.append("agra_short" if name.startswith("agra") else "wam_short")
    return [other for other in dict.fromkeys(swapped) if other in arms and other != name]


def outcomes(rows: Sequence[MeasuredRow], noise: str, regime: str | None = None, task: str | None = None) -> Outcomes:
    """Success of every trial of a regime, of a task, or of all."""
    return {
        (row.seed, trial.trial): float(trial.success)
        for row in rows
        for trial in row.results[noise].trials  # type: ignore[index]
        if regime in (None, trial.regime) and task in (None, trial.task)
    }


def interaction(arms: Mapping[str, Sequence[MeasuredRow]], names: Sequence[str], noise: str) -> Outcomes:
    """The first arm minus the second, minus the third minus the fourth, for every seed and trial of all four.

    Empty where an arm is missing.
    """
    if any(name not in arms for name in names):
        return {}
    a, b, c, d = (outcomes(arms[name], noise) for name in names)
    return {key: a[key] - b[key] - (c[key] - d[key]) for key in a if key in b and key in c and key in d}


def clustered_interval(values: Outcomes, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float, float]:
    """Return the mean and its interval, with seeds and the trials that they share drawn again."""
    by_seed: dict[int, dict[str, float]] = {}
    for (seed, trial), value in values.items():
        by_seed.setdefault(seed, {})[trial] = value
    average = crossed_bootstrap(by_seed, bounds=bounds)
    return average.value, average.low, average.high


def markdown(arms: Mapping[str, Sequence[MeasuredRow]]) -> str:
    """Write four tables: success, differences, tasks, and the instruments."""
    tables = [_success(arms), _differences(arms), _tasks(arms), _instruments(arms)]
    return "\n".join("".join(f"| {' | '.join(line)} |\n" for line in table) for table in tables)


def _percent(values: Outcomes) -> str:
    mean, low, high = (100 * value for value in clustered_interval(values))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def _by_seed(rows: Sequence[MeasuredRow], noise: str) -> str:
    return ", ".join(f"{100 * np.mean(list(outcomes([row], noise).values())):.0f}" for row in rows)


def _head(*names: str) -> list[list[str]]:
    return [list(names), ["---"] * len(names)]


def _success(arms: Mapping[str, Sequence[MeasuredRow]]) -> list[list[str]]:
    words = [regime.replace("_", " ") for regime in REGIMES]
    table = _head("variant: success, %", "seeds", "noise", *words, "all", "all, by seed")
    for name, rows in arms.items():
        for noise in ("random", "zero"):
            cells = [_percent(outcomes(rows, noise, regime)) for regime in (*REGIMES, None)]
            table.append([name, ", ".join(str(row.seed) for row in rows), noise, *cells, _by_seed(rows, noise)])
    return table


def _differences(arms: Mapping[str, Sequence[MeasuredRow]]) -> list[list[str]]:
    table = _head(
        "difference of success, points", "common seeds", "noise", "difference", "by seed", "solved by one alone"
    )
    for name, rows in arms.items():
        for other in references(name, arms):
            for noise in ("random", "zero"):
                ours, theirs = outcomes(rows, noise), outcomes(arms[other], noise)
                common = {key: ours[key] - theirs[key] for key in ours if key in theirs}
                alone = [sum(value == sign for value in common.values()) for sign in (1, -1)]
                solved = f"{alone[0]} and {alone[1]} of {len(common)}"
                table += _difference(f"{name} minus {other}", noise, common, 1.0, solved)
    for names in INTERACTIONS:
        for noise in ("random", "zero"):
            label = "({} minus {}) minus ({} minus {})".format(*names)
            table += _difference(label, noise, interaction(arms, names, noise), 2.0, "")
    return table


def _difference(label: str, noise: str, values: Outcomes, bound: float, solved: str) -> list[list[str]]:
    """A line on paired differences between minus and plus `bound`, none without values."""
    if not values:
        return []
    seeds = sorted({seed for seed, _ in values})
    mean, low, high = (100 * value for value in clustered_interval(values, (-bound, bound)))
    single = [100 * np.mean([v for (s, _), v in values.items() if s == seed]) for seed in seeds]
    return [
        [
            label,
            ", ".join(map(str, seeds)),
            noise,
            f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]",
            ", ".join(f"{value:+.0f}" for value in single),
            solved,
        ]
    ]


def _tasks(arms: Mapping[str, Sequence[MeasuredRow]]) -> list[list[str]]:
    names = sorted({trial.task for rows in arms.values() for row in rows for trial in row.results["random"].trials})
    table = _head("variant: success by task, %", "noise", *(name.replace("_", " ") for name in names))
    for name, rows in arms.items():
        for noise in ("random", "zero"):
            table.append([name, noise, *(_percent(outcomes(rows, noise, task=task)) for task in names)])
    return table


def _instruments(arms: Mapping[str, Sequence[MeasuredRow]]) -> list[list[str]]:
    """Means over seeds, and the range over seeds where there are several."""
    columns = {
        "held-out action loss": lambda i: i["training"]["held_out"][-1]["validation/action_loss"],
        "first target's error, cm": lambda i: 100 * i["visual_reliance"]["all"]["error"],
        "of a constant": lambda i: 100 * i["visual_reliance"]["all"]["constant_error"],
        "image swapped, cm": lambda i: 100 * i["visual_reliance"]["all"]["image_swap_shift"],
        "instruction swapped, cm": lambda i: 100 * i["visual_reliance"]["all"]["instruction_swap_shift"],
        "attention in mask, %": lambda i: 100 * i["grounding"]["summary"]["in_mask_ratio"]["value"],
        "centroid error": lambda i: i["grounding"]["summary"]["centroid_error"]["value"],
    }
    for kind in ("mean", "zero", "shuffle", "swap"):
        columns[f"ratio, {kind}"] = lambda i, kind=kind: i["grounding"]["summary"][f"sensitivity_{kind}"]["ratio"][
            "value"
        ]
    table = _head("variant", *columns)
    for name, rows in arms.items():
        cells = []
        for read in columns.values():
            values = [read(row.info) for row in rows]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        table.append([name, *cells])
    return table


if __name__ == "__main__":
    main()
