"""`agra doctor`: checks of a dataset for problems that make reading fail or training worse.

An error makes reading fail or return wrong data. A warning makes training worse. A note is information only. The
warnings cover the data issues of docs/paper.md section 3: padding, angles, prefixes, windows past the end.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from agra.data.config import SourceConfig
from agra.data.doctor import array_checks
from agra.data.lerobot.checksums import CHECKSUMS, dataset_files
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.decoding import inspect_video
from agra.data.lerobot.json_parquet import read_json, read_table
from agra.data.lerobot.layout import EPISODES_STATS, STATS
from agra.data.normalization.dataset_statistics import describe_stream
from agra.hub import dataset_folder

Level = Literal["error", "warning", "note"]
_DECODED_EPISODES = 3  # without --every-frame


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One result of a check: its level, the check, the place, and a message with the remedy."""

    level: Level
    check: str
    where: str
    message: str


@dataclass(frozen=True, kw_only=True)
class HealthReport:
    """The findings of all checks of a dataset, and facts about it."""

    path: str
    facts: Mapping[str, Any]
    findings: tuple[Finding, ...]
    cameras: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_json(self) -> str:
        """Return the report as JSON."""
        content = {"path": self.path, "healthy": self.healthy, "facts": dict(self.facts)}
        return json.dumps(content | {"findings": [asdict(f) for f in self.findings]}, indent=2, ensure_ascii=False)

    def print(self) -> None:
        """Print the report as a table."""
        console = Console()
        console.print(
            f"{self.path}: {', '.join(f'{value} {name}' for name, value in self.facts.items()) or 'unreadable'}"
        )
        table = Table("level", "check", "where", "message")
        for finding in self.findings:
            table.add_row(finding.level, finding.check, finding.where, finding.message)
        console.print(table if self.findings else "no findings")


def check_dataset(path: str | Path, *, camera: str | None = None, every_frame: bool = False) -> HealthReport:
    """Check a dataset with all of its cameras, or with one. Damage becomes a finding, not an exception.

    Three episodes are decoded, or all with `every_frame`.
    """
    try:
        root = dataset_folder(str(path))
        first = LeRobotDataset(root, source=SourceConfig(camera=camera or _any_camera(root)))
    except (ValueError, OSError) as error:
        return HealthReport(path=str(path), facts={}, findings=(_error("metadata", str(path), error),))
    rows, broken = _read_rows(first)
    findings = [
        *_files(first),
        *broken,
        *(_numbers(first, rows) if rows else ()),
        *_statistics(first, rows),
        *_instructions(first, rows),
        *_times(first, rows),
    ]
    for name in [camera] if camera else first.layout.names("video", "image"):
        findings += _pictures(first, name, every_frame)
    order = {"error": 0, "warning": 1, "note": 2}
    facts = {
        "episodes": first.num_episodes,
        "rows": int(first.lengths.sum()),
        "frames/s": first.fps,
        "version": first.layout.version,
    }
    return HealthReport(
        path=str(path),
        facts=facts,
        findings=tuple(sorted(findings, key=lambda f: order[f.level])),
        cameras=tuple(first.layout.names("video", "image")),
    )


def _any_camera(path: Path) -> str:
    """Return a camera to open the dataset with. Without one, "" makes opening raise the error."""
    info = path / "meta/info.json"
    features = read_json(info).get("features") if info.is_file() else None
    if not isinstance(features, dict):
        return ""
    return next((n for n, f in features.items() if isinstance(f, dict) and f.get("dtype") in ("video", "image")), "")


def _error(check: str, where: str, error: Exception) -> Finding:
    return Finding(level="error", check=check, where=where, message=" ".join(str(error).split()))


def _warning(check: str, where: str, message: str) -> Finding:
    return Finding(level="warning", check=check, where=where, message=message)


def _note(check: str, where: str, message: str) -> Finding:
    return Finding(level="note", check=check, where=where, message=message)


def _files(dataset: LeRobotDataset) -> Iterator[Finding]:
    """Check for changed, empty and unused files."""
    layout = dataset.layout
    used = {e.data for e in layout.entries} | {path for e in layout.entries for path, _ in e.videos.values()}
    for name in dataset_files(dataset.path):
        path = dataset.path / name
        if path.stat().st_size == 0:
            yield Finding(level="error", check="files", where=name, message="is empty; copy the file again")
        if not name.startswith("meta/") and path not in used and not name.startswith("videos/"):
            yield _note("files", name, "no episode uses this file")
    for name in dataset.seal.names:
        try:
            dataset.seal.verify(dataset.path / name)
        except (ValueError, OSError) as error:
            yield _error("checksum", name, error)
    if not dataset.seal.checksums:
        yield _note(
            "checksum",
            CHECKSUMS,
            "missing, so damage that still decodes is not detected; add them with agra doctor --seal",
        )
    if not dataset.info.get("robot_type") or dataset.info["robot_type"] == "unknown":
        yield _note("embodiment", "meta/info.json", "robot_type is not set; name the robot with data.embodiment")


def _read_rows(dataset: LeRobotDataset) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], list[Finding]]:
    """Return (states, actions) of every readable episode, and one error for each unreadable file."""
    rows, broken = {}, {}
    for index, entry in enumerate(dataset.layout.entries):
        if entry.data in broken:
            continue
        try:
            rows[index] = dataset.states(index), dataset.actions(index)
        except (ValueError, OSError) as error:
            name = entry.data.relative_to(dataset.path).as_posix()
            broken[entry.data] = _error("rows", name, error)
    return rows, list(broken.values())


def _numbers(dataset: LeRobotDataset, rows: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Iterator[Finding]:
    names = {"observation.state": dataset.state_names, "action": dataset.action_names}
    episodes = list(rows)
    for index, (quantity, dimensions) in enumerate(names.items()):
        values = [pair[index] for pair in rows.values()]
        statistics = describe_stream(lambda values=values: iter(values))
        constant = array_checks.constant_dimensions(statistics["min"], statistics["max"])
        if constant:
            listed = ", ".join(dimensions[i] for i in constant[:8]) + (" ..." if len(constant) > 8 else "")
            message = (
                f"constant: {listed} ({len(constant)} of {len(dimensions)}); "
                "leave them out with data.state or data.action"
            )
            yield _warning("constant", quantity, message)
        for jump in array_checks.jumps(values):
            advice = (
                "the angle wraps; normalise it with sin_cos"
                if array_checks.is_turn(jump.size)
                else "check the recording"
            )
            where = f"{quantity} {dimensions[jump.dimension]}, episode {episodes[jump.episode]}, step {jump.step}"
            yield _warning("jump", where, f"jumps by {jump.size:.3g}, usually by less than {jump.usual:.3g}; {advice}")
        for dimension in array_checks.squeezed_dimensions(statistics):
            low, high = statistics["min"][dimension], statistics["max"][dimension]
            inner = statistics["q01"][dimension], statistics["q99"][dimension]
            message = (
                f"98 % of the values are in [{inner[0]:.3g}, {inner[1]:.3g}], all in [{low:.3g}, {high:.3g}]; "
                "normalise with q01_q99"
            )
            yield _warning("outliers", f"{quantity} {dimensions[dimension]}", message)
        for dimension in array_checks.rare_dimensions(statistics):
            usual, low, high = (statistics[name][dimension] for name in ("q01", "min", "max"))
            message = (
                f"98 % of the values are {usual:.3g}, all are in [{low:.3g}, {high:.3g}]; "
                "do not normalise with q01_q99, which would make it constant"
            )
            yield _note("rare", f"{quantity} {dimensions[dimension]}", message)
    ahead = array_checks.lag([pair[0] for pair in rows.values()], [pair[1] for pair in rows.values()])
    if ahead is not None and not 1 <= ahead[0] <= 8:
        relation = (
            "equal the states of their step" if ahead[0] == 0 else f"resemble the states {ahead[0]:+d} steps away"
        )
        message = f"actions {relation} (similarity {ahead[1]:.3f}); expected commands 1 to 8 steps ahead of the states"
        yield _warning("alignment", "action", message)


def _statistics(dataset: LeRobotDataset, rows: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Iterator[Finding]:
    """Compare the dataset's stored statistics with those of its rows."""
    if len(rows) != dataset.num_episodes or not rows:
        return
    if not (dataset.path / STATS).is_file():
        if not (dataset.path / EPISODES_STATS).is_file():
            yield _note("statistics", STATS, "missing; training computes its own")
        return
    try:
        stored = dataset.stats
    except (ValueError, OSError, AttributeError) as error:
        yield _error("statistics", STATS, error)
        return
    for index, quantity in enumerate(("observation.state", "action")):
        exact = describe_stream(lambda index=index: (pair[index] for pair in rows.values()))
        try:
            different = array_checks.disagreement(dict(stored.get(quantity, {})), exact)
        except (ValueError, IndexError) as error:  # of another length
            yield _error("statistics", f"{STATS}, {quantity}", error)
            continue
        if different:
            name, dimension, stored_value, value = different
            message = f"{name} of dimension {dimension} is {stored_value:.6g}, but {value:.6g} over the rows"
            yield _warning("statistics", f"{STATS}, {quantity}", message)


def _instructions(dataset: LeRobotDataset, rows: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Iterator[Finding]:
    episodes_by_text: dict[str, list[int]] = {}
    for index in rows:
        try:
            for text in dataset.instructions(index):
                episodes_by_text.setdefault(text, []).append(index)
        except (ValueError, OSError) as error:
            yield _error("instruction", f"episode {index}", error)
    for text, episodes in episodes_by_text.items():
        if not text.strip():
            yield _warning("instruction", _episodes(episodes), "is empty")
    if len(episodes_by_text) == 1 and len(rows) > 1:
        text = next(iter(episodes_by_text))
        yield _warning("instruction", "all episodes", f"all are {text!r}, so a policy can ignore the instruction")
    prefixes = {text.split(":", 1)[0] + ": " for text in episodes_by_text if ": " in text[:40]}
    for prefix in sorted(prefixes):
        yield _warning("instruction", "tasks", f"begin with {prefix!r}; remove it with data.strip-prefixes")


def _times(dataset: LeRobotDataset, rows: Mapping[int, Any]) -> Iterator[Finding]:
    """Compare timestamps with frame numbers, and check the lengths of episodes."""
    if "timestamp" in dataset.features:
        fps, worst, where = dataset.info["fps"], 0.0, ""
        for path in dict.fromkeys(dataset.layout.entries[index].data for index in rows):
            table = read_table(path, ["timestamp", "episode_index"], max_rows=dataset.layout.rows)
            times = np.asarray(table["timestamp"].to_numpy(), dtype=np.float64).ravel()
            indices = table["episode_index"].to_numpy()
            for episode in np.unique(indices):
                elapsed = times[indices == episode] - times[indices == episode][0]
                drift = np.abs(elapsed - np.arange(len(elapsed)) / fps).max()
                if drift > worst:
                    worst, where = float(drift), f"episode {episode}"
        if worst > 0.5 / fps:
            yield _warning(
                "timestamps", where, f"differ by {worst:.3f} s from {fps:g} rows/s: rows are missing or late"
            )
        elif worst > 1e-4 + 1e-6 * float(dataset.lengths.max()):
            yield _note("timestamps", where, f"drift by {worst:.4f} s, less than half a control step")
    short = [int(i) for i in np.flatnonzero(dataset.lengths < 17)]
    if short:
        message = "shorter than a window of 17 frames, which would repeat the last row (see data.past-end)"
        yield _note("length", _episodes(short), message)


def _pictures(dataset: LeRobotDataset, camera: str, every_frame: bool) -> Iterator[Finding]:
    """Compare a camera's files with the rows, and decode some episodes."""
    expected: dict[Path, float] = {}
    for entry in dataset.layout.entries:
        if camera in entry.videos:
            path, start = entry.videos[camera]
            expected[path] = max(expected.get(path, 0), start * dataset.info["fps"] + entry.length)
    broken = set()
    for path, count in expected.items():
        name = path.relative_to(dataset.path).as_posix()
        try:
            frames, _, rate = inspect_video(path)
        except (ValueError, OSError) as error:
            broken.add(path)
            yield _error("video", name, error)
            continue
        if frames < round(count):
            yield Finding(
                level="error", check="video", where=name, message=f"has {frames} frames, expected {count:.0f}"
            )
        elif frames > round(count):
            yield _note("video", name, f"has {frames} frames, expected {count:.0f}; no episode uses the rest")
        if abs(rate - dataset.info["fps"]) > 0.01 * dataset.info["fps"]:
            yield _warning(
                "video", name, f"has {rate:.2f} frames/s, expected {dataset.info['fps']:g} from meta/info.json"
            )
    view = LeRobotDataset(dataset.path, source=replace(dataset.source, camera=camera))
    decoded = range(view.num_episodes)
    if not every_frame:
        decoded = sorted({*np.linspace(0, view.num_episodes - 1, _DECODED_EPISODES).round().astype(int).tolist()})
    yield from _frames(view, camera, decoded, broken)


def _frames(view: LeRobotDataset, camera: str, episodes: Sequence[int], broken: set[Path]) -> Iterator[Finding]:
    """Decode episodes, and check for frozen frames, padding and the aspect ratio."""
    rows: set[tuple[int, int]] = set()
    size = (0, 0)
    damaged: dict[str, list[int]] = {}
    for index in episodes:
        entry = view.layout.entries[index]
        if camera in entry.videos and entry.videos[camera][0] in broken:
            continue
        try:
            frames = view.frames(index)
        except (ValueError, OSError) as error:
            damaged.setdefault(" ".join(str(error).split()), []).append(index)
            continue
        if array_checks.frozen(frames):
            yield _warning("frames", f"{camera}, episode {index}", "all frames are the same picture")
        rows.add(array_checks.content_rows(frames))
        size = frames.shape[1], frames.shape[2]
    for message, indices in damaged.items():
        yield Finding(level="error", check="frames", where=f"{camera}, {_episodes(indices)}", message=message)
    if rows and size[0]:
        first, end = min(r[0] for r in rows), max(r[1] for r in rows)
        if first > 2 or end < size[0] - 2:
            message = f"rows above {first} and from {end} on are padding; crop them with data.crop-rows {first} {end}"
            yield _warning("padding", camera, message)
        stretch = (size[1] / (end - first)) / (336 / 192)
        if not 0.77 < stretch < 1.3:
            message = f"{end - first} x {size[1]} is stretched in width by {1 / stretch:.2f} to fit 192 x 336"
            yield _note("aspect", camera, message)


def _episodes(indices: Sequence[int]) -> str:
    listed = ", ".join(map(str, indices[:5])) + (" ..." if len(indices) > 5 else "")
    return f"episode{'s' if len(indices) > 1 else ''} {listed}"
