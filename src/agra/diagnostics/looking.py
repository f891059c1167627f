"""Does a policy look? How far its first chunk's target is from the demonstrated one, and what moves it.        B.2.2

A falling action loss does not tell: most of an action can be read off the state vector. What tells is an episode's first
observation, where the state is nearly always the same: a policy that looks puts the hand where the thing is, and moves it
when the picture shows another scene. The *target* of a chunk is the (planar) position that it asks for at one of its steps.
"""

import fnmatch
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from agra.types import Episode, Observation, Policy

Variant = Literal["seen", "image_swapped", "image_masked", "instruction_swapped"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What counts as a chunk's target."""

    dimensions: tuple[str, ...] = ()
    """Patterns over the embodiment's action names; all that match make one vector. Without any it is planar positions,
    `*_x` and `*_y`, metres on the tabletop, and the whole action of an embodiment that has none."""
    step: int = 7
    """Step of the chunk, from 0: about where the hand reaches the thing."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"looking.step: expected at least 0, got {self.step}")

    def select(self, action_names: Sequence[str]) -> list[int]:
        """The action dimensions. Raises ValueError where none is called as `dimensions` say."""
        patterns = self.dimensions or ("*_x", "*_y")
        found = [i for i, name in enumerate(action_names) if any(fnmatch.fnmatch(name, p) for p in patterns)]
        if self.dimensions and not found:
            raise ValueError(f"looking.dimensions {self.dimensions}: name none of the actions {tuple(action_names)}")
        return found or list(range(len(action_names)))


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstLook:
    """The first observation of a demonstrated episode and what the demonstration did next."""

    trial: str
    group: str  # looks of one group share the constant predictor, say, those of a task
    observation: Observation
    actions: np.ndarray  # (N, D), the episode's actions in the robot's units

    @classmethod
    def of(cls, episode: Episode, *, trial: str, group: str) -> "FirstLook":
        """The first look of a recorded episode."""
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
    """Which look's image and instruction each look is shown instead of its own; its own row where nothing is swapped."""

    image: np.ndarray  # (N,) rows
    instruction: np.ndarray  # (N,)
    rival: Mapping[int, int]  # rows of looks at the very same scene under another instruction

    @classmethod
    def of(cls, groups: Sequence[str], instructions: Sequence[str], rival: Mapping[int, int]) -> "Swaps":
        """Images come from the look half a group away, instructions from the rival, or else from there as well."""
        image = np.arange(len(groups))
        for group in dict.fromkeys(groups):
            rows = np.flatnonzero(np.asarray(groups) == group)
            image[rows] = np.roll(rows, len(rows) // 2)
        other = [rival.get(row, int(partner)) for row, partner in enumerate(image)]
        instruction = [o if instructions[o] != instructions[row] else row for row, o in enumerate(other)]
        return cls(image=image, instruction=np.array(instruction, dtype=np.int64), rival=rival)


def rivals(looks: Sequence[FirstLook]) -> dict[int, int]:
    """Row to row of another look at the very same scene under another instruction, where there is one."""
    seen: dict[bytes, list[int]] = {}
    for row, look in enumerate(looks):
        seen.setdefault(look.observation.frame.tobytes(), []).append(row)
    found = {}
    for rows in seen.values():
        for row in rows:
            others = [o for o in rows if looks[o].observation.instruction != looks[row].observation.instruction]
            if others:
                found[row] = others[0]
    return found


def observations(looks: Sequence[FirstLook], swaps: Swaps) -> dict[Variant, list[Observation]]:
    """What the policy is shown in each variant; everything but the named part stays. Masked: the image's mean colour."""
    seen = [look.observation for look in looks]
    return {
        "seen": seen,
        "image_swapped": [replace(o, frame=seen[i].frame) for o, i in zip(seen, swaps.image, strict=True)],
        "image_masked": [replace(o, frame=_blank(o.frame)) for o in seen],
        "instruction_swapped": [
            replace(o, instruction=seen[i].instruction) for o, i in zip(seen, swaps.instruction, strict=True)
        ],
    }


def look(
    policy: Policy, looks: Sequence[FirstLook], action_names: Sequence[str], config: TargetConfig, *, seed: int = 0
) -> "Looking":
    """Ask any policy for its first chunk in every variant, under the same seed. Raises ValueError without looks."""
    if not looks:
        raise ValueError("look: no first looks")
    dimensions = config.select(action_names)
    groups = [one.group for one in looks]
    swaps = Swaps.of(groups, [one.observation.instruction for one in looks], rivals(looks))
    targets: dict[Variant, np.ndarray] = {}
    for variant, shown in observations(looks, swaps).items():
        rows = []
        for observation in shown:
            policy.reset(seed)
            rows.append(_target(policy.act(observation).actions, dimensions, config.step))
        targets[variant] = np.stack(rows)
    wanted = np.stack([_target(one.actions, dimensions, config.step) for one in looks])
    return Looking.of(targets, wanted, swaps, trials=[one.trial for one in looks], groups=groups)


MEASURES = (
    "error",  # distance of the target from the demonstrated one
    "constant_error",  # the same for the mean of the other looks of the group
    "image_swap_shift",  # how far the target moves
    "image_mask_shift",
    "instruction_swap_shift",
    "follows_instruction",  # 1 where the rival's instruction brings the target nearer to the rival's, else 0
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Looking:
    """The measures of N looks (N,), in the unit of the target; NaN where a look has no say."""

    trials: tuple[str, ...]
    groups: tuple[str, ...]
    values: Mapping[str, np.ndarray]  # by name, see MEASURES

    @classmethod
    def of(
        cls,
        targets: Mapping[Variant, np.ndarray],
        wanted: np.ndarray,
        swaps: Swaps,
        *,
        trials: Sequence[str],
        groups: Sequence[str],
    ) -> "Looking":
        """From the targets (N, d) of every variant and the demonstrated ones (N, d)."""
        seen = targets["seen"]
        follows = np.full(len(wanted), np.nan)
        for row, other in swaps.rival.items():
            own, theirs = np.linalg.norm(targets["instruction_swapped"][row] - wanted[[row, other]], axis=-1)
            follows[row] = theirs < own
        values = {
            "error": np.linalg.norm(seen - wanted, axis=-1),
            "constant_error": np.linalg.norm(_constant(wanted, groups) - wanted, axis=-1),
            "image_swap_shift": _shift(targets["image_swapped"], seen, swaps.image),
            "image_mask_shift": np.linalg.norm(targets["image_masked"] - seen, axis=-1),
            "instruction_swap_shift": _shift(targets["instruction_swapped"], seen, swaps.instruction),
            "follows_instruction": follows,
        }
        return cls(trials=tuple(trials), groups=tuple(groups), values=values)

    def group(self, name: str) -> "Looking":
        """The looks of one group."""
        rows = [row for row, group in enumerate(self.groups) if group == name]
        return Looking(
            trials=tuple(self.trials[row] for row in rows),
            groups=(name,) * len(rows),
            values={measure: values[rows] for measure, values in self.values.items()},
        )

    def means(self) -> dict[str, float]:
        """The mean of every measure that some look has a say in."""
        return {name: float(np.nanmean(v)) for name, v in self.values.items() if np.isfinite(v).any()}

    def save(self, path: Path) -> None:
        """Write JSON under a temporary name and rename it."""
        values = {name: [None if np.isnan(v) else v for v in row.tolist()] for name, row in self.values.items()}
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps({"trials": self.trials, "groups": self.groups, "values": values}) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Looking":
        """Inverse of `save`."""
        found = json.loads(path.read_text())
        values = {name: np.array(row, dtype=np.float64) for name, row in found["values"].items()}
        if set(values) != set(MEASURES) or any(len(row) != len(found["trials"]) for row in values.values()):
            raise ValueError(f"{path}: expected a value of each of {', '.join(MEASURES)} for every trial")
        return cls(trials=tuple(found["trials"]), groups=tuple(found["groups"]), values=values)


def _blank(frame: np.ndarray) -> np.ndarray:
    colour = frame.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    return np.broadcast_to(colour, frame.shape).copy()


def _target(actions: np.ndarray, dimensions: Sequence[int], step: int) -> np.ndarray:
    """A short chunk's or episode's last action stands for what would come after it."""
    return actions[min(step, len(actions) - 1), list(dimensions)].astype(np.float64)


def _constant(wanted: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """The mean of the other looks of the group; NaN in a group of one."""
    means = np.full(wanted.shape, np.nan)
    for group in dict.fromkeys(groups):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if len(rows) > 1:
            means[rows] = (wanted[rows].sum(axis=0) - wanted[rows]) / (len(rows) - 1)
    return means


def _shift(moved: np.ndarray, seen: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Distances; NaN where nothing was swapped."""
    distance = np.linalg.norm(moved - seen, axis=-1)
    return np.where(source == np.arange(len(source)), np.nan, distance)
