"""Demonstrations by a scripted expert, written as a LeRobot v3.0 dataset.

Noise is added to the executed actions only. The dataset keeps the expert's clean actions, so that it demonstrates the
recovery from states that a policy's errors lead to (DART, Laskey et al. 2017).
"""

import difflib
import fnmatch
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from agra import files
from agra.data.lerobot.json_parquet import read_json, write_json
from agra.data.lerobot.layout import INFO
from agra.data.lerobot.writer import LeRobotWriter, encode_episode
from agra.evaluation.attempts import MANIFEST, Staging, check_settings
from agra.evaluation.protocols import Shard, shard_paths
from agra.evaluation.rollout import run_episode
from agra.evaluation.workers import imap_unordered
from agra.types import Embodiment, Policy, Simulator, Trial

RECORD = "collection.json"
"""Record of a finished dataset: the settings that decide its contents, and the number of attempts of each task."""


@dataclass(frozen=True, kw_only=True)
class ActionNoise:
    """Gaussian noise on executed actions, first-order autoregressive within an episode.

    `std` maps patterns over the embodiment's action names (as in file names: "*_x") to the stationary standard
    deviation in the action's units. Dimensions without a pattern stay clean. `correlation` is the correlation of
    neighbouring steps.
    """

    std: Mapping[str, float] = field(default_factory=lambda: {"*_x": 0.0075, "*_y": 0.0075})
    correlation: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ValueError(f"ActionNoise.correlation: expected a value in [0, 1), got {self.correlation}")
        if any(std < 0 for std in self.std.values()):
            raise ValueError(f"ActionNoise.std: expected no negative value, got {dict(self.std)}")

    def scale(self, embodiment: Embodiment) -> np.ndarray:
        """The standard deviation of every action dimension, (D,). Raises ValueError for a pattern without a match."""
        scale = np.zeros(len(embodiment.action_names))
        for pattern, std in self.std.items():
            matches = [i for i, name in enumerate(embodiment.action_names) if fnmatch.fnmatchcase(name, pattern)]
            if not matches:
                raise ValueError(
                    f"noise: {pattern!r} matches no action of {embodiment.name}: {', '.join(embodiment.action_names)}"
                )
            scale[matches] = std
        return scale

    def start(self, embodiment: Embodiment, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """A fresh perturbation for one episode: action -> action to execute."""
        rng = np.random.default_rng([seed, 0xDA27])  # independent of the expert's and the scene's random numbers
        scale = self.scale(embodiment)
        noise = rng.standard_normal(len(scale))

        def perturb(action: np.ndarray) -> np.ndarray:
            nonlocal noise
            executed = (action + scale * noise).astype(np.float32)
            innovation = np.sqrt(1 - self.correlation**2) * rng.standard_normal(len(scale))
            noise = self.correlation * noise + innovation
            return executed

        return perturb


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrator:
    """The parts of a suite that collection needs: simulator, expert, scenes and default noise.

    `trials` (count, seed) lists scenes. Scene i depends on i and the seed alone, and every task of `tasks` recurs in
    the list.
    """

    simulator: Simulator
    expert: Policy
    trials: Callable[[int, int], Sequence[Trial]]
    tasks: Sequence[str]
    noise: ActionNoise = field(default_factory=ActionNoise)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A finished collection, or a shard of one, without its failed attempts."""

    path: Path
    episodes: int
    frames: int
    attempts_by_task: Mapping[str, int]
    already_there: bool

    @property
    def attempts(self) -> int:
        """Number of trials played."""
        return sum(self.attempts_by_task.values())

    @property
    def failed(self) -> int:
        """Number of attempts without success."""
        return self.attempts - self.episodes


def scripted_demonstrator(simulator_name: str) -> Demonstrator:
    """The demonstrator of a registered simulator. Raises ValueError for a simulator without a scripted expert."""
    from agra.simulators import registry

    suite = registry.suite(simulator_name)
    if suite.demonstrations is None:
        raise ValueError(f"{simulator_name}: this simulator has no scenes for demonstrations")
    simulator = registry.make(simulator_name)
    return Demonstrator(
        simulator=simulator,
        expert=registry.expert(simulator),
        trials=suite.demonstrations.trials,
        tasks=suite.demonstrations.tasks(),
        noise=ActionNoise(std=suite.demonstrations.noise),
    )


def collect(
    simulator_name: str,
    output: str | Path,
    *,
    episodes: int | None = None,
    per_task: int | None = None,
    tasks: Sequence[str] | None = None,
    seed: int,
    workers: int = 1,
    noise: ActionNoise | None = None,
    spare: float = 2.0,
    shard: Shard | None = None,
    demonstrator: Callable[[str], Demonstrator] = scripted_demonstrator,
    progress: bool = True,
) -> Collected:
    """Collect successful demonstrations into the LeRobot dataset `output`: `episodes`, or `per_task` of each of
    `tasks`.

    The settings (simulator, episodes, tasks, seed, noise) alone decide the dataset: it holds the first successes of the
    trial list, with `per_task` the first of every task, then the second of every task, for any number of `workers`. Without `tasks`, `per_task` applies to all tasks of the
    simulator. Failed attempts are dropped, counted, and replaced from `spare` times as many further trials.

    Attempts are kept in `<output>.staging` until the end, so that the same call resumes a killed collection. If
    `output` is a finished collection with the same settings, nothing happens. With `workers` > 1, `demonstrator` must
    be picklable.

    A `shard` plays its part of as many trials as demonstrations are wanted, and keeps the attempts in a folder beside
    `output` (`agra.evaluation.protocols`). The same call without a shard takes over the attempts of all shards, replaces the
    failed ones and writes the dataset.

    Raises ValueError if `output` or the staging folder holds anything else or is in use by another process, and, once
    all trials have been played, if the expert failed too often: the message lists the tasks. Raises SimulatorFailed,
    listing the episodes, if the simulator broke down, and OSError, naming the file, on a full disk.
    """
    output = Path(output)
    make_player = partial(demonstrator, simulator_name)
    reference = make_player()
    reference.simulator.close()
    noise = noise or reference.noise
    noise.scale(reference.simulator.embodiment)
    trials, quotas = _plan(reference, episodes, per_task, tasks, seed, spare)
    settings = {
        "simulator": simulator_name,
        "episodes": episodes,
        "tasks": None if per_task is None else [quota.task for quota in quotas],
        "per_task": per_task,
        "seed": seed,
        "noise": asdict(noise),
        "settings": reference.simulator.settings,
    }
    settings = json.loads(json.dumps(settings))  # as read back from a file: lists for tuples

    staging_path = output.with_name(output.name + ".staging")
    if _is_finished(output, settings):
        return _collected(output, already_there=True)
    play = partial(_demonstrate, noise=noise)
    if shard is not None:
        return _collect_shard(shard.path(output), shard, trials, quotas, settings, play, make_player, workers, progress)
    if output.exists() and not (staging_path / MANIFEST).is_file():
        raise ValueError(
            f"{output}: already exists, without {RECORD} of a collection; choose another output or remove it"
        )
    with files.lock(staging_path, output=output):
        if not _is_finished(output, settings):  # else another process has just finished it
            staging = Staging(staging_path, settings)
            for folder in shard_paths(output):
                staging.take_over(folder, settings)
            with _progress_bar(progress) as bar:
                attempts = _attempt(trials, quotas, staging, play, make_player, workers, bar)
                if not output.exists():
                    _write(output, _in_rounds(quotas), staging, reference, bar)
            write_json(output / RECORD, {**settings, "attempts": attempts})
        # A refused second process may have created its lock file there in the meantime.
        shutil.rmtree(staging_path, ignore_errors=True)
    return _collected(output, already_there=False)


def merge_collection(
    output: str | Path,
    *,
    workers: int = 1,
    demonstrator: Callable[[str], Demonstrator] = scripted_demonstrator,
    progress: bool = True,
) -> Collected:
    """Finish the collection `output` from the attempts of its shards, with their settings.

    Raises FileNotFoundError without shards, and what `collect` raises.
    """
    output = Path(output)
    records = [*(folder / MANIFEST for folder in sorted(shard_paths(output))), output / RECORD]
    existing = [path for path in records if path.is_file()]
    if not existing:
        raise FileNotFoundError(f"{output}: no shards beside it; write them with: agra collect --shard I/N")
    settings = read_json(existing[0])
    chosen = {name: settings[name] for name in ("episodes", "per_task", "tasks", "seed")}
    return collect(
        settings["simulator"],
        output,
        **chosen,
        noise=ActionNoise(**settings["noise"]),
        workers=workers,
        demonstrator=demonstrator,
        progress=progress,
    )


def _is_finished(output: Path, settings: Mapping[str, object]) -> bool:
    """Whether `output` is this collection. Raises ValueError for another one."""
    if not (output / RECORD).is_file():
        return False
    check_settings(read_json(output / RECORD), settings, f"{output}: holds a finished collection")
    return True


def _collected(output: Path, *, already_there: bool) -> Collected:
    info = read_json(output / INFO)
    return Collected(
        path=output,
        episodes=info["total_episodes"],
        frames=info["total_frames"],
        attempts_by_task=read_json(output / RECORD)["attempts"],
        already_there=already_there,
    )


@dataclass(kw_only=True)
class _Quota:
    """A number of successes, `count`, to reach among the trials `indices` of one task, or of all tasks (None).

    Trials are attempted in rounds of as many as successes are missing, so that the attempts are always the first
    trials.
    """

    task: str | None
    indices: Sequence[int]
    count: int
    attempts: int = 0
    successes: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Number of successes still missing."""
        return self.count - len(self.successes)

    def next_round(self) -> Sequence[int]:
        """The trials of the next round. Empty if nothing is missing or no trials are left."""
        return self.indices[self.attempts : self.attempts + self.missing]

    def finish_round(self, staging: Staging) -> None:
        """Count the successes of a round that has been played."""
        played = self.next_round()
        self.successes += [index for index in played if staging.outcome(index)]
        self.attempts += len(played)


def _plan(
    reference: Demonstrator,
    episodes: int | None,
    per_task: int | None,
    tasks: Sequence[str] | None,
    seed: int,
    spare: float,
) -> tuple[Sequence[Trial], list[_Quota]]:
    """The trials to play, and the number of successes to reach among them."""
    count = episodes if per_task is None else per_task
    if count is None or (episodes is not None and per_task is not None):
        raise ValueError(f"collect: expected either episodes or per_task, got {episodes} and {per_task}")
    if count < 1:
        raise ValueError(f"{'episodes' if per_task is None else 'per_task'}: expected at least 1, got {count}")
    available = count + int(np.ceil(spare * count))
    if per_task is None:
        if tasks is not None:
            raise ValueError("tasks: give per_task too, the number of demonstrations of each task")
        return reference.trials(available, seed), [_Quota(task=None, indices=range(available), count=count)]
    for task in tasks or ():
        if task not in reference.tasks:
            close = difflib.get_close_matches(task, reference.tasks, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown task {task!r}; did you mean {close!r}? Available: {', '.join(reference.tasks)}")
    chosen = [task for task in reference.tasks if tasks is None or task in tasks]
    trials = reference.trials(available * len(reference.tasks), seed)
    while any(sum(trial.task == task for trial in trials) < available for task in chosen):
        trials = reference.trials(2 * len(trials), seed)
    indices = {task: [i for i, trial in enumerate(trials) if trial.task == task][:available] for task in chosen}
    return trials, [_Quota(task=task, indices=indices[task], count=count) for task in chosen]


def _attempt(
    trials: Sequence[Trial],
    quotas: Sequence[_Quota],
    staging: Staging,
    play: Callable[..., bool],
    make_player: Callable[[], Demonstrator],
    workers: int,
    bar: Progress,
) -> dict[str, int]:
    """Play trials until every quota is reached. Returns the number of attempts by task."""
    task = bar.add_task("demonstrations", total=sum(quota.count for quota in quotas))
    while indices := sorted(index for quota in quotas for index in quota.next_round()):
        _play(indices, trials, staging, play, make_player, workers, bar, partial(_advance, bar, task))
        for quota in quotas:
            quota.finish_round(staging)
    _check_quotas(quotas)
    return dict(Counter(trials[index].task for quota in quotas for index in quota.indices[: quota.attempts]))


def _in_rounds(quotas: Sequence[_Quota]) -> list[int]:
    """The successes in the order of the dataset: the first of every task, the second of every task, and so on.

    The last episodes, which training holds out, then have as many of each task, however often its expert fails.
    """
    return [index for together in zip(*(quota.successes for quota in quotas), strict=True) for index in together]


def _collect_shard(
    folder: Path,
    shard: Shard,
    trials: Sequence[Trial],
    quotas: Sequence[_Quota],
    settings: Mapping[str, object],
    play: Callable[..., bool],
    make_player: Callable[[], Demonstrator],
    workers: int,
    progress: bool,
) -> Collected:
    """Play the shard's part of the first round of trials."""
    with files.lock(folder):
        staging = Staging(folder, settings)
        indices = shard.of(sorted(index for quota in quotas for index in quota.next_round()))
        with _progress_bar(progress) as bar:
            task = bar.add_task("attempts", total=len(indices))
            _play(indices, trials, staging, play, make_player, workers, bar, lambda success: bar.advance(task))
        successes = [index for index in indices if staging.outcome(index)]
    return Collected(
        path=folder,
        episodes=len(successes),
        frames=sum(map(staging.length, successes)),
        attempts_by_task=dict(Counter(trials[index].task for index in indices)),
        already_there=False,
    )


def _play(
    indices: Sequence[int],
    trials: Sequence[Trial],
    staging: Staging,
    play: Callable[..., bool],
    make_player: Callable[[], Demonstrator],
    workers: int,
    bar: Progress,
    finished: Callable[[bool], None],
) -> None:
    """Play the trials of these numbers that have no attempt, and call `finished` with each outcome."""
    for index in indices:
        if (outcome := staging.outcome(index)) is not None:
            finished(outcome)
    for success in imap_unordered(
        partial(play, staging_path=staging.path),
        [(index, trials[index]) for index in indices if staging.outcome(index) is None],
        make_player=make_player,
        workers=workers,
        name=lambda item: item[1].name,
        on_failure=lambda item, reason: bar.console.print(f"{item[1].name}: {reason}"),
    ):
        finished(success)


def _check_quotas(quotas: Sequence[_Quota]) -> None:
    """Raise ValueError, listing the tasks, if demonstrations are missing and all trials have been played."""
    short = [
        f"{quota.task or 'all tasks'}: {len(quota.successes)} of {quota.count} ({quota.attempts} attempts)"
        for quota in quotas
        if quota.missing
    ]
    if short:
        raise ValueError(
            f"demonstrations are missing: {', '.join(short)}; lower the noise or ask for fewer demonstrations"
        )


def _demonstrate(player: Demonstrator, item: tuple[int, Trial], *, staging_path: Path, noise: ActionNoise) -> bool:
    """Play one trial, given with its number, and save it in the staging folder. Returns its success."""
    index, trial = item
    perturb = noise.start(player.simulator.embodiment, trial.seed)
    episode = run_episode(player.expert, player.simulator, trial, execute_steps=1, perturb=perturb)
    if not episode.success:
        Staging.save(staging_path, index, None)
        return False
    last = np.arange(len(episode)) == len(episode) - 1
    Staging.save(staging_path, index, encode_episode(episode, extra={"next.success": last, "next.done": last}))
    return True


def _write(output: Path, successes: Sequence[int], staging: Staging, reference: Demonstrator, bar: Progress) -> None:
    task = bar.add_task("writing", total=len(successes))
    simulator = reference.simulator
    with files.naming(output), LeRobotWriter(output, embodiment=simulator.embodiment, fps=simulator.fps) as writer:
        for episode in staging.episodes(successes):
            writer.add(episode)
            bar.advance(task)


def _advance(bar: Progress, task: TaskID, successes: int) -> None:
    """Advance the progress bar. Outside a terminal, print a line at every hundredth demonstration instead."""
    before = int(bar.tasks[task].completed)
    bar.advance(task, successes)
    if not (bar.disable or bar.console.is_terminal) and (before + successes) // 100 > before // 100:
        bar.console.print(f"{before + successes} of {bar.tasks[task].total:.0f} demonstrations")


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not show,
    )
