"""What is read of a dataset, and how: the settings of one source of training data."""

from dataclasses import dataclass
from typing import Literal

from agra.data.normalize import METHODS, Method

EGO_VIEW = "observation.images.ego_view"
PastEnd = Literal["repeat", "mask", "inside"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A LeRobot dataset of any version: what is read of it, and which windows are drawn from it.

    `state` and `action` list keys of the dataset's `meta/modality.json` in the order that the model sees them, or names
    of whole columns, each as KEY or KEY:METHOD; empty means the whole of `observation.state` or `action`.
    """

    path: str = ""  # a folder, or a hub id OWNER/NAME[/FOLDER]
    revision: str | None = None  # of a hub id
    embodiment: str = ""  # instead of the dataset's own `robot_type`
    camera: str = EGO_VIEW  # a feature, or its name in modality.json
    tile: tuple[str, ...] = ()  # more cameras, set to the right of it and scaled to its height
    crop_rows: tuple[int, int] | None = None  # [first, end) of the recorded frame, cropped before anything resizes it
    crop_columns: tuple[int, int] | None = None
    state: tuple[str, ...] = ()
    action: tuple[str, ...] = ()
    relative: tuple[str, ...] = ()  # keys of `action` that are movements: past an episode's end they are 0
    lacks: tuple[str, ...] = ()  # keys that the embodiment has and this dataset has not: zeros, masked out of the loss
    normalization: Method = "min_max"  # of the keys that name no method
    instruction_key: str = ""  # an annotation column of task numbers instead of `task_index`
    strip_prefixes: tuple[str, ...] = ()  # what an instruction may begin with and is taken off
    every: int = 1  # keep every n-th row: a lower control rate, for absolute actions only
    frame_stride: int = 1  # control steps between a window's frames: 1 in simulation, 3 on the robot
    horizon: int | None = None  # actions of a window that are learned; None: the model's
    past_end: PastEnd = "repeat"  # past the episode: repeat the last row, mask those actions, or draw no such window
    training_episodes: int | None = None  # train on the first so many episodes only
    weight: float = 1.0  # share of the windows, relative to the other sources

    def __post_init__(self) -> None:
        for name in ("every", "frame_stride", "horizon", "training_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"data.{name}: expected at least 1, got {value}")
        for name in ("crop_rows", "crop_columns"):
            span = getattr(self, name)
            if span is not None and not 0 <= span[0] < span[1]:
                raise ValueError(f"data.{name}: expected 0 <= first < end, got {span}")
        if not self.weight > 0:
            raise ValueError(f"data.weight: expected a positive share, got {self.weight}")
        if self.normalization not in METHODS:
            raise ValueError(f"data.normalization: expected one of {', '.join(METHODS)}, got {self.normalization!r}")
        if self.past_end not in ("repeat", "mask", "inside"):
            raise ValueError(f"data.past_end: expected repeat, mask or inside, got {self.past_end!r}")
        for quantity in ("state", "action"):
            names = [name for name, _ in self.keys(quantity)]
            if len(set(names)) != len(names):
                raise ValueError(f"data.{quantity}: expected different keys, got {', '.join(names)}")
        known = {name for quantity in ("state", "action") for name, _ in self.keys(quantity)}
        for name in ("lacks", "relative"):
            unknown = [key for key in getattr(self, name) if key not in known]
            if unknown:
                raise ValueError(f"data.{name}: {unknown[0]!r} is none of the keys of state and action")
        if self.relative and self.every > 1:
            raise ValueError(f"data.every: {self.every} would leave out movements of the relative keys {self.relative}")

    def keys(self, quantity: str) -> tuple[tuple[str, Method], ...]:
        """(key, method) of "state" or "action", in order. Raises ValueError for an unknown method."""
        found = []
        for spelled in getattr(self, quantity):
            name, _, method = spelled.partition(":")
            method = method or self.normalization
            if not name or method not in METHODS:
                raise ValueError(
                    f"data.{quantity}: expected KEY or KEY:METHOD with a method of {', '.join(METHODS)}, got {spelled!r}"
                )
            found.append((name, method))
        return tuple(found)
