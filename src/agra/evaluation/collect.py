"""Demonstrations by a scripted expert, written as a LeRobot v3.0 dataset.

Noise is added to the executed commands only and the row keeps the expert's own command, so that the data shows how to
come back from where a policy's errors lead (DART, Laskey et al. 2017).
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

from agra.data.lerobot.layout import INFO
from agra.data.lerobot.writer import LeRobotWriter, encode_episode
from agra.data.lerobot.json_parquet import read_json, write_json
from agra.evaluation.rollout import run_episode
from agra.evaluation.attempts import MANIFEST, Staging, check_same, lock, naming
from agra.types import Embodiment, Policy, Simulator, Trial
from agra.evaluation.workers import as_finished

RECORD = "collection.json"
"""In a finished dataset: the settings that it follows from, and the attempts of each task."""


@dataclass(frozen=True, kw_only=True)
class ActionNoise:
    """Gaussian noise on executed commands, first-order autoregressive within an episode.

    `std` gives the stationary standard deviation, in the action's units, by pattern over the embodiment's action names
    (as in file names: "*_x"); dimensions that no pattern names stay clean. `correlation` is that of neighbouring steps.
    """

    std: Mapping[str, float] = field(default_factory=lambda: {"*_x": 0.0075, "*_y": 0.0075})
    correlation: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.correlation < 1:
            raise ValueError(f"ActionNoise.correlation: expected a value in [0, 1), got {self.correlation}")
        if any(std < 0 for std in self.std.values()):
            raise ValueError(f"ActionNoise.std: expected no negative value, got {dict(self.std)}")

    def scale(self, embodiment: Embodiment) -> np.ndarray:
        """The standard deviation of every action dimension, (D,). Raises ValueError where a pattern names none."""
        scale = np.zeros(len(embodiment.action_names))
        for pattern, std in self.std.items():
            hits = [i for i, name in enumerate(embodiment.action_names) if fnmatch.fnmatchcase(name, pattern)]
            if not hits:
                raise ValueError(
                    f"noise: {pattern!r} names no action of {embodiment.name}: {', '.join(embodiment.action_names)}"
                )
            scale[hits] = std
        return scale

    def start(self, embodiment: Embodiment, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """A fresh perturbation for one episode: action -> action to execute."""
        rng = np.random.default_rng([seed, 0xDA27])  # not the stream that the expert or the scene draws from
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
    """The parts of a suite that collection needs: simulator, expert, scenes, and its usual noise.

    `trials` (count, seed) lists scenes, of which number i depends on i and the seed alone; every one of `tasks` occurs
    in it again and again.
    """

    simulator: Simulator
    expert: Policy
    trials: Callable[[int, int], Sequence[Trial]]
    tasks: Sequence[str]
    noise: ActionNoise = field(default_factory=ActionNoise)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A finished collection. Failed attempts were dropped."""

    path: Path
    episodes: int
    frames: int
    attempts_by_task: Mapping[str, int]
    already_there: bool

    @property
    def attempts(self) -> int:
        """Trials that were played."""
        return sum(self.attempts_by_task.values())

    @property
    def failed(self) -> int:
        """Attempts in which the expert did not succeed."""
        return self.attempts - self.episodes


def scripted_demonstrator(simulator_name: str) -> Demonstrator:
    """The demonstrator of a registered simulator. Raises ValueError for one without a scripted expert."""
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
    demonstrator: Callable[[str], Demonstrator] = scripted_demonstrator,
    progress: bool = True,
) -> Collected:
    """Collect successful demonstrations into the LeRobot dataset `output`: `episodes`, or `per_task` of each of `tasks`.

    The dataset follows from the settings (simulator, episodes, tasks, seed, noise) alone: it holds the first successes in
    the order of the trial list, whatever the number of `workers`. Without `tasks`, `per_task` takes all that the
    simulator has. Failed attempts are dropped, counted and replaced from `spare` times as many further trials.

    Attempts are kept in `<output>.staging` until the end, so that a killed collection continues where it was. Where
    `output` is a finished collection with the same settings, nothing happens. `demonstrator` must be picklable where
    `workers` > 1. Raises ValueError where `output` or the staging folder holds anything else, where another process
    collects there, or where the expert fails too often; OSError, naming the file, where the disk is full.
    """
    output = Path(output)
    make = partial(demonstrator, simulator_name)
    leader = make()
    leader.simulator.close()
    noise = noise or leader.noise
    noise.scale(leader.simulator.embodiment)
    trials, quotas = _plan(leader, episodes, per_task, tasks, seed, spare)
    settings = {
        "simulator": simulator_name,
        "episodes": episodes,
        "tasks": None if per_task is None else [quota.task for quota in quotas],
        "per_task": per_task,
        "seed": seed,
        "noise": asdict(noise),
        "settings": leader.simulator.settings,
    }
    settings = json.loads(json.dumps(settings))  # as they are read back: lists for tuples

    staging_path = output.with_name(output.name + ".staging")
    if _is_finished(output, settings):
        return _collected(output, already_there=True)
    if output.exists() and not (staging_path / MANIFEST).is_file():
        raise ValueError(
            f"{output}: already exists, without {RECORD} of a collection; choose another output or remove it"
        )
    with lock(staging_path):
        if not _is_finished(output, settings):  # else another process has just finished it
            staging = Staging(staging_path, settings)
            with _progress_bar(progress) as bar:
                attempts = _attempt(trials, quotas, staging, partial(_demonstrate, noise=noise), make, workers, bar)
                if not output.exists():
                    _write(output, sorted(i for quota in quotas for i in quota.successes), staging, leader, bar)
            with naming(output / RECORD):
                write_json(output / RECORD, {**settings, "attempts": attempts})
        # A process that is being refused may have put its lock file there in the meantime.
        shutil.rmtree(staging_path, ignore_errors=True)
    return _collected(output, already_there=False)


def _is_finished(output: Path, settings: Mapping[str, object]) -> bool:
    """Whether `output` is this collection. Raises ValueError where it is another."""
    if not (output / RECORD).is_file():
        return False
    check_same(read_json(output / RECORD), settings, f"{output}: holds a finished collection")
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
    """So many successes `wanted` among the trials `indices`, of one task or (None) of all.

    They are attempted in rounds of as many trials as successes are missing, so that attempts are always the first ones.
    """

    task: str | None
    indices: Sequence[int]
    wanted: int
    tried: int = 0
    successes: list[int] = field(default_factory=list)

    def upcoming(self) -> Sequence[int]:
        """The next round. Raises ValueError where successes are missing and no trials are left."""
        missing = self.wanted - len(self.successes)
        indices = self.indices[self.tried : self.tried + missing]
        if missing and not indices:
            raise ValueError(
                f"{self.task + ': ' if self.task else ''}the expert succeeded in only {len(self.successes)} of"
                f" {self.tried} trials, {self.wanted} demonstrations were asked for; lower the noise or ask for fewer"
            )
        return indices

    def count(self, staging: Staging) -> None:
        """Count the round, which has been played."""
        played = self.upcoming()
        self.successes += [index for index in played if staging.outcome(index)]
        self.tried += len(played)


def _plan(
    leader: Demonstrator,
    episodes: int | None,
    per_task: int | None,
    tasks: Sequence[str] | None,
    seed: int,
    spare: float,
) -> tuple[Sequence[Trial], list[_Quota]]:
    """The trials to demonstrate in, and how many successes of which are wanted."""
    wanted = episodes if per_task is None else per_task
    if wanted is None or (episodes is not None and per_task is not None):
        raise ValueError(f"collect: expected either episodes or per_task, got {episodes} and {per_task}")
    if wanted < 1:
        raise ValueError(f"{'episodes' if per_task is None else 'per_task'}: expected at least 1, got {wanted}")
    count = wanted + int(np.ceil(spare * wanted))
    if per_task is None:
        if tasks is not None:
            raise ValueError("tasks: also say per_task, the demonstrations of each")
        return leader.trials(count, seed), [_Quota(task=None, indices=range(count), wanted=wanted)]
    for task in tasks or ():
        if task not in leader.tasks:
            close = difflib.get_close_matches(task, leader.tasks, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown task {task!r}; did you mean {close!r}? There are {', '.join(leader.tasks)}")
    chosen = [task for task in leader.tasks if tasks is None or task in tasks]
    trials = leader.trials(count * len(leader.tasks), seed)
    while any(sum(trial.task == task for trial in trials) < count for task in chosen):
        trials = leader.trials(2 * len(trials), seed)
    indices = {task: [i for i, trial in enumerate(trials) if trial.task == task][:count] for task in chosen}
    return trials, [_Quota(task=task, indices=indices[task], wanted=wanted) for task in chosen]


def _attempt(
    trials: Sequence[Trial],
    quotas: Sequence[_Quota],
    staging: Staging,
    play: Callable[..., bool],
    make: Callable[[], Demonstrator],
    workers: int,
    bar: Progress,
) -> dict[str, int]:
    """Play trials until every quota is filled. Return how many were played of each task."""
    task = bar.add_task("demonstrations", total=sum(quota.wanted for quota in quotas))
    play = partial(play, staging_path=staging.path)
    while upcoming := sorted(index for quota in quotas for index in quota.upcoming()):
        outcomes = {index: staging.outcome(index) for index in upcoming}
        _advance(bar, task, sum(outcome is True for outcome in outcomes.values()))
        missing = [(index, trials[index]) for index in upcoming if outcomes[index] is None]
        for success in as_finished(play, missing, make_player=make, workers=workers):
            _advance(bar, task, success)
        for quota in quotas:
            quota.count(staging)
    return dict(Counter(trials[index].task for quota in quotas for index in quota.indices[: quota.tried]))


def _demonstrate(player: Demonstrator, numbered: tuple[int, Trial], *, staging_path: Path, noise: ActionNoise) -> bool:
    """Play one trial, put the episode into the staging folder, and return whether it succeeded."""
    index, trial = numbered
    perturb = noise.start(player.simulator.embodiment, trial.seed)
    episode = run_episode(player.expert, player.simulator, trial, execute_steps=1, perturb=perturb)
    if not episode.success:
        Staging.save(staging_path, index, None)
        return False
    last = np.arange(len(episode)) == len(episode) - 1
    Staging.save(staging_path, index, encode_episode(episode, extra={"next.success": last, "next.done": last}))
    return True


def _write(output: Path, successes: Sequence[int], staging: Staging, leader: Demonstrator, bar: Progress) -> None:
    task = bar.add_task("writing", total=len(successes))
    simulator = leader.simulator
    with naming(output), LeRobotWriter(output, embodiment=simulator.embodiment, fps=simulator.fps) as writer:
        for episode in staging.episodes(successes):
            writer.add(episode)
            bar.advance(task)


def _advance(bar: Progress, task: TaskID, successes: int) -> None:
    """Advance the bar. Where it cannot be drawn, as in a log file, print a line at every hundredth demonstration."""
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
