"""Checkpoints of earlier layouts, read as the present one: their configs and the names of their tensors. Written once.

Until version 0.1 a config had `model`, `alignment` and a stage with the WAM's own fields. The three networks lay in one file
`model.safetensors`, projectors had no prefix, and moments were named after the root module.
"""

import re
from collections.abc import Mapping
from typing import Any

_DATA = {"tile": "extra_cameras", "lacks": "missing_keys", "every": "row_stride"}
_STAGE = {"warmup_share": "warmup_ratio"}
_PROJECTOR = re.compile(r"\d+\.")


def current_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values in the present layout; those of the present layout as they are."""
    if "method" in values or "model" not in values:
        return dict(values)
    stage = {_STAGE.get(name, name): value for name, value in values["stage"].items()}
    objective = dict(stage.pop("objective", {}))
    if "video_share" in objective:
        objective["video_batch_fraction"] = objective.pop("video_share")
    video_rate, action_rate = stage.pop("video_lr", 1e-4), stage.pop("action_lr", 1e-4)
    stage["learning_rate"] = action_rate
    stage["learning_rate_by_part"] = {} if video_rate == action_rate else {"video_dit": video_rate}
    trains_video = stage.pop("train_video_dit", True)
    stage["frozen"] = ["bridge", "action_dit"] if stage["name"] == "adapt" else [] if trains_video else ["video_dit"]
    method = {"kind": "wam", "model": values["model"], "alignment": values["alignment"], "objective": objective}
    monitor = dict(values.get("monitor", {}))
    if "draws" in monitor:
        monitor["background_sets"] = monitor.pop("draws")
    return {
        "method": method,
        "data": _current_data(values["data"]),
        "stage": stage,
        "visual_reliance": values.get("looking"),
        "monitor": monitor,
    }


def _current_data(values: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {_DATA.get(name, name): value for name, value in values.items()}
    if "mixture" in renamed:
        renamed["mixture"] = [_current_data(source) for source in renamed["mixture"]]
    return renamed


def current_name(stored: str) -> str:
    """A tensor's name in the present layout."""
    moment, slash, name = stored.rpartition("/")
    name = name.removeprefix("wam.")
    if _PROJECTOR.match(name):
        name = f"projectors.{name}"
    return f"{moment}{slash}{name}"
