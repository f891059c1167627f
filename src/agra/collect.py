"""Demonstrations by a scripted expert, written as a LeRobot v3.0 dataset.

Noise is added to the executed commands only and the row keeps the expert's own command, so that the data shows how to
come back from where a policy's errors lead (DART, Laskey et al. 2017).
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from agra.data.lerobot_writer import EncodedEpisode, EncodedVideo, LeRobotWriter, encode_episode
from agra.data.source import EGO_VIEW
from agra.evaluation.rollout import run_episode
from agra.types import Embodiment, Policy, Simulator, Trial
from agra.workers import as_finished


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
    """What collection needs of a suite: its simulator, an expert in it, scenes to demonstrate in, and how much noise."""

    simulator: Simulator
    expert: Policy
    trials: Callable[[int, int], Sequence[Trial]]  # (count, seed) -> training trials
    noise: ActionNoise = field(default_factory=ActionNoise)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection came to: `failed` attempts were dropped."""

    path: Path
    episodes: int
    frames: int
    attempts: int

    @property
    def failed(self) -> int:
        """Attempts in which the expert did not succeed."""
        return self.attempts - self.episodes


def scripted_demonstrator(simulator_name: str) -> Demonstrator:
    """The demonstrator of a registered simulator. Raises ValueError for one without a scripted expert."""
    from agra.simulators import registry

    suite = registry.suite(simulator_name)
    if suite.training_trials is None:
        raise ValueError(f"{simulator_name}: this simulator has no scenes for demonstrations")
    simulator = registry.make(simulator_name)
    return Demonstrator(
        simulator=simulator,
        expert=registry.expert(simulator),
        trials=suite.training_trials,
        noise=ActionNoise(std=suite.noise),
    )


def collect(
    simulator_name: str,
    output: str | Path,
    *,
    episodes: int,
    seed: int,
    workers: int = 1,
    noise: ActionNoise | None = None,
    spare: float = 0.25,
    demonstrator: Callable[[str], Demonstrator] = scripted_demonstrator,
    progress: bool = True,
) -> Collected:
    """Collect `episodes` successful demonstrations into the LeRobot dataset `output`.

    The dataset follows from (simulator_name, episodes, seed, noise) alone: it holds the first successes in the order
    of the trial list, whatever the number of `workers`. Failed attempts are dropped, counted and replaced from
    `spare` more trials. Finished attempts are kept in `<output>.staging` until the end, so that a killed collection
    continues where it was. `demonstrator` must be picklable where `workers` > 1. Raises ValueError where `output`
    exists, where the staging folder belongs to another collection, or where the expert fails too often.
    """
    output = Path(output)
    if episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {episodes}")
    if output.exists():
        raise ValueError(f"{output}: already exists; choose another output or remove it")
    make = partial(demonstrator, simulator_name)
    leader = make()
    noise = noise or leader.noise
    embodiment, fps = leader.simulator.embodiment, leader.simulator.fps
    noise.scale(embodiment)
    trials = leader.trials(episodes + int(np.ceil(spare * episodes)), seed)
    leader.simulator.close()

    settings = {"simulator": simulator_name, "episodes": episodes, "seed": seed, "noise": asdict(noise)}
    staging = _Staging(output.with_name(output.name + ".staging"), settings)
    with _progress_bar(progress) as bar:
        attempts = _attempt(trials, episodes, staging, make, noise, workers, bar)
        task = bar.add_task("writing", total=episodes)
        with LeRobotWriter(output, embodiment=embodiment, fps=fps) as writer:
            for episode in staging.successes(attempts):
                writer.add(episode)
                bar.advance(task)
    shutil.rmtree(staging.path)
    return Collected(path=output, episodes=episodes, frames=writer.num_frames, attempts=attempts)


def _attempt(
    trials: Sequence[Trial],
    episodes: int,
    staging: "_Staging",
    make: Callable[[], Demonstrator],
    noise: ActionNoise,
    workers: int,
    bar: Progress,
) -> int:
    """Play trials in order until `episodes` of them have succeeded; return how many were played.

    Rounds: as many trials as successes are missing, so that the attempts are always a prefix of the list.
    """
    task = bar.add_task("demonstrations", total=episodes)
    play = partial(_demonstrate, staging_path=staging.path, noise=noise)
    tried = successes = 0
    while successes < episodes:
        upcoming = range(tried, min(tried + episodes - successes, len(trials)))
        if not upcoming:
            raise ValueError(
                f"the expert succeeded in only {successes} of {tried} trials, {episodes} demonstrations were asked for;"
                " lower the noise or ask for fewer"
            )
        known = [staging.outcome(index) for index in upcoming]
        round_successes = sum(outcome is True for outcome in known)
        bar.advance(task, round_successes)
        missing = [(index, trials[index]) for index, outcome in zip(upcoming, known, strict=True) if outcome is None]
        for success in as_finished(play, missing, make_player=make, workers=workers):
            round_successes += success
            bar.advance(task, success)
        tried, successes = upcoming.stop, successes + round_successes
    return tried


def _demonstrate(player: Demonstrator, numbered: tuple[int, Trial], *, staging_path: Path, noise: ActionNoise) -> bool:
    """Play one trial, put what it gave into the staging folder, and tell whether it succeeded."""
    index, trial = numbered
    perturb = noise.start(player.simulator.embodiment, trial.seed)
    episode = run_episode(player.expert, player.simulator, trial, execute_steps=1, perturb=perturb)
    if not episode.success:
        _Staging.save(staging_path, index, None)
        return False
    last = np.arange(len(episode)) == len(episode) - 1
    _Staging.save(staging_path, index, encode_episode(episode, extra={"next.success": last, "next.done": last}))
    return True


class _Staging:
    """Finished attempts of an unfinished collection, one safetensors file each; a failed one holds no tensors."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path = path
        manifest = path / "collection.json"
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            different = [key for key in settings if found.get(key) != settings[key]]
            if different:
                key = different[0]
                raise ValueError(
                    f"{path}: holds an unfinished collection with {key} {found.get(key)!r} instead of"
                    f" {settings[key]!r}; finish that one, or remove the folder"
                )
            return
        path.mkdir(parents=True, exist_ok=True)
        temporary = manifest.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings), encoding="utf-8")
        os.replace(temporary, manifest)

    @staticmethod
    def file(path: Path, index: int) -> Path:
        return path / f"{index:06d}.safetensors"

    @classmethod
    def save(cls, path: Path, index: int, episode: EncodedEpisode | None) -> None:
        tensors: dict[str, np.ndarray] = {}
        metadata = {"success": "false"}
        if episode is not None:
            seen = episode.videos[EGO_VIEW]
            tensors = {"states": episode.states, "actions": episode.actions, "histogram": seen.histogram}
            tensors["video"] = np.frombuffer(seen.video, dtype=np.uint8)
            tensors |= {f"extra/{name}": column for name, column in episode.extra.items()}
            size = json.dumps(seen.size)
            metadata = {"success": "true", "instruction": episode.instruction, "size": size}
        temporary = cls.file(path, index).with_suffix(".tmp")
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, cls.file(path, index))

    def outcome(self, index: int) -> bool | None:
        """Whether an attempt succeeded, None where it has not been made."""
        if not self.file(self.path, index).is_file():
            return None
        return self._open(index)[0]["success"] == "true"

    def successes(self, attempts: int) -> Iterator[EncodedEpisode]:
        """The successful episodes among the first `attempts`."""
        for index in range(attempts):
            if self.outcome(index):
                yield self._load(index)

    def _open(self, index: int, *, tensors: bool = False) -> tuple[dict[str, str], dict[str, np.ndarray]]:
        path = self.file(self.path, index)
        try:
            with safe_open(path, framework="numpy") as file:
                return file.metadata(), {name: file.get_tensor(name) for name in file.keys() if tensors}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged ({error}); remove this file and collect again") from error

    def _load(self, index: int) -> EncodedEpisode:
        metadata, tensors = self._open(index, tensors=True)
        height, width = json.loads(metadata["size"])
        video = EncodedVideo(video=tensors["video"].tobytes(), size=(height, width), histogram=tensors["histogram"])
        return EncodedEpisode(
            states=tensors["states"],
            actions=tensors["actions"],
            instruction=metadata["instruction"],
            videos={EGO_VIEW: video},
            extra={k.removeprefix("extra/"): v for k, v in tensors.items() if k.startswith("extra/")},
        )


def _progress_bar(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        disable=not show,
    )
