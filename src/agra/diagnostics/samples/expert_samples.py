"""Probe samples from the episodes of a simulator's scripted expert, with masks.

The module needs no torch, which simulators' own environments lack. There it runs as a program on the request of
`in_environment`: python -m agra.diagnostics.samples.expert_samples REQUEST.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agra.diagnostics.samples.probe_sample import ProbeSample, load_samples, samples_from_episode, save_samples
from agra.evaluation.protocols import regime_trials
from agra.evaluation.remote import run_in_environment, watch_parent
from agra.evaluation.rollout import run_episode
from agra.simulators.registry import expert, make
from agra.types import LocatesTarget, Simulator, SimulatorFailed, Trial

LATEST_MOMENT = 0.45
"""Fraction of an expert episode up to which probe samples are taken: from the first observation to about the grasp."""
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class SampleSteps:
    """Control steps from a sample's observation to the frames that a method reads or predicts."""

    grid: tuple[int, ...]
    """The frame of each time position of the token grid."""
    window: tuple[int, ...]
    """The frames of the predicted video."""
    past: tuple[int, ...] = ()
    """Earlier observations."""


def expert_samples(
    simulator: Simulator, count: int, steps: Mapping[str, SampleSteps], *, tasks: Sequence[str] | None = None
) -> list[ProbeSample]:
    """Moments of the scripted expert's episodes on evaluation trials, one for each trial, with masks.

    They are evenly spread over the regimes and over the first part of an episode. `steps` are those of each embodiment,
    `tasks` limits the trials. Raises ValueError for an unknown task and a simulator with another embodiment.
    """
    name = simulator.embodiment.name
    if name not in steps:
        raise ValueError(f"{simulator.name}: its embodiment {name} is none of the config's, {', '.join(steps)}")
    demonstrator, samples = expert(simulator), list[ProbeSample]()
    for trial in regime_trials(simulator, tasks=tasks, limit=-(-count // len(simulator.regimes))):
        episode = run_episode(demonstrator, simulator, trial, execute_steps=1, masks=True)
        step = int(LATEST_MOMENT * (len(samples) * _GOLDEN % 1) * len(episode))
        samples += samples_from_episode(
            episode,
            [step],
            steps[name].grid,
            trial=trial.name,
            regime=trial.regime,
            window_offsets=steps[name].window,
            past_offsets=steps[name].past,
            position=_position(simulator, trial),
        )
    return samples


def in_environment(
    python: Path,
    simulator: str,
    count: int,
    steps: Mapping[str, SampleSteps],
    *,
    tasks: Sequence[str] | None = None,
) -> list[ProbeSample]:
    """Make the `expert_samples` of a simulator whose environment's interpreter is `python`.

    Raises FileNotFoundError if the interpreter does not exist, SimulatorFailed if its process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {"simulator": simulator, "count": count, "tasks": tasks, "output": folder}
        request["steps"] = {name: asdict(of_robot) for name, of_robot in steps.items()}
        code = run_in_environment(python, ["-m", __name__, json.dumps(request)])
        if code:
            raise SimulatorFailed(f"{python}: its process ended with status {code}; the reason is above")
        return load_samples(Path(folder))


def _position(simulator: Simulator, trial: Trial) -> np.ndarray | None:
    """Row and column of the target object's centre, as fractions of the frame.

    None if the simulator does not give it.
    """
    if not isinstance(simulator, LocatesTarget):
        return None
    simulator.reset(trial)
    mask = simulator.target_mask()
    return (np.argwhere(mask).mean(axis=0) + 0.5) / mask.shape if mask.any() else None


def main(request: Mapping[str, Any]) -> None:
    """Write the samples that `in_environment` asks for."""
    steps = {
        name: SampleSteps(**{kind: tuple(values) for kind, values in of_robot.items()})
        for name, of_robot in request["steps"].items()
    }
    simulator = make(request["simulator"])
    try:
        save_samples(
            expert_samples(simulator, request["count"], steps, tasks=request["tasks"]), Path(request["output"])
        )
    finally:
        simulator.close()


if __name__ == "__main__":
    watch_parent()
    main(json.loads(sys.argv[1]))
