"""Reads checkpoints of earlier layouts as the present one: their configs, and the names of their tensors.

Until version 0.1 a config had the sections `model` and `alignment`, and a stage with the WAM's own fields. The three
networks lay in one file `model.safetensors`, projectors had no prefix, and AdamW's moments were named after the root
module.
"""

import re
from collections.abc import Mapping
from typing import Any

_DATA = {"tile": "extra_cameras", "lacks": "missing_keys", "every": "row_stride"}
_STAGE = {"warmup_share": "warmup_ratio"}
_OBJECTIVE = {"video_share": "video_batch_fraction"}
_MONITOR = {"draws": "background_sets"}
_EVERYTHING = ["latents", "targets"]
"""`data.cached` of a run that cached all of its features."""
_PROJECTOR = re.compile(r"\d+\.")


def current_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config's JSON values to the present layout. Values in the present layout are returned unchanged."""
    if "method" in values or "model" not in values:
        return dict(values)
    stage = _renamed(values["stage"], _STAGE)
    objective = _renamed(stage.pop("objective", {}), _OBJECTIVE)
    video_rate, action_rate = stage.pop("video_lr", 1e-4), stage.pop("action_lr", 1e-4)
    stage["learning_rate"] = action_rate
    stage["learning_rate_by_part"] = {} if video_rate == action_rate else {"video_dit": video_rate}
    trains_video = stage.pop("train_video_dit", True)
    stage["frozen"] = ["bridge", "action_dit"] if stage["name"] == "adapt" else [] if trains_video else ["video_dit"]
    return {
        "method": {
            "kind": "wam",
            "model": _current_model(values["model"]),
            "alignment": values["alignment"],
            "objective": objective,
        },
        "data": _current_data(values["data"]),
        "stage": stage,
        "visual_reliance": values.get("looking"),
        "monitor": _renamed(values.get("monitor", {}), _MONITOR),
    }


def current_name(stored: str) -> str:
    """Convert a stored tensor's name to the present layout."""
    moment, slash, name = stored.rpartition("/")
    name = name.removeprefix("wam.")
    if _PROJECTOR.match(name):
        name = f"projectors.{name}"
    return f"{moment}{slash}{name}"


def _current_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Before `bank_init_std` was a field, banks were initialised with 1 / sqrt(inputs), which is None now."""
    return {**values, "action_dit": {"bank_init_std": None, **values["action_dit"]}}


def _current_data(values: Mapping[str, Any]) -> dict[str, Any]:
    data = _renamed(values, _DATA)
    if "mixture" in data:
        data["mixture"] = [_current_data(source) for source in data["mixture"]]
    if data.get("cached") == _EVERYTHING:  # as the present default does, which lists the features of other methods too
        del data["cached"]
    return data


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}
