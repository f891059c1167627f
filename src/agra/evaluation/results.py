"""Results files, their summaries and comparisons.

A results file is JSON lines: a header with the protocol, then one line per trial. Success rates have Wilson intervals.
Averages over tasks have an interval that resamples tasks. Two policies are compared on the same trials, by McNemar's
exact test and a paired bootstrap.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agra import files
from agra.evaluation.protocols import shard_paths
from agra.evaluation.statistics import (
    MIN_CLUSTERS,
    Average,
    McNemar,
    clustered_bootstrap,
    mcnemar,
    paired_bootstrap,
    stratified_average,
    wilson_interval,
)
from agra.evaluation.task_groups import task_groups

CHECKPOINT = "checkpoint_sha256"
"""Key of a header: the sha256 of the manifest of the evaluated checkpoint. Absent for a policy without a checkpoint, for a
server whose checkpoint is not given, and in files of earlier versions.
"""
COMPUTED_ON = "computed_on"
"""Key of a header: the type of the policy's device and the precision of its weights, such as "cuda, bfloat16". Absent for a
policy object, the expert, other servers, and in files of earlier versions.
"""
RECORDED = (CHECKPOINT, COMPUTED_ON)
"""Keys that a file of an earlier version may lack. It is continued and merged without them."""


NO_NOISE = "no noise"
"""Start of the answers of a scripted expert."""


def start_of_answers(settings: Mapping[str, Any]) -> str:
    """The noise from which a policy's answers start, in words. Headers leave out random noise.

    A server of another package takes no such setting.
    """
    if "key_mapping" in settings and "action_noise" not in settings:
        return "its server's noise"
    video = settings.get("video_noise", "random")
    words = f"{settings.get('action_noise', 'random')} action noise"
    return words if video == "random" else f"{words}, {video} video noise"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A finished trial: number of control steps and policy calls, times in seconds and milliseconds.

    `digest` is a hash of every bit of the episode, None in files of early versions. `failures` lists the reasons of
    earlier attempts, in which the simulator broke down.
    """

    trial: str
    regime: str
    task: str
    seed: int
    instruction: str
    success: bool
    progress: Mapping[str, bool]
    steps: int
    calls: int
    wall_s: float
    policy_ms: Mapping[str, float]  # mean, p50 and p95 over the calls
    video: str | None = None  # relative to the results file
    digest: str | None = None
    failures: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "failures", tuple(self.failures))


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results file in memory."""

    header: Mapping[str, Any]
    trials: tuple[TrialResult, ...]

    @property
    def policy(self) -> str:
        """The evaluated policy's name."""
        return self.header["policy"]

    @property
    def start(self) -> str:
        """The noise from which the policy's answers start (`start_of_answers`)."""
        settings = self.header.get("policy_settings", {})
        return NO_NOISE if self.policy == "expert" and not settings else start_of_answers(settings)

    def regime(self, name: str) -> tuple[TrialResult, ...]:
        """The trials of one regime."""
        return tuple(trial for trial in self.trials if trial.regime == name)

    @property
    def regimes(self) -> tuple[str, ...]:
        """The regimes with trials, in the simulator's order."""
        return tuple(name for name in self.header["regimes"] if self.regime(name))


def write_results(path: Path, header: Mapping[str, Any], trials: Sequence[TrialResult]) -> Results:
    """Write a results file with the trials in the order of their names."""
    ordered = tuple(sorted(trials, key=lambda trial: trial.trial))
    files.write_text(path, "".join(map(results_line, [header, *map(asdict, ordered)])))
    return Results(header=header, trials=ordered)


def results_line(record: Mapping[str, Any]) -> str:
    """The line of a header or a trial."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_results(path: str | Path, *, partial: bool = False) -> Results:
    """Read a results file. Raises ValueError, naming the line, for malformed contents.

    A file with a cut last line or missing trials belongs to an interrupted evaluation and is an error unless `partial`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no results file; write it with: agra evaluate")
    header, trials, cut = _parse(path)
    num_trials = header["num_trials"]
    if not partial and (cut or len(trials) != num_trials):
        raise ValueError(
            f"{path}: interrupted after {len(trials)} of {num_trials} trials; run the same agra evaluate again to "
            "finish"
        )
    return Results(header=header, trials=trials)


def merge_results(output: str | Path) -> Results:
    """Write the results file `output` from its shards beside it. It equals that of a single evaluation but for its times.

    Videos are in the folder of `output` already. The shards stay. Raises FileNotFoundError without shards, and ValueError
    for shards with different headers (of different checkpoints or devices too), a trial in two of them, or missing trials.
    """
    output = Path(output)
    paths = sorted(shard_paths(output))
    if not paths:
        raise FileNotFoundError(f"{output}: no shards beside it; write them with: agra evaluate --shard I/N")
    with files.lock(output.parent, f".{output.name}.lock", output=output):
        earlier = [output] if output.is_file() else []
        parts = {path: read_results(path, partial=True) for path in (*paths, *earlier)}
        first = {key: (path, value) for path in reversed(parts) for key, value in parts[path].header.items()}
        for path, part in parts.items():
            for key, (reference, expected) in first.items():
                stored = part.header.get(key)
                if stored != expected and not (key in RECORDED and stored is None):
                    raise ValueError(
                        f"{path}: {key} is {stored!r}, but {expected!r} in {reference.name}; remove the shards of another "
                        "evaluation"
                    )
        header = {key: value for key, (_, value) in first.items() if all(key in p.header for p in parts.values())}
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


def _parse(path: Path) -> tuple[dict[str, Any], tuple[TrialResult, ...], bool]:
    """Header, trials, and whether the last line was cut off (without a line end) and dropped."""
    text = path.read_text(encoding="utf-8", errors="replace")
    *lines, rest = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append(record if number == 1 else TrialResult(**record))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a results line ({error})") from error
    if not records or not isinstance(records[0], dict) or "num_trials" not in records[0]:
        raise ValueError(f"{path}, line 1: expected the header of a results file; remove the file to start again")
    names: set[str] = set()
    for number, record in enumerate(records[1:], start=2):
        if record.trial in names:
            raise ValueError(f"{path}, line {number}: trial {record.trial!r} occurs twice")
        names.add(record.trial)
    return records[0], tuple(records[1:]), bool(rest)


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """A policy's figures over the tasks of one group of a benchmark (`agra.evaluation.task_groups`)."""

    group: str
    tasks: int
    trials: int
    rate: float  # mean over tasks
    average: Average | None  # with an interval that resamples tasks; None for too few tasks


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A policy's figures over one regime, or over all trials (regime "all")."""

    regime: str
    trials: int
    full: int  # trials of the regime's full list
    successes: int
    interval: tuple[float, float]
    progress: Mapping[str, float]  # fraction of the trials that reached each partial score
    median_policy_ms: float
    tasks: int
    average: Average | None  # over tasks, with an interval that resamples tasks; None for too few tasks
    groups: tuple[GroupSummary, ...]  # empty for a benchmark without task groups
    group_average: Average | None  # mean of the groups' rates; None unless every group has two tasks
    failures: int  # attempts in which the simulator broke down; each was repeated

    @property
    def rate(self) -> float:
        """Successes per trial."""
        return self.successes / self.trials


def summarise(results: Results) -> tuple[Summary, ...]:
    """One summary per regime and, for several regimes, a last one over all trials."""
    regimes = {name: results.regime(name) for name in results.regimes}
    full = {name: results.header["regimes"][name]["full"] for name in regimes}
    if len(regimes) > 1:
        regimes["all"], full["all"] = results.trials, sum(full.values())
    simulator = results.header["simulator"]
    return tuple(_summarise(name, trials, full[name], simulator) for name, trials in regimes.items())


def _summarise(regime: str, trials: tuple[TrialResult, ...], full: int, simulator: str) -> Summary:
    successes = sum(trial.success for trial in trials)
    scores = list(dict.fromkeys(name for trial in trials for name in trial.progress))
    reached = {name: [t.progress[name] for t in trials if name in t.progress] for name in scores}
    tasks = [trial.task for trial in trials]
    count = len(set(tasks))
    groups, group_average = _summarise_groups(trials, simulator)
    return Summary(
        regime=regime,
        trials=len(trials),
        full=full,
        successes=successes,
        interval=wilson_interval(successes, len(trials)),
        progress={name: float(np.mean(values)) for name, values in reached.items()},
        median_policy_ms=float(np.median([trial.policy_ms["p50"] for trial in trials])),
        tasks=count,
        average=clustered_bootstrap([t.success for t in trials], tasks) if count >= MIN_CLUSTERS else None,
        groups=groups,
        group_average=group_average,
        failures=sum(len(trial.failures) for trial in trials),
    )


def _summarise_groups(
    trials: tuple[TrialResult, ...], simulator: str
) -> tuple[tuple[GroupSummary, ...], Average | None]:
    """The groups of the benchmark's tasks, and the mean of their rates."""
    group_of = task_groups(simulator)
    summaries = []
    for group in dict.fromkeys(group_of.values()):
        members = [trial for trial in trials if group_of.get(trial.task) == group]
        outcomes, tasks = [trial.success for trial in members], [trial.task for trial in members]
        rates = [np.mean([trial.success for trial in members if trial.task == task]) for task in dict.fromkeys(tasks)]
        if rates:
            average = clustered_bootstrap(outcomes, tasks) if len(rates) >= MIN_CLUSTERS else None
            rate = float(np.mean(rates))
            summary = GroupSummary(group=group, tasks=len(rates), trials=len(members), rate=rate, average=average)
            summaries.append(summary)
    whole = summaries and len(summaries) == len(set(group_of.values())) and min(s.tasks for s in summaries) > 1
    if not whole:
        return tuple(summaries), None
    outcomes = [trial.success for trial in trials]
    return tuple(summaries), stratified_average(outcomes, [trial.task for trial in trials], group_of)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two policies on the same trials of one regime, or of all."""

    regime: str
    a: Summary
    b: Summary
    test: McNemar
    difference: Average  # success rate of A minus that of B, over trials


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies: one pair per regime and, for several regimes, a last one over all trials."""

    name_a: str
    name_b: str
    start_a: str  # the noise from which answers start
    start_b: str
    pairs: tuple[Pair, ...]


def compare(results_a: Results, results_b: Results) -> Comparison:
    """Pair two policies' trials by name, regime by regime. Answers may start from different noise, which the result names.

    Raises ValueError for different simulators, trial lists or protocols.
    """
    names = f"cannot compare {results_a.policy} with {results_b.policy}"
    for key in ("simulator", "trials_sha256", "protocol", "max_steps", "settings"):
        value_a, value_b = results_a.header.get(key), results_b.header.get(key)
        if value_a != value_b:
            raise ValueError(f"{names}: {key} differs, {value_a!r} and {value_b!r}")
    by_name = {trial.trial: trial.success for trial in results_b.trials}
    if set(by_name) != {trial.trial for trial in results_a.trials}:
        raise ValueError(f"{names}: their finished trials differ")
    pairs = []
    for a, b in zip(summarise(results_a), summarise(results_b), strict=True):
        trials = results_a.trials if a.regime == "all" else results_a.regime(a.regime)
        outcomes = [trial.success for trial in trials], [by_name[trial.trial] for trial in trials]
        difference = paired_bootstrap(*outcomes, [trial.task for trial in trials])
        pairs.append(Pair(regime=a.regime, a=a, b=b, test=mcnemar(*outcomes), difference=difference))
    return Comparison(
        name_a=results_a.policy,
        name_b=results_b.policy,
        start_a=results_a.start,
        start_b=results_b.start,
        pairs=tuple(pairs),
    )
