"""Settings of the training data: the datasets, their reading, sampling and augmentation. Opens no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from agra.data.normalization.normalize import NORMALIZATIONS, Normalization
from agra.types import side_by_side

EGO_VIEW = "observation.images.ego_view"
PastEnd = Literal["repeat", "mask", "inside"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A LeRobot dataset of any version: the columns and cameras to read, and the windows to draw.

    `state` and `action` list keys of the dataset's `meta/modality.json` in the order that the model sees them, or names
    of whole columns, each as KEY or KEY:METHOD. Empty means the whole of `observation.state` or `action`.
    """

    path: str = ""  # a folder, or a hub id OWNER/NAME[/FOLDER]
    revision: str | None = None  # of a hub id
    embodiment: str = ""  # replaces the dataset's `robot_type`
    camera: str = EGO_VIEW  # a feature, or its name in modality.json
    extra_cameras: tuple[str, ...] = ()  # placed to the right of `camera`, scaled to its height
    crop_rows: tuple[int, int] | None = None  # [first, end) of each camera's frame, cropped before any resizing
    crop_columns: tuple[int, int] | None = None  # [first, end), likewise
    state: tuple[str, ...] = ()  # KEY or KEY:METHOD, in the model's order. Empty: all of observation.state
    action: tuple[str, ...] = ()  # KEY or KEY:METHOD, in the model's order. Empty: all of action
    relative: tuple[str, ...] = ()  # keys of `action` that are movements. Past an episode's end nothing moves
    missing_keys: tuple[str, ...] = ()  # keys of the embodiment that are absent here: zeros, masked out of the loss
    normalization: Normalization = "min_max"  # of keys without a METHOD
    instruction_key: str = ""  # an annotation column of task numbers, in place of `task_index`
    strip_prefixes: tuple[str, ...] = ()  # removed from the start of instructions
    row_stride: int = 1  # keeps one row in n, for a lower control rate. For absolute actions only
    frame_stride: int = 1  # control steps between a window's frames. 1 in simulation, 3 on the robot
    horizon: int | None = None  # actions of a window that are learned. None: the method's horizon
    past_end: PastEnd = "repeat"  # past an episode's end: repeat the last row, mask its actions, or draw no such window
    training_episodes: int | None = None  # train on the first N episodes only. None: all
    weight: float = 1.0  # relative number of windows among the sources

    def __post_init__(self) -> None:
        for name in ("row_stride", "frame_stride", "horizon", "training_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: expected at least 1, got {value}")
        for name in ("crop_rows", "crop_columns"):
            span = getattr(self, name)
            if span is not None and not 0 <= span[0] < span[1]:
                raise ValueError(f"data.{name}: expected 0 <= first < end, got {span}")
        if not self.weight > 0:
            raise ValueError(f"data.weight: expected a positive number, got {self.weight}")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(
                f"data.normalization: expected one of {', '.join(NORMALIZATIONS)}, got {self.normalization!r}"
            )
        if self.past_end not in ("repeat", "mask", "inside"):
            raise ValueError(f"data.past_end: expected repeat, mask or inside, got {self.past_end!r}")
        for quantity in ("state", "action"):
            names = [name for name, _ in self.keys(quantity)]
            if len(set(names)) != len(names):
                raise ValueError(f"data.{quantity}: expected distinct keys, got {', '.join(names)}")
        keys = {name for quantity in ("state", "action") for name, _ in self.keys(quantity)}
        for name in ("missing_keys", "relative"):
            unknown = [key for key in getattr(self, name) if key not in keys]
            if unknown:
                raise ValueError(
                    f"data.{name}: {unknown[0]!r} is not among the keys of data.state and data.action"
                    f" ({', '.join(sorted(keys)) or 'none are listed'})"
                )
        if self.relative and self.row_stride > 1:
            raise ValueError(
                f"data.row_stride: expected 1 with relative keys, got {self.row_stride};"
                f" a stride would drop movements of {', '.join(self.relative)}"
            )

    def keys(self, quantity: str) -> tuple[tuple[str, Normalization], ...]:
        """(key, method) of "state" or "action", in order. Raises ValueError for an unknown method."""
        keys = []
        for item in getattr(self, quantity):
            name, _, method = item.partition(":")
            method = method or self.normalization
            if not name or method not in NORMALIZATIONS:
                raise ValueError(
                    f"data.{quantity}: expected KEY or KEY:METHOD with a method of {', '.join(NORMALIZATIONS)}, got "
                    f"{item!r}"
                )
            keys.append((name, method))
        return tuple(keys)

    def without_prefixes(self, instruction: str) -> str:
        """Remove `strip_prefixes`, each once and in order, from the start of an instruction."""
        for prefix in self.strip_prefixes:
            instruction = instruction.removeprefix(prefix)
        return instruction

    def crop(self, frames: np.ndarray, name: str) -> np.ndarray:
        """Crop frames (..., H, W, 3) to `crop_rows` and `crop_columns`.

        Raises ValueError, which begins with `name`, where the frames are smaller than the crop.
        """
        for axis, span in ((-3, self.crop_rows), (-2, self.crop_columns)):
            if span is None:
                continue
            if span[1] > frames.shape[axis]:
                side = "rows" if axis == -3 else "columns"
                raise ValueError(
                    f"{name}: data.crop_{side} is {span[0]} to {span[1]}, but the frames have {frames.shape[axis]} "
                    f"{side}"
                )
            frames = frames[..., span[0] : span[1], :, :] if axis == -3 else frames[..., span[0] : span[1], :]
        return frames

    @property
    def crops(self) -> bool:
        """True for a source with a crop."""
        return self.crop_rows is not None or self.crop_columns is not None

    @property
    def crops_each_camera(self) -> bool:
        """True for a crop with several cameras. It cannot be applied to cameras that stand side by side already."""
        return bool(self.extra_cameras) and self.crops

    def picture(self, views: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
        """Crop each camera's frames (..., H, W, 3), and place those of extra cameras to the right, scaled to the height.

        `views` are those of `camera` and `extra_cameras`, in that order. Raises ValueError, which begins with the name
        of a view, where it is smaller than the crop.
        """
        return side_by_side([self.crop(frames, name) for frames, name in zip(views, names, strict=True)])


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Strength of GR00T's image augmentation (`agra.data.sampling.augment`). 0, or a crop of 1, turns a change off."""

    crop: float = 0.95  # fraction of height and width that remains
    brightness: float = 0.3  # largest relative change, 0 to 1
    contrast: float = 0.4  # likewise
    saturation: float = 0.5  # likewise
    hue: float = 0.08  # largest turn, as a fraction of the colour circle, 0 to 0.5

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"data.augment.crop: expected a number in (0, 1], got {self.crop}")
        for name, most in (("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"data.augment.{name}: expected 0 to {most}, got {getattr(self, name)}")


CachedName = Literal["latents", "frame_latents", "targets", "frames"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """The datasets, the sampling of windows from them, and the cache of their frozen features.

    The inherited fields describe the single dataset at `path`. With a `mixture` its sources replace them, and `path` is
    the folder that the sources' paths are relative to. Read `sources` or `source`, never the inherited fields. Frame
    size, number of frames and horizon of a window belong to the method.
    """

    mixture: tuple[SourceConfig, ...] = ()
    cache: str = "cache"  # folder of frozen features, shared by all runs
    cached: tuple[CachedName, ...] = ("latents", "frame_latents", "targets", "frames")
    """Features that are read from the cache. Those not listed are computed while training."""
    embodiments: tuple[str, ...] = ("tabletop",)  # an embodiment's position is its row in the embodiment banks
    validation_fraction: float = 0.05  # of each dataset's episodes. The last ones are held out
    early_window_fraction: float = 0.0  # of the windows, which start early in an episode. Not in the paper
    early_window_steps: int = 10  # control steps that count as early
    target_steps: int | None = None  # windows from the first N control steps have teacher targets. Not in the paper
    augment: AugmentConfig | None = None  # of clips that are decoded while training
    shift: int = 0  # largest random shift of training frames, in pixels of the method's frame. Not in the paper

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.early_window_steps < 1:
            raise ValueError(f"data.early_window_steps: expected at least 1, got {self.early_window_steps}")
        if self.target_steps is not None and self.target_steps < 1:
            raise ValueError(f"data.target_steps: expected at least 1 or None, got {self.target_steps}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction: expected a number in [0, 1), got {self.validation_fraction}")
        if not 0 <= self.early_window_fraction <= 1:
            raise ValueError(
                f"data.early_window_fraction: expected a number in [0, 1], got {self.early_window_fraction}"
            )
        if not self.embodiments or len(set(self.embodiments)) != len(self.embodiments):
            raise ValueError(f"data.embodiments: expected one or more distinct names, got {self.embodiments}")
        if self.augment is not None and self.cached:
            raise ValueError(
                f"data.augment: cached features are not augmented; set data.cached to an empty list, got {self.cached}"
            )
        if self.shift < 0:
            raise ValueError(f"data.shift: expected at least 0, got {self.shift}")
        if self.shift and (fixed := [name for name in self.cached if name != "frames"]):
            raise ValueError(
                f"data.shift: cached {fixed[0]} are not shifted; set data.cached to frames, from which everything else is "
                "computed while training"
            )
        unnamed = [source.path for source in self.mixture if not source.embodiment]
        if unnamed:
            raise ValueError(
                f"data.mixture: source {unnamed[0]!r} has no embodiment; set it for every source of a mixture"
            )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The datasets to sample."""
        return self.mixture or (self,)

    @property
    def root(self) -> str:
        """The folder that the sources' paths are relative to. Empty without a mixture."""
        return self.path if self.mixture else ""

    def source(self, embodiment: str) -> SourceConfig:
        """The first source of an embodiment. Its cameras, crop and prefixes define the observations of a policy."""
        return next((source for source in self.mixture if source.embodiment == embodiment), self)
