"""Conversion of LeRobot datasets to the flavour that GR00T's fine-tuning reads: v2.1 with names in meta/modality.json.

GR00T's loader needs a name for every part of state and action, for every camera, and a column of task numbers whose
name begins with `annotation.`. Source: NVIDIA/Isaac-GR00T, `getting_started/data_preparation.md`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from agra.data.importers.lerobot_versions import convert
from agra.data.lerobot.json_parquet import read_json, read_json_lines, read_table, write_json, write_json_lines
from agra.data.lerobot.layout import EPISODES_STATS, INFO, STATS, DatasetLayout
from agra.data.lerobot.modality import ACTION, MODALITY, STATE, Modality, size

INSTRUCTION = "human.task_description"
"""Name of the instruction where the source has none. Its column is `annotation.human.task_description`."""


def convert_to_groot(source: str | Path, output: Path) -> Path:
    """Write the dataset `source` (a folder or a hub id) in GR00T's flavour into the new folder `output`.

    Names of the source's modality.json stay. Without them state and action are one part each, `state` and `action`, a
    camera has the last part of its feature's name, and the instruction is `human.task_description`. Raises the errors
    of `agra.data.importers.lerobot_versions.convert`, and ValueError where state, action or video is missing.
    """
    return convert(source, output, "v2.1", finish=_complete)


def _complete(root: Path) -> None:
    """Add what GR00T's loader needs to a dataset of v2.1."""
    layout = DatasetLayout.read(root)
    features = dict(layout.info["features"])
    cameras = layout.names("video")
    for kind, names in (("observation.state", STATE in features), ("action", ACTION in features), ("video", cameras)):
        if not names:
            raise ValueError(f"{root}: GR00T's loader needs a feature {kind}; available: {', '.join(features)}")
    stored = Modality.read(root, features)
    raw = read_json(root / MODALITY) if stored.path.is_file() else {}
    names = {
        "state": raw.get("state") or {"state": {"start": 0, "end": size(features[STATE])}},
        "action": raw.get("action") or {"action": {"start": 0, "end": size(features[ACTION])}},
        "video": raw.get("video") or {c.rpartition(".")[2]: {"original_key": c} for c in cameras},
        "annotation": raw.get("annotation") or {INSTRUCTION: {"original_key": f"annotation.{INSTRUCTION}"}},
    }
    if not stored.annotation:
        _copy_task_numbers(layout, f"annotation.{INSTRUCTION}")
    write_json(root / MODALITY, dict(raw) | names)


def _copy_task_numbers(layout: DatasetLayout, name: str) -> None:
    """Add the column `name` with the values and the statistics of `task_index`."""
    root = layout.root
    for entry in layout.entries:
        table = read_table(entry.data)
        pq.write_table(table.append_column(name, table["task_index"]), entry.data)
    features = layout.info["features"]
    write_json(root / INFO, dict(layout.info) | {"features": _with_copy(features, name)})
    write_json(root / STATS, _with_copy(read_json(root / STATS), name))
    rows = read_json_lines(root / EPISODES_STATS)
    write_json_lines(root / EPISODES_STATS, [row | {"stats": _with_copy(row["stats"], name)} for row in rows])


def _with_copy(entries: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(entries) | {name: entries["task_index"]}
