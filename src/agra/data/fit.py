"""Fitting of a recipe to one dataset: the settings that the dataset itself determines."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from agra.data.config import EGO_VIEW, DataConfig
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.layout import DatasetLayout
from agra.data.lerobot.modality import Modality
from agra.data.normalization.normalize import QUANTITIES, NormalizedPart
from agra.hub import dataset_folder
from agra.methods.method import MethodConfig
from agra.wam.text import MiniLMEncoder, TextConfig

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings that fit a dataset."""

    method: MethodConfig
    data: DataConfig
    changes: tuple[str, ...] = ()
    """The settings that changed, in words."""


def fit_to_dataset(method: MethodConfig, data: DataConfig, *, keep_embodiments: bool = False) -> Fit:
    """Adopt the camera, the robot, the widths and the instruction length of the dataset at `data.path`.

    - camera: the dataset's only one, where it has no ego view.
    - embodiments: the dataset's robot type, where the recipe's do not include it, unless `keep_embodiments`. The
      recipe's choice of windows belongs to its own robots, so windows then come from whole episodes.
    - state and action widths, and the length of MiniLM's instructions: raised to the dataset's, never lowered.

    A mixture names all of this for each source and is returned unchanged. Raises ValueError where the dataset has
    several cameras and none is chosen, and the errors of `LeRobotDataset`.
    """
    if data.mixture or not data.path:
        return Fit(method=method, data=data)
    changes = []
    if (camera := _camera(data)) != data.camera:
        data = replace(data, camera=camera)
        changes.append(f"camera {camera}")
    dataset = LeRobotDataset.of(data)
    if dataset.embodiment not in data.embodiments and not keep_embodiments:
        data = replace(data, embodiments=(dataset.embodiment,), early_window_fraction=0.0, target_steps=None)
        changes.append(f"embodiment {dataset.embodiment}, windows from whole episodes")
    for quantity in QUANTITIES:
        size = sum(key.size for key in dataset.keys[quantity])
        whole = NormalizedPart(name=quantity, start=0, end=size, method=data.normalization)
        width = sum(part.width for part in dataset.parts(quantity) or (whole,))
        if width > getattr(method.shapes, name := f"{quantity}_dim"):
            method = _replaced(method, object, **{name: width})
            changes.append(f"{width} {quantity} dimensions")
    if method.text is not None and method.text.kind == "minilm":
        texts = list(dict.fromkeys(dataset.layout.tasks.values()))
        longest = MiniLMEncoder.longest(texts)
        if longest > method.text.length:
            method = _replaced(method, TextConfig, length=longest)
            changes.append(f"instructions of up to {longest} tokens")
    return Fit(method=method, data=data, changes=tuple(changes))


def _camera(data: DataConfig) -> str:
    """Return the camera to read: the chosen one, or the only one instead of a missing ego view."""
    layout = DatasetLayout.read(dataset_folder(data.path, data.revision))
    cameras = layout.names("video", "image")
    known = {*cameras, *Modality.read(layout.root, layout.info["features"]).video}
    if data.camera != EGO_VIEW or EGO_VIEW in known:
        return data.camera
    if len(cameras) == 1:
        return cameras[0]
    raise ValueError(
        f"{data.path}: {len(cameras)} cameras ({', '.join(cameras) or 'none'}); choose one with --data.camera NAME, or "
        "put several side by side with --data.camera NAME --data.extra-cameras NAME ..."
    )


def _replaced(config: Config, kind: type, **changes: Any) -> Config:
    """Replace fields in every dataclass of `kind` within a config that has them."""
    assert is_dataclass(config)
    inner = {f.name: getattr(config, f.name) for f in fields(config)}
    new = {name: _replaced(value, kind, **changes) for name, value in inner.items() if is_dataclass(value)}
    if isinstance(config, kind):
        new |= {name: value for name, value in changes.items() if name in inner}
    return replace(config, **new)  # type: ignore[return-value]
