"""Visual reliance of a policy (B.2.2): the error of its first chunk's target, and the inputs that move the target.

A falling action loss does not show it, since most of an action can be predicted from the state vector. The first
observation of an episode does, since the state is nearly always the same there. A policy that uses the image moves the
hand to the object, and moves it elsewhere when the image shows another scene. The *target* of a chunk is the (planar)
position that it asks for at one of its steps.
"""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from agra import files
from agra.config import VisualRelianceConfig
from agra.types import Episode, Observation, Policy

InputVariant = Literal["unchanged", "image_swapped", "image_masked", "instruction_swapped"]
VARIANTS: tuple[InputVariant, ...] = get_args(InputVariant)


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialObservation:
    """The first observation of a demonstrated episode, and the demonstration's actions."""

    trial: str
    group: str  # such as a task. Each group has a constant predictor of its own
    observation: Observation
    actions: np.ndarray  # (N, D), the episode's actions in the robot's units

    @classmethod
    def of(cls, episode: Episode, *, trial: str, group: str) -> "InitialObservation":
        """The initial observation of a recorded episode, whose frames hold all cameras of the dataset."""
        observation = Observation(
            frame=episode.frames[0],
            state=episode.states[0],
            instruction=episode.instruction,
            embodiment=episode.embodiment,
            joined=True,
        )
        return cls(trial=trial, group=group, observation=observation, actions=episode.actions)


def groups_by_instruction(instructions: Sequence[str], *, least: int = 8) -> list[str]:
    """A group for each instruction: the instruction itself where at least `least` episodes have it, else "other"."""
    counts = Counter(instructions)
    return [text if counts[text] >= least else "other" for text in instructions]


@dataclass(frozen=True, kw_only=True, eq=False)
class Swaps:
    """The rows whose image and instruction replace each row's. A row that keeps its own has its own number."""

    image: np.ndarray  # (N,) row numbers
    instruction: np.ndarray  # (N,) row numbers
    rival: Mapping[int, int]  # rows with the same scene under another instruction

    @classmethod
    def of(
        cls,
        groups: Sequence[str],
        instructions: Sequence[str],
        demonstrated: Float[np.ndarray, "N d"],
        rival: Mapping[int, int],
    ) -> "Swaps":
        """Take images from another row of the group, and instructions from the rival or, without one, from the same
        row.

        Of up to 64 rotations of a group's rows the images take the one that moves the demonstrated targets farthest on
        average. Trials are often listed by place, and an image with another object at the same place shows nothing.
        A rival's image is the row's own and counts as no move.
        """
        image = np.arange(len(groups))
        same_scene = np.full(len(groups), -1)
        same_scene[list(rival)] = list(rival.values())
        for group in dict.fromkeys(groups):
            rows = np.flatnonzero(np.asarray(groups) == group)
            farthest = -1.0
            for shift in np.unique(np.linspace(1, len(rows) - 1, 64).astype(int)) if len(rows) > 1 else ():
                donors = np.roll(rows, shift)
                distance = np.linalg.norm(demonstrated[donors] - demonstrated[rows], axis=-1)
                if (moved := np.where(same_scene[rows] == donors, 0, np.nan_to_num(distance)).mean()) > farthest:
                    image[rows], farthest = donors, moved
        donors = [rival.get(row, int(partner)) for row, partner in enumerate(image)]
        instruction = [donor if instructions[donor] != instructions[row] else row for row, donor in enumerate(donors)]
        return cls(image=image, instruction=np.array(instruction, dtype=np.int64), rival=rival)


def rivals(initial: Sequence[InitialObservation]) -> dict[int, int]:
    """Map rows to a row with the same first frame under another instruction, where there is one."""
    scenes: dict[bytes, list[int]] = {}
    for row, start in enumerate(initial):
        scenes.setdefault(start.observation.frame.tobytes(), []).append(row)
    pairs = {}
    for rows in scenes.values():
        for row in rows:
            instruction = initial[row].observation.instruction
            different = [other for other in rows if initial[other].observation.instruction != instruction]
            if different:
                pairs[row] = different[0]
    return pairs


def observations(initial: Sequence[InitialObservation], swaps: Swaps) -> dict[InputVariant, list[Observation]]:
    """The observations of each variant. Only the named part changes. A masked image has its mean colour everywhere."""
    unchanged = [start.observation for start in initial]
    return {
        "unchanged": unchanged,
        "image_swapped": [
            replace(observation, frame=unchanged[row].frame)
            for observation, row in zip(unchanged, swaps.image, strict=True)
        ],
        "image_masked": [replace(observation, frame=blank(observation.frame)) for observation in unchanged],
        "instruction_swapped": [
            replace(observation, instruction=unchanged[row].instruction)
            for observation, row in zip(unchanged, swaps.instruction, strict=True)
        ],
    }


def measure_visual_reliance(
    policy: Policy,
    initial: Sequence[InitialObservation],
    action_names: Sequence[str],
    config: VisualRelianceConfig,
    *,
    seed: int = 0,
    reads_instruction: bool = True,
) -> "VisualReliance":
    """Compare a policy's first chunk between the variants.

    The noise of an observation comes from `seed` and the trial's name, the same for all variants. Works for any
    policy, also a remote one. For a policy that reads no instruction, the measures of the swapped instruction are
    not applicable. Raises ValueError without initial observations.
    """
    if not initial:
        raise ValueError("visual reliance: no initial observations")
    groups = [start.group for start in initial]
    demonstrated = np.stack([config.target(start.actions, action_names) for start in initial])
    swaps = Swaps.of(groups, [start.observation.instruction for start in initial], demonstrated, rivals(initial))
    targets: dict[InputVariant, np.ndarray] = {}
    for variant, changed in observations(initial, swaps).items():
        if variant == "instruction_swapped" and not reads_instruction:
            continue
        rows = []
        for start, observation in zip(initial, changed, strict=True):
            policy.reset(zlib.crc32(f"{seed}/{start.trial}".encode()))
            rows.append(config.target(policy.act(observation).actions, action_names))
        targets[variant] = np.stack(rows)
    return VisualReliance.of(targets, demonstrated, swaps, trials=[start.trial for start in initial], groups=groups)


class EarlierInstrument(ValueError):
    """A file of version 0.1, whose measures have another meaning (docs/diagnosis.md)."""


MEASURES = (
    "error",  # distance of the target from the demonstrated target
    "constant_error",  # the same for the constant that is nearest to the rest of the group: its geometric median
    "image_swap_shift",  # distance that the target moves under another trial's image
    "demonstrated_swap_shift",  # distance between the demonstrated targets of these two trials
    "image_mask_shift",  # distance that it moves under a blank image
    "instruction_swap_shift",  # distance that it moves under another instruction
    "follows_instruction",  # 1 where the rival's instruction brings the target nearer to the rival's target, else 0
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
        targets: Mapping[InputVariant, np.ndarray],
        demonstrated: np.ndarray,
        swaps: Swaps,
        *,
        trials: Sequence[str],
        groups: Sequence[str],
        constants: Float[np.ndarray, "N d"] | None = None,
    ) -> "VisualReliance":
        """The measures of the targets (N, d) of every variant, given the demonstrated targets (N, d).

        The measures of a missing variant are NaN. `constants` are those of `best_constants`, for callers that measure
        the same demonstrations often.
        """
        if constants is None:
            constants = best_constants(demonstrated, groups)
        unchanged = targets["unchanged"]
        missing = np.full_like(unchanged, np.nan)
        image_swapped, image_masked, instruction_swapped = (targets.get(variant, missing) for variant in VARIANTS[1:])
        follows = np.full(len(demonstrated), np.nan)
        for row, other in swaps.rival.items():
            distance, rival_distance = np.linalg.norm(instruction_swapped[row] - demonstrated[[row, other]], axis=-1)
            follows[row] = rival_distance < distance if np.isfinite(distance) else np.nan
        values = {
            "error": np.linalg.norm(unchanged - demonstrated, axis=-1),
            "constant_error": np.linalg.norm(constants - demonstrated, axis=-1),
            "image_swap_shift": _shift(image_swapped, unchanged, swaps.image),
            "demonstrated_swap_shift": _shift(demonstrated[swaps.image], demonstrated, swaps.image),
            "image_mask_shift": np.linalg.norm(image_masked - unchanged, axis=-1),
            "instruction_swap_shift": _shift(instruction_swapped, unchanged, swaps.instruction),
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
        """The mean of every measure over the observations that it applies to.

        Measures that apply to none are left out.
        """
        return {name: float(np.nanmean(v)) for name, v in self.values.items() if np.isfinite(v).any()}

    def save(self, path: Path) -> None:
        """Write JSON, with null for NaN."""
        values = {name: [None if np.isnan(v) else v for v in row.tolist()] for name, row in self.values.items()}
        files.write_text(path, json.dumps({"trials": self.trials, "groups": self.groups, "values": values}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "VisualReliance":
        """Inverse of `save`. Raises ValueError for another file, and its subclass `EarlierInstrument`."""
        content = json.loads(path.read_text())
        if "demonstrated_swap_shift" not in content["values"]:
            raise EarlierInstrument(f"{path}: was measured by an earlier version; diagnose the policy again")
        values = {name: np.array(row, dtype=np.float64) for name, row in content["values"].items()}
        if set(values) != set(MEASURES) or any(len(row) != len(content["trials"]) for row in values.values()):
            raise ValueError(
                f"{path}: expected a value of each of {', '.join(MEASURES)} for every trial; diagnose the policy again"
            )
        return cls(trials=tuple(content["trials"]), groups=tuple(content["groups"]), values=values)


def blank(frame: np.ndarray) -> np.ndarray:
    """The frame (H, W, 3) uint8 with its mean colour everywhere."""
    colour = frame.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    return np.broadcast_to(colour, frame.shape).copy()


def best_constants(targets: Float[np.ndarray, "N d"], groups: Sequence[str]) -> Float[np.ndarray, "N d"]:
    """The geometric median of the rest of each row's group, or of a group of more than 200. NaN in a group of one."""
    constants = np.full(targets.shape, np.nan)
    for group in dict.fromkeys(groups):
        rows = np.flatnonzero(np.asarray(groups) == group)
        if len(rows) > 200:  # one of them matters little, and a median for each takes time
            constants[rows] = geometric_median(targets[rows])
            continue
        for row in rows if len(rows) > 1 else ():
            constants[row] = geometric_median(targets[rows[rows != row]])
    return constants


def geometric_median(points: Float[np.ndarray, "N d"], *, iterations: int = 100) -> Float[np.ndarray, " d"]:
    """The point with the least mean distance to `points`, by Weiszfeld's iteration."""
    median = points.mean(axis=0)
    for _ in range(iterations):
        weights = 1 / np.maximum(np.linalg.norm(points - median, axis=-1), 1e-9)
        median = weights @ points / weights.sum()
    return median


def _shift(moved: np.ndarray, unchanged: np.ndarray, donors: np.ndarray) -> np.ndarray:
    """Distances between targets. NaN for rows that kept their own input."""
    distance = np.linalg.norm(moved - unchanged, axis=-1)
    return np.where(donors == np.arange(len(donors)), np.nan, distance)
