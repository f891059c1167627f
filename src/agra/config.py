"""RunConfig: the whole description of a training run, and its JSON. Describes and checks. Opens no data."""

import difflib
import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import cattrs
from cattrs.preconf.json import make_converter

from agra.data.config import DataConfig, SourceConfig
from agra.methods.method import MethodConfig
from agra.methods.table import METHODS
from agra.methods.wam import WAMMethodConfig
from agra.stages import StageConfig


@dataclass(frozen=True, kw_only=True)
class VisualRelianceConfig:
    """Action dimensions and chunk step used to measure visual reliance: together they are the *target* of a chunk."""

    dimensions: tuple[str, ...] = ()
    """Patterns over the embodiment's action names; all that match make one vector. Without any it is planar positions,
    `*_x` and `*_y`, metres on the tabletop, and the whole action of an embodiment that has none."""
    step: int = 7
    """Step of the chunk, from 0: about where the hand reaches the object."""

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"visual_reliance.step: expected at least 0, got {self.step}")

    def select(self, action_names: Sequence[str]) -> list[int]:
        """The action dimensions. Raises ValueError where no name matches `dimensions`."""
        patterns = self.dimensions or ("*_x", "*_y")
        matching = [i for i, name in enumerate(action_names) if any(fnmatch.fnmatch(name, p) for p in patterns)]
        if self.dimensions and not matching:
            raise ValueError(
                f"visual_reliance.dimensions: {self.dimensions} match none of the actions {tuple(action_names)}"
            )
        return matching or list(range(len(action_names)))


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Grounding measured on probe samples during training, every `stage.validate_every` steps."""

    probes: str = ""
    """A folder that `agra probes` wrote; empty measures nothing. Samples without a mask are left out."""
    sensitivity_samples: int = 8
    """Samples, the first ones, whose sensitivity ratio is measured: the costly part."""
    background_sets: int = 2
    """Background sets of each."""

    def __post_init__(self) -> None:
        if self.sensitivity_samples < 0 or self.background_sets < 1:
            raise ValueError(
                f"monitor: expected sensitivity_samples >= 0 and background_sets >= 1, got {self.sensitivity_samples}"
                f" and {self.background_sets}"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Method, data and stage. A recipe makes one, the command line changes it, a checkpoint keeps it."""

    method: MethodConfig = field(default_factory=WAMMethodConfig)
    """Of the class that `agra.methods.table` lists for its `kind`."""
    data: DataConfig
    stage: StageConfig = field(default_factory=StageConfig)
    visual_reliance: VisualRelianceConfig | None = None
    """Action dimensions and chunk step used to measure visual reliance, also during training. None disables it."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        self.method.check(self.stage.name, self.stage.frozen)
        for name, parts in (
            ("frozen", self.stage.frozen),
            ("learning_rate_by_part", self.stage.learning_rate_by_part),
        ):
            unknown = [part for part in parts if part not in self.method.part_names]
            if unknown:
                raise ValueError(
                    f"stage.{name}: {unknown[0]!r} is no part of this method; it has {', '.join(self.method.part_names)}"
                )
        for source in self.data.sources if self.method.clips_actions else ():
            methods = [method for _, method in source.keys("action")] or [source.normalization]
            if wide := [method for method in methods if method not in ("min_max", "sin_cos", "rot6d")]:
                raise ValueError(
                    f"data.normalization: {self.method.kind} clips actions to [-1, 1], so theirs must be min_max, got {wide[0]}"
                )
        rows = self.method.shapes.num_embodiments
        if len(self.data.embodiments) > rows:
            raise ValueError(
                f"data.embodiments: {len(self.data.embodiments)} embodiments {self.data.embodiments} do not fit the"
                f" method's {rows} rows; raise its num_embodiments"
            )

    def to_json(self) -> str:
        """The resolved config, every field spelled out."""
        return json.dumps(_converter.unstructure(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str | Path = "config") -> "RunConfig":
        """Inverse of `to_json`. An unknown, missing or ill-typed key raises ValueError naming it and `source`."""
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{source}: not JSON ({error})") from error
        return cls.from_values(values, source)

    @classmethod
    def from_values(cls, values: Any, source: str | Path = "config") -> "RunConfig":
        """A config from JSON's values. Raises ValueError as `from_json` does."""
        try:
            return _converter.structure(values, cls)
        except cattrs.BaseValidationError as error:
            problem = cattrs.transform_error(error, path="config", format_exception=_reason)[0]
            raise ValueError(f"{source}: {problem}{_suggestion(error)}") from error


def first_difference(saved: RunConfig, present: RunConfig) -> str:
    """A phrase naming the first field in which two configs differ."""
    saved_fields, present_fields = (flat(json.loads(config.to_json())) for config in (saved, present))
    names = sorted({*saved_fields, *present_fields})
    name = next(name for name in names if saved_fields.get(name) != present_fields.get(name))
    return f"{name} is {saved_fields.get(name)!r} there and {present_fields.get(name)!r} here"


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dictionaries by their dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, child in tree.items()
        for name, leaf in flat(child, f"{prefix}.{key}" if prefix else key).items()
    }


def read_mixture(path: Path) -> tuple[SourceConfig, ...]:
    """A JSON list of sources, each an object of the fields that it sets. Raises as `RunConfig.from_json` does."""
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
    """The method's config by its `kind`."""
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
    """A check's own message, which cattrs would replace by "invalid value"."""
    checked = type(error) is ValueError and str(error)
    return str(error) if checked else cattrs.v.format_exception(error, kind)


def _suggestion(error: BaseException) -> str:
    """The known key closest to the first unknown one."""
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [f.name for f in fields(error.cl)]
        close = difflib.get_close_matches(sorted(error.extra_fields)[0], known, n=1, cutoff=0)
        return f"; the closest known key is {close[0]!r}"
    inner: tuple[Any, ...] = getattr(error, "exceptions", ())
    return next((text for e in inner if (text := _suggestion(e))), "")
