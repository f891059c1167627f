"""A world for tests: a dot (green) has to reach a square (red). No renderer, no torch, a millisecond an episode."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from agra.types import NO_FRAME, REGIMES, ActionChunk, Embodiment, Observation, Step, Trial

COUNTS = {"in_distribution": 50, "semantic": 40, "instance": 50, "attribute": 40}
HEIGHT, WIDTH = 32, 48


def make_trial(name: str, regime: str, seed: int, *, reachable: bool = True) -> Trial:
    rng = np.random.default_rng(seed)
    scene = {"dot": rng.uniform(0.1, 0.9, 2).tolist(), "square": rng.uniform(0.1, 0.9, 2).tolist()}
    scene["reachable"] = reachable
    return Trial(name=name, simulator="point", regime=regime, task="reach", seed=seed, instruction="go", scene=scene)


class PointWorld:
    """State (x, y); action (a_x, a_y) is the absolute target, reached by at most .1 a step."""

    name = "point"
    embodiment = Embodiment(name="dot", state_names=("x", "y"), action_names=("a_x", "a_y"))
    fps = 10
    max_steps = 30
    regimes = REGIMES
    settings: ClassVar = {"frame_size": [HEIGHT, WIDTH]}

    def reset(self, trial: Trial) -> Observation:
        self.trial = trial
        self.position = np.array(trial.scene["dot"])
        self.square = np.array(trial.scene["square"])
        return self._observe()

    def step(self, action: np.ndarray, *, render: bool = True) -> Step:
        assert action.shape == (2,)
        self.position = self.position + np.clip(action - self.position, -0.1, 0.1)
        distance = np.abs(self.position - self.square).max()
        success = bool(distance < 0.03 and self.trial.scene["reachable"])
        return Step(observation=self._observe(render), success=success, progress={"near": bool(distance < 0.1)})

    def interaction_mask(self) -> np.ndarray:
        return self._patch(self.position) | self._patch(self.square)

    def trials(self, regime: str) -> Sequence[Trial]:
        first = 1000 * REGIMES.index(regime)
        return [make_trial(f"{regime}/{i:02d}", regime, first + i) for i in range(COUNTS[regime])]

    def close(self) -> None: ...

    def _patch(self, centre: np.ndarray) -> np.ndarray:
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        return (np.abs(rows - centre[1] * HEIGHT) < 4) & (np.abs(columns - centre[0] * WIDTH) < 4)

    def _observe(self, render: bool = True) -> Observation:
        frame = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
        frame[self._patch(self.square)] = (200, 40, 40)
        frame[self._patch(self.position)] = (40, 200, 40)
        state = self.position.astype(np.float32)
        frame = frame if render else NO_FRAME
        return Observation(frame=frame, state=state, instruction=self.trial.instruction, embodiment="dot")


class Expert:
    """Knows where the square is."""

    def __init__(self, world: PointWorld) -> None:
        self.world = world

    def reset(self, seed: int) -> None: ...

    def act(self, observation: Observation) -> ActionChunk:
        return ActionChunk(actions=self.world.square[None].astype(np.float32))


class Wanderer:
    """Chunks of 8 random targets near the square: succeeds sometimes; depends on its seed."""

    def __init__(self, world: PointWorld) -> None:
        self.world = world

    def reset(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def act(self, observation: Observation) -> ActionChunk:
        actions = self.world.square + self.rng.normal(0, 0.12, (8, 2))
        return ActionChunk(actions=actions.astype(np.float32))


def training_trials(count: int, seed: int) -> list[Trial]:
    """Every fifth scene cannot be solved."""
    trials = [
        make_trial(f"train/{i}", "in_distribution", 10_000 * seed + i, reachable=i % 5 != 3) for i in range(count)
    ]
    return [replace(trial, instruction=f"go {i % 2}") for i, trial in enumerate(trials)]


def demonstrator(name: str):
    from agra.evaluation.collect import Demonstrator  # worker processes that only play need none of what it imports

    assert name == "point"
    world = PointWorld()
    return Demonstrator(simulator=world, expert=Expert(world), trials=training_trials, tasks=("reach",))


def wanderer() -> tuple[Wanderer, PointWorld]:
    world = PointWorld()
    return Wanderer(world), world
