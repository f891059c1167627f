"""RunConfig: the whole description of a training run, and its JSON. It checks values and opens no files of data."""

import difflib
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import cattrs
import numpy as np
from cattrs.preconf.json import make_converter

from agra.data.config import DataConfig, SourceConfig
from agra.methods.method import MethodConfig
from agra.methods.table import METHODS
from agra.methods.wam import WAMMethodConfig
from agra.stages import StageConfig
from agra.types import ActionNoise, VideoNoise


@dataclass(frozen=True, kw_only=True)
class VisualRelianceConfig:
    """Action dimensions and chunk step that measure visual reliance. Together they are the *target* of a chunk."""

    dimensions: tuple[str, ...] = ()
    """Patterns of action names. All matching dimensions form one vector. By default the planar positions `*_x` and
    `*_y`, in metres on the tabletop, or the whole action of an embodiment without such names."""
    step: int = 7
    """Step of the chunk, from 0. The default is about where the hand reaches the object."""
    displacement_unit: float | None = None
    """Metres that an action of 1 moves, for actions that are displacements. The target is then their sum up to `step`, with
    one component for each pattern of `dimensions`."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"visual_reliance.step: expected at least 0, got {self.step}")
        if self.displacement_unit is not None and not (self.displacement_unit > 0 and self.dimensions):
            raise ValueError(
                "visual_reliance.displacement_unit: expected a positive number and patterns in dimensions, got "
                f"{self.displacement_unit} and {self.dimensions}"
            )

    def select(self, action_names: Sequence[str]) -> list[int]:
        """Select the action dimensions. Raises ValueError where no name matches `dimensions`."""
        patterns = self.dimensions or ("*_x", "*_y")
        matching = [i for i, name in enumerate(action_names) if any(fnmatch.fnmatch(name, p) for p in patterns)]
        if self.dimensions and not matching:
            raise ValueError(
                f"visual_reliance.dimensions: {self.dimensions} match none of the actions; choose among "
                f"{tuple(action_names)}"
            )
        return matching or list(range(len(action_names)))

    def target(self, actions: np.ndarray, action_names: Sequence[str]) -> np.ndarray:
        """Return the targets (..., d) float64 of chunks or episodes (..., N, D) in the robot's units.

        After the end of an episode the target is that of its last action. Raises ValueError as `select` does.
        """
        selected, end = self.select(action_names), min(self.step, actions.shape[-2] - 1)
        if self.displacement_unit is None:
            return actions[..., end, selected].astype(np.float64)
        moved = actions[..., : end + 1, :].astype(np.float64).sum(axis=-2) * self.displacement_unit
        by_pattern = [[fnmatch.fnmatch(name, p) for name in action_names] for p in self.dimensions]
        return np.stack([moved[..., matching].sum(axis=-1) for matching in by_pattern], axis=-1)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Measurement of grounding on probe samples during training, every `stage.validate_every` steps."""

    probes: str = ""
    """Folder written by `agra probes`. Empty turns the monitor off. Samples without a mask are left out."""
    sensitivity_samples: int = 8
    """Number of samples whose sensitivity ratio is measured, the costly part of the monitor."""
    background_sets: int = 2
    """Background sets for each of these samples."""
    predictions: int = 0
    """Number of held-out windows whose predicted video is logged beside the recorded one, with its PSNR. 0 turns it
    off. The frozen codec stays in memory for it."""

    def __post_init__(self) -> None:
        if self.predictions < 0:
            raise ValueError(f"monitor.predictions: expected at least 0, got {self.predictions}")
        if self.sensitivity_samples < 0 or self.background_sets < 1:
            raise ValueError(
                f"monitor: expected sensitivity_samples >= 0 and background_sets >= 1, got {self.sensitivity_samples}"
                f" and {self.background_sets}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Method, data and stage of a run. Recipes make it, the command line changes it, checkpoints store it."""

    method: MethodConfig = field(default_factory=WAMMethodConfig)
    """Settings of the class that `agra.methods.table` lists for their `kind`."""
    data: DataConfig
    stage: StageConfig = field(default_factory=StageConfig)
    visual_reliance: VisualRelianceConfig | None = None
    """Settings of visual reliance, which is measured in diagnosis and during training. None turns it off."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    action_noise: ActionNoise = "random"
    """Noise from which a policy of this run denoises its chunks, unless it is loaded with another one: random as in the
    paper, or zero (docs/study.md). Training does not use it."""
    video_noise: VideoNoise = "random"
    """Noise of the predicted frames in a world action model's conditioning pass: random as in the paper, the same for
    every answer, or zero (docs/study.md). Training does not use it."""

    def __post_init__(self) -> None:
        self.method.check(self.stage.name, self.stage.frozen)
        for name, parts in (
            ("frozen", self.stage.frozen),
            ("learning_rate_by_part", self.stage.learning_rate_by_part),
        ):
            unknown = [part for part in parts if part not in self.method.part_names]
            if unknown:
                raise ValueError(
                    f"stage.{name}: {unknown[0]!r} is not a part of this method; expected "
                    f"{', '.join(self.method.part_names)}"
                )
        for source in self.data.sources if self.method.clips_actions else ():
            methods = [method for _, method in source.keys("action")] or [source.normalization]
            if wide := [method for method in methods if method not in ("min_max", "sin_cos", "rot6d")]:
                raise ValueError(
                    f"data.normalization: {self.method.kind} clips actions to [-1, 1], so theirs must be min_max, got "
                    f"{wide[0]}"
                )
        stride = self.method.frame_stride
        if others := [s.frame_stride for s in self.data.sources if stride is not None and s.frame_stride != stride]:
            raise ValueError(
                f"data.frame_stride: {self.method.kind} counts frames as control steps and needs a stride of {stride}, "
                f"got {others[0]}"
            )
        rows = self.method.shapes.num_embodiments
        if len(self.data.embodiments) > rows:
            raise ValueError(
                f"data.embodiments: {len(self.data.embodiments)} embodiments {self.data.embodiments}, but the method "
                f"has {rows} rows; raise its num_embodiments"
            )

    def to_json(self) -> str:
        """Write the resolved config with all of its fields."""
        return json.dumps(_converter.unstructure(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = "config") -> "RunConfig":
        """Read what `to_json` wrote. An unknown, missing or ill-typed key raises ValueError naming it and `source`."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source}: not JSON ({error})") from error
        return cls.from_values(values, source)

    @classmethod
    def from_values(cls, values: Any, source: str | Path = "config") -> "RunConfig":
        """Make a config from JSON values. Raises ValueError as `from_json` does."""
        try:
            return _converter.structure(values, cls)
        except cattrs.BaseValidationError as error:
            problem = cattrs.transform_error(error, path="config", format_exception=_reason)[0]
            raise ValueError(f"{source}: {problem}{_suggestion(error)}") from error


_NOT_TRAINING = {
    *("data.path", "data.cache", "monitor", "visual_reliance", "action_noise", "video_noise"),
    *(f"stage.{name}" for name in ("log_every", "validate_every", "save_every", "keep_checkpoints", "keep_best")),
}
"""Fields that change no weight. `data.path` and `data.cache` are places, whose contents are checked elsewhere."""


def first_difference(saved: RunConfig, present: RunConfig) -> str | None:
    """Name the first field that may change the weights and in which two configs differ, in a phrase. None without one."""
    saved_fields, present_fields = (flat(json.loads(config.to_json())) for config in (saved, present))
    for name in sorted({*saved_fields, *present_fields}):
        there, here = saved_fields.get(name), present_fields.get(name)
        if there != here and not {name, name.split(".")[0]} & _NOT_TRAINING:
            return f"{name} is {there!r} there and {here!r} here"
    return None


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dictionaries by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, child in tree.items()
        for name, leaf in flat(child, f"{prefix}.{key}" if prefix else key).items()
    }


def read_mixture(path: Path) -> tuple[SourceConfig, ...]:
    """Read a JSON list of sources, each an object of the fields that it sets. Raises as `RunConfig.from_json` does."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a JSON list of the datasets to mix")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a JSON list of the datasets to mix, got {content!r:.40}")
        return _converter.structure(content, tuple[SourceConfig, ...])
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except cattrs.BaseValidationError as error:
        problem = cattrs.transform_error(error, path="source", format_exception=_reason)[0]
        raise ValueError(f"{path}: {problem}{_suggestion(error)}") from error


def _structure_method(value: Any, _: Any) -> MethodConfig:
    """Make a method's config of the class of its `kind`."""
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in METHODS:
        raise ValueError(f"method.kind: expected one of {', '.join(METHODS)}, got {kind!r}")
    return _converter.structure(value, METHODS[kind])


_converter = make_converter(forbid_extra_keys=True, detailed_validation=True)
_converter.register_structure_hook_func(lambda kind: kind is MethodConfig, _structure_method)
_converter.register_unstructure_hook_func(
    lambda kind: kind is MethodConfig, lambda value: _converter.unstructure(value, unstructure_as=type(value))
)


def _reason(error: BaseException, kind: type | None) -> str:
    """Return a check's own message, which cattrs would replace by "invalid value"."""
    checked = type(error) is ValueError and str(error)
    return str(error) if checked else cattrs.v.format_exception(error, kind)


def _suggestion(error: BaseException) -> str:
    """Suggest the valid key closest to the first unknown one."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        names = [f.name for f in fields(error.cl)]
        close = difflib.get_close_matches(sorted(error.extra_fields)[0], names, n=1, cutoff=0)
        return f"; the closest known key is {close[0]!r}"
    inner: tuple[Any, ...] = getattr(error, "exceptions", ())
    return next((text for e in inner if (text := _suggestion(e))), "")
