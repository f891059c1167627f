"""Effect of a policy's action noise and video noise on its first chunk on the tabletop (docs/study.md).

python -m runs.noise POLICY ... [--draws 16]

A target is where the hands are asked to be at the eighth step of the first chunk, in the plane, as in visual reliance.

1. First observations of the in-distribution and semantic trials: the error of a random answer, of the mean of the random
   answers and of the answer from zero noise, and the spread of the random answers. All answers to an observation share
   their video noise.
2. The same observations and errors for random and zero video noise of the conditioning pass, and for the mean of the
   hidden states of four video noises. All answers start from zero action noise.
3. Two equal candidates: the object on one side and a copy of it on the other. A policy's answers to the scenes with one of
   the two are the ends of a line. An answer to both chooses a candidate where it lies in an outer third of the line, else it
   is between them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import tyro

from agra.diagnostics.metrics import IntervalEstimate, bootstrap_interval, paired_difference
from agra.diagnostics.samples.sources import initial_observations
from agra.methods.method import ReadsTokens
from agra.policies.load import load_policy
from agra.policies.policy import MethodPolicy
from agra.simulation import make_simulator
from agra.simulators.tabletop.models.catalogue import ITEMS
from agra.types import Observation, Simulator, Trial

TWIN = "twin"
PLACES = ((-0.1, -0.05), (0.1, -0.05))
"""The candidates' positions, metres: one for each hand."""


def answers(
    policy: MethodPolicy, observation: Observation, action_names: Sequence[str], *, draws: int, seed: int
) -> np.ndarray:
    """Targets (draws + 1, d) in metres: from `draws` random action noises, and from zero in the last row."""
    reliance = policy.config.visual_reliance
    assert reliance is not None
    noise = {name: value.repeat(draws + 1, *[1] * (value.ndim - 1)) for name, value in policy.noise(1, seed).items()}
    drawn = policy.noise(draws, seed + 1)["action"]
    noise["action"] = torch.cat([drawn, torch.zeros_like(drawn[:1])])
    inputs = policy.encode([observation]).rows([0] * (draws + 1))
    with torch.inference_mode():
        chunks = policy.unnormalize(policy.method.act(inputs, noise), observation.embodiment)
    return reliance.target(chunks, action_names)


def video_answers(
    policy: MethodPolicy, observation: Observation, action_names: Sequence[str], *, draws: int, seed: int
) -> np.ndarray:
    """Targets (draws + 2, d) in metres from zero action noise: of `draws` random video noises, of zero video noise, and of
    the mean of the hidden states of the first four.
    """
    reliance, method = policy.config.visual_reliance, policy.method
    assert reliance is not None
    assert isinstance(method, ReadsTokens)
    if draws < 4:
        raise ValueError(f"draws: expected at least 4, got {draws}")
    noise = policy.noise(draws + 1, seed)
    noise["action"] = torch.zeros_like(noise["action"])
    noise["video"][-1] = 0
    inputs = policy.encode([observation])
    with torch.inference_mode():
        hidden = method.hidden(inputs.rows([0] * (draws + 1)), noise)
        hidden = {layer: torch.cat([rows, rows[:4].mean(dim=0, keepdim=True)]) for layer, rows in hidden.items()}
        count = draws + 2
        start = {"action": noise["action"][:1].expand(count, -1, -1)}
        actions = method.act_on(hidden, inputs.rows([0] * count), start, steps=None)
        return reliance.target(policy.unnormalize(actions, observation.embodiment), action_names)


def first_observations(policy: MethodPolicy, simulator: Simulator, *, draws: int) -> dict[str, IntervalEstimate]:
    """Means over observations, in metres."""
    reliance = policy.config.visual_reliance
    assert reliance is not None
    names, columns = simulator.embodiment.action_names, dict[str, list[float]]()
    for seed, initial in enumerate(initial_observations(simulator, reliance.step + 1)):
        asked = reliance.target(initial.actions, names)
        *random, zero = answers(policy, initial.observation, names, draws=draws, seed=seed)
        values = {f"action noise: {name}": value for name, value in _errors(np.array(random), zero, asked).items()}
        if isinstance(policy.method, ReadsTokens) and "video" in policy.method.noise_shapes():
            *random, zero, mean = video_answers(policy, initial.observation, names, draws=draws, seed=seed)
            values |= {f"video noise: {name}": value for name, value in _errors(np.array(random), zero, asked).items()}
            values["video noise: error of the mean of four hidden states"] = float(np.linalg.norm(mean - asked))
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    estimates = {name: bootstrap_interval(np.array(values)) for name, values in columns.items()}
    for kind in sorted({name.split(":")[0] for name in columns}):
        random, zero = (np.array(columns[f"{kind}: error of {name}"]) for name in ("a random answer", "zero"))
        estimates[f"{kind}: random minus zero"] = paired_difference(random, zero)
    return estimates


def _errors(random: np.ndarray, zero: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    mean = random.mean(axis=0)
    return {
        "error of a random answer": float(np.linalg.norm(random - asked, axis=1).mean()),
        "error of the mean": float(np.linalg.norm(mean - asked)),
        "error of zero": float(np.linalg.norm(zero - asked)),
        "spread": float(np.sqrt(((random - mean) ** 2).sum(axis=1).mean())),
        "zero to the mean": float(np.linalg.norm(zero - mean)),
    }


def two_candidates(policy: MethodPolicy, simulator: Simulator, *, draws: int) -> dict[str, float]:
    """Fractions of the answers that choose a candidate, and of those between the two."""
    random, zero = [], []
    for seed, trial in enumerate(scenes(simulator)):
        one, other, both = (
            answers(policy, simulator.reset(variant), simulator.embodiment.action_names, draws=draws, seed=seed)
            for variant in variants(trial)
        )
        axis = other[-1] - one[-1]
        along = (both - one[-1]) @ axis / (axis @ axis)
        random += [*along[:-1]]
        zero.append(along[-1])
    table = {"scenes": float(len(zero))}
    for name, values in (("random", np.array(random)), ("zero", np.array(zero))):
        between = (values > 1 / 3) & (values < 2 / 3)
        table[f"{name}: between"] = float(between.mean())
        table[f"{name}: the right candidate"] = float((values >= 2 / 3).mean())
    scenes_of = np.array(random).reshape(len(zero), draws)
    table["scenes in which random answers choose both"] = float(
        ((scenes_of <= 1 / 3).any(axis=1) & (scenes_of >= 2 / 3).any(axis=1)).mean()
    )
    return table


def scenes(simulator: Simulator) -> Sequence[Trial]:
    """The in-distribution trials without another object, one for each object and container."""
    kinds = {}
    for trial in simulator.trials("in_distribution"):
        if not trial.scene["distractors"]:
            kinds.setdefault((trial.scene["target"]["name"], trial.scene["goal"]), trial)
    return [*kinds.values()]


def variants(trial: Trial) -> list[Trial]:
    """The trial with its object on the left, on the right, and with a copy of it, so that there is one on each side."""
    target = dict(trial.scene["target"])
    ITEMS[TWIN] = replace(ITEMS[target["name"]], name=TWIN)
    left, right = (target | {"position": list(place)} for place in PLACES)
    scenes = [
        {"target": left, "distractors": []},
        {"target": right, "distractors": []},
        {"target": left, "distractors": [right | {"name": TWIN}]},
    ]
    return [replace(trial, scene={**trial.scene, **scene}) for scene in scenes]


def main(policies: Annotated[tuple[str, ...], tyro.conf.Positional], draws: int = 16) -> None:
    """Print both comparisons of each policy."""
    simulator = make_simulator("tabletop")
    try:
        for name in policies:
            policy = load_policy(name, action_noise="random", video_noise="random")
            print(name)
            for label, estimate in first_observations(policy, simulator, draws=draws).items():
                print(
                    f"  {label}: {100 * estimate.value:.2f} cm [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}], {estimate.count}"
                )
            for label, value in two_candidates(policy, simulator, draws=draws).items():
                print(f"  {label}: {value:.2f}")
    finally:
        simulator.close()


if __name__ == "__main__":
    tyro.cli(main)
