"""Visual reliance of a policy: the error of its first chunk's target, and the inputs that move the target (B.2.2).

A falling action loss does not show it, since most of an action can be read off the state vector. An episode's first
observation does, since the state is nearly always the same there. A policy that uses the image puts the hand where the object
is, and moves it when the image shows another scene. The *target* of a chunk is the (planar) position that it asks for at one
of its steps.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from agra import files
from agra.config import VisualRelianceConfig
from agra.types import Episode, Observation, Policy

Variant = Literal["seen", "image_swapped", "image_masked", "instruction_swapped"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialObservation:
    """The first observation of a demonstrated episode, and the demonstration's actions."""

    trial: str
    group: str  # those of one group, for example a task, share the constant predictor
    observation: Observation
    actions: np.ndarray  # (N, D), the episode's actions in the robot's units

    @classmethod
    def of(cls, episode: Episode, *, trial: str, group: str) -> "InitialObservation":
        """The initial observation of a recorded episode."""
        observation = Observation(
            frame=episode.frames[0],
            state=episode.states[0],
            instruction=episode.instruction,
            embodiment=episode.embodiment,
        )
        return cls(trial=trial, group=group, observation=observation, actions=episode.actions)


def groups_by_instruction(instructions: Sequence[str], *, least: int = 8) -> list[str]:
    """A group for each instruction: itself where at least `least` share it, "other" for the rest."""
    counts = Counter(instructions)
    return [text if counts[text] >= least else "other" for text in instructions]


@dataclass(frozen=True, kw_only=True, eq=False)
class Swaps:
    """The rows whose image and instruction replace each row's. A row's own number means that nothing is swapped."""

    image: np.ndarray  # (N,) rows
    instruction: np.ndarray  # (N,)
    rival: Mapping[int, int]  # rows with the same scene under another instruction

    @classmethod
    def of(cls, groups: Sequence[str], instructions: Sequence[str], rival: Mapping[int, int]) -> "Swaps":
        """Images come from the row half a group away. Instructions come from the rival, or else from there as well."""
        image = np.arange(len(groups))
        for group in dict.fromkeys(groups):
            rows = np.flatnonzero(np.asarray(groups) == group)
            image[rows] = np.roll(rows, len(rows) // 2)
        other = [rival.get(row, int(partner)) for row, partner in enumerate(image)]
        instruction = [o if instructions[o] != instructions[row] else row for row, o in enumerate(other)]
        return cls(image=image, instruction=np.array(instruction, dtype=np.int64), rival=rival)


def rivals(initial: Sequence[InitialObservation]) -> dict[int, int]:
    """Row to row with the same scene under another instruction, where there is one."""
    scenes: dict[bytes, list[int]] = {}
    for row, each in enumerate(initial):
        scenes.setdefault(each.observation.frame.tobytes(), []).append(row)
    pairs = {}
    for rows in scenes.values():
        for row in rows:
            others = [o for o in rows if initial[o].observation.instruction != initial[row].observation.instruction]
            if others:
                pairs[row] = others[0]
    return pairs


def observations(initial: Sequence[InitialObservation], swaps: Swaps) -> dict[Variant, list[Observation]]:
    """The observations of each variant, in which the named part alone changes. A masked image is its mean colour."""
    seen = [each.observation for each in initial]
    return {
        "seen": seen,
        "image_swapped": [replace(o, frame=seen[i].frame) for o, i in zip(seen, swaps.image, strict=True)],
        "image_masked": [replace(o, frame=_blank(o.frame)) for o in seen],
        "instruction_swapped": [
            replace(o, instruction=seen[i].instruction) for o, i in zip(seen, swaps.instruction, strict=True)
        ],
    }


def measure_visual_reliance(
    policy: Policy,
    initial: Sequence[InitialObservation],
    action_names: Sequence[str],
    config: VisualRelianceConfig,
    *,
    seed: int = 0,
) -> "VisualReliance":
    """Compare any policy's first chunk between the variants, under the same seed.

    Raises ValueError without initial observations.
    """
    if not initial:
        raise ValueError("visual reliance: no initial observations")
    dimensions = config.select(action_names)
    groups = [each.group for each in initial]
    swaps = Swaps.of(groups, [each.observation.instruction for each in initial], rivals(initial))
    targets: dict[Variant, np.ndarray] = {}
    for variant, changed in observations(initial, swaps).items():
        rows = []
        for observation in changed:
            policy.reset(seed)
            rows.append(_target(policy.act(observation).actions, dimensions, config.step))
        targets[variant] = np.stack(rows)
    demonstrated = np.stack([_target(each.actions, dimensions, config.step) for each in initial])
    return VisualReliance.of(targets, demonstrated, swaps, trials=[each.trial for each in initial], groups=groups)


MEASURES = (
    "error",  # distance of the target from the demonstrated one
    "constant_error",  # the same for the mean of the others of the group
    "image_swap_shift",  # distance by which the target moves
    "image_mask_shift",
    "instruction_swap_shift",
    "follows_instruction",  # 1 where the rival's instruction brings the target nearer to the rival's, else 0
)


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualReliance:
    """The measures of N initial observations, in the unit of the target. NaN where a measure is not applicable."""

    trials: tuple[str, ...]
    groups: tuple[str, ...]
    values: Mapping[str, np.ndarray]  # by name, see MEASURES

    @classmethod
    def of(
        cls,
        targets: Mapping[Variant, np.ndarray],
        demonstrated: np.ndarray,
        swaps: Swaps,
        *,
        trials: Sequence[str],
        groups: Sequence[str],
    ) -> "VisualReliance":
        """The measures of the targets (N, d) of every variant, given the demonstrated ones (N, d).

        A missing variant gives NaN.
        """
        seen = targets["seen"]
        missing = np.full_like(seen, np.nan)
        image_swapped, image_masked, instruction_swapped = (targets.get(variant, missing) for variant in VARIANTS[1:])
        follows = np.full(len(demonstrated), np.nan)
        for row, other in swaps.rival.items():
            distance, rival_distance = np.linalg.norm(instruction_swapped[row] - demonstrated[[row, other]], axis=-1)
            follows[row] = rival_distance < distance if np.isfinite(distance) else np.nan
        values = {
            "error": np.linalg.norm(seen - demonstrated, axis=-1),
            "constant_error": np.linalg.norm(_constant(demonstrated, groups) - demonstrated, axis=-1),
            "image_swap_shift": _shift(image_swapped, seen, swaps.image),
            "image_mask_shift": np.linalg.norm(image_masked - seen, axis=-1),
            "instruction_swap_shift": _shift(instruction_swapped, seen, swaps.instruction),
            "follows_instruction": follows,
        }
        return cls(trials=tuple(trials), groups=tuple(groups), values=values)

    def group(self, name: str) -> "VisualReliance":
        """The measures of one group."""
        rows = [row for row, group in enumerate(self.groups) if group == name]
        return VisualReliance(
            trials=tuple(self.trials[row] for row in rows),
            groups=(name,) * len(rows),
            values={measure: values[rows] for measure, values in self.values.items()},
        )

    def means(self) -> dict[str, float]:
        """The mean of every measure that is applicable to some observation."""
        return {name: float(np.nanmean(v)) for name, v in self.values.items() if np.isfinite(v).any()}

    def save(self, path: Path) -> None:
        """Write JSON under a temporary name and rename it."""
        values = {name: [None if np.isnan(v) else v for v in row.tolist()] for name, row in self.values.items()}
        files.write_text(path, json.dumps({"trials": self.trials, "groups": self.groups, "values": values}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "VisualReliance":
        """Inverse of `save`."""
        content = json.loads(path.read_text())
        values = {name: np.array(row, dtype=np.float64) for name, row in content["values"].items()}
        if set(values) != set(MEASURES) or any(len(row) != len(content["trials"]) for row in values.values()):
            raise ValueError(f"{path}: expected a value of each of {', '.join(MEASURES)} for every trial")
        return cls(trials=tuple(content["trials"]), groups=tuple(content["groups"]), values=values)


def _blank(frame: np.ndarray) -> np.ndarray:
    colour = frame.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    return np.broadcast_to(colour, frame.shape).copy()


def _target(actions: np.ndarray, dimensions: Sequence[int], step: int) -> np.ndarray:
    """The target of a chunk or episode. The last action stands for those after the end."""
    return actions[min(step, len(actions) - 1), list(dimensions)].astype(np.float64)


def _constant(targets: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The mean of the others of the group. NaN in a group of one."""
    means = np.full(targets.shape, np.nan)
    for group in dict.fromkeys(groups):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if len(rows) > 1:
            means[rows] = (targets[rows].sum(axis=0) - targets[rows]) / (len(rows) - 1)
    return means


def _shift(moved: np.ndarray, seen: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Distances between targets. NaN where nothing was swapped."""
    distance = np.linalg.norm(moved - seen, axis=-1)
    return np.where(source == np.arange(len(source)), np.nan, distance)
