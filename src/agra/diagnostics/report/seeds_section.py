"""The report's section on training seeds: success of arms, with the spread of their seeds, and paired differences.

An arm is a set of policies whose configs differ in the seed alone.
"""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agra.diagnostics.report.comparison_table import MISSING, Cell, against_first_of, between, percent
from agra.diagnostics.report.evaluation_section import SHARED_HEADER, ResultsColumn, regime_words
from agra.evaluation.results import NO_NOISE, Results
from agra.evaluation.statistics import crossed_bootstrap

Outcomes = Mapping[int, Mapping[str, float]]
"""Success, or a difference of success, by seed and trial."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Policies whose configs differ in the seed alone."""

    name: str
    demonstrations: Hashable
    results: Mapping[int, Results]  # by seed

    def outcomes(self, regime: str) -> dict[int, dict[str, float]]:
        """Success of every trial of a regime, or of `all`."""
        return {
            seed: {
                trial.trial: float(trial.success)
                for trial in (results.trials if regime == "all" else results.regime(regime))
            }
            for seed, results in self.results.items()
        }


def find_arms(
    columns: Sequence[ResultsColumn],
    configs: Mapping[str, Mapping[str, Any]],
    demonstrations: Mapping[str, Hashable],
) -> list[Arm]:
    """Group the evaluated policies by their configs without the seed, in the order of the policies.

    Policies on other trials, under another protocol or with another start of their answers are other arms. A group in
    which a seed occurs twice is left out: its policies differ in something that no config holds.
    """
    groups: dict[str, list[tuple[str, int, Results]]] = {}
    for _, name, results in columns:
        config = configs.get(name, {})
        stage = dict(config.get("stage", {}))
        seed = stage.pop("seed", None)
        if results is None or seed is None:
            continue
        played = [results.header.get(name) for name in (*SHARED_HEADER, "policy_settings")]
        key = json.dumps([{**config, "stage": stage}, played], sort_keys=True)
        groups.setdefault(key, []).append((name, seed, results))
    arms = []
    for members in groups.values():
        names, seeds, results = zip(*members, strict=True)
        if len(set(seeds)) == len(seeds):
            stems = {name.rstrip("0123456789").rstrip("_-. ") for name in names}
            shared = stems.pop() if len(names) > 1 and len(stems) == 1 else ""
            name = shared or " and ".join(names)
            by_seed = dict(sorted(zip(seeds, results, strict=True)))
            arms.append(Arm(name=name, demonstrations=demonstrations.get(members[0][0]), results=by_seed))
    return arms


def seeds_section(
    columns: Sequence[ResultsColumn],
    configs: Mapping[str, Mapping[str, Any]],
    demonstrations: Mapping[str, Hashable],
) -> dict[str, Any] | None:
    """Success of each arm, and its difference to the first arm on the same demonstrations, paired by seed and trial.

    `configs` and `demonstrations` are those of each policy, by name. None if no arm has several seeds.
    """
    arms = find_arms(columns, configs, demonstrations)
    if not any(len(arm.results) > 1 for arm in arms):
        return None
    regimes = list(dict.fromkeys(r for arm in arms for results in arm.results.values() for r in results.regimes))
    groups = [*regimes, "all"] if len(regimes) > 1 else regimes
    return {
        "columns": ["seeds", *map(regime_words, groups)],
        "success": [
            (arm.name, [_seeds(arm.results), *(_success(arm.outcomes(group)) for group in groups)]) for arm in arms
        ],
        "differences": [
            _difference(arms[place], arms[reference], groups)
            for place, reference in against_first_of([arm.demonstrations for arm in arms])
        ],
    }


def _seeds(seeds: Iterable[int]) -> Cell:
    return Cell(text=", ".join(map(str, seeds)))


def _success(outcomes: Outcomes) -> Cell:
    if not all(outcomes.values()):
        return MISSING
    average = crossed_bootstrap(outcomes, bounds=(0.0, 1.0))
    rates = _means(outcomes)
    spread = f"; seeds {percent(min(rates))} to {percent(max(rates))}" if len(rates) > 1 else ""
    return Cell(text=percent(average.value), range=between(average.low, average.high, percent) + spread)


def _difference(arm: Arm, reference: Arm, groups: Sequence[str]) -> tuple[str, list[Cell]]:
    label = f"{arm.name} minus {reference.name}"
    common = [seed for seed in arm.results if seed in reference.results]
    if not common:
        return label, [Cell(text="no common seed"), *(MISSING for _ in groups)]
    headers = [
        [result.header.get(key) for key in SHARED_HEADER]
        for seed in common
        for result in (arm.results[seed], reference.results[seed])
    ]
    if any(header != headers[0] for header in headers):
        return label, [_seeds(common), *(Cell(text="not comparable: other trials or another protocol") for _ in groups)]
    seeds, start, other = _seeds(common), arm.results[common[0]].start, reference.results[common[0]].start
    if start != other and NO_NOISE not in (start, other):
        seeds = replace(seeds, range=f"answers start from {start}, the reference's from {other}")
    return label, [seeds, *(_paired(arm.outcomes(g), reference.outcomes(g), common) for g in groups)]


def _paired(ours: Outcomes, theirs: Outcomes, seeds: Sequence[int]) -> Cell:
    pairs = {seed: {trial: value - theirs[seed][trial] for trial, value in ours[seed].items()} for seed in seeds}
    if not all(pairs.values()):
        return MISSING
    average = crossed_bootstrap(pairs, bounds=(-1.0, 1.0))
    by_seed = ", ".join(map(_points, _means(pairs)))
    return Cell(
        text=f"{_points(average.value)} points",
        range=f"[{_points(average.low)}, {_points(average.high)}]; by seed {by_seed}",
        clear=average.low > 0 or average.high < 0,
    )


def _means(outcomes: Outcomes) -> list[float]:
    """The mean over the trials of each seed."""
    return [sum(trials.values()) / len(trials) for trials in outcomes.values()]


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.0f}".replace("-", "−")
