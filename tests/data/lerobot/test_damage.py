"""Damaged datasets: each reads right or fails with an error that names the file. None hangs, none gives wrong samples.

Unsealed, a flipped bit may change a number or a pixel and nothing more, and the text of an annotation stands in one place
only: no reader can know. Those are counted apart, and must not happen where the dataset is sealed.
"""

import json
import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest

from agra.data.config import SourceConfig
from agra.data.gr1 import gr1_source
from agra.data.lerobot.checksums import seal
from agra.data.lerobot.dataset import LeRobotDataset
from tests.support.layouts import CAMERAS, write_gr1, write_v2, write_v3

WRITERS = {
    "v2.0": lambda root: write_v2(root, "v2.0"),
    "v2.1": lambda root: write_v2(root, "v2.1"),
    "v3.0": write_v3,
    "v3.0 images": lambda root: write_v3(root, "image"),
    "gr1": write_gr1,
}
KINDS = ("truncated", "flipped", "missing", "swapped", "metadata")


def read(root, name):
    """Everything that training would see of a dataset."""
    views = [gr1_source("")] if name == "gr1" else [SourceConfig(camera=camera) for camera in CAMERAS]
    values = []
    for view in views:
        dataset = LeRobotDataset(root, source=view)
        for index in range(dataset.num_episodes):
            episode = dataset.episode(index)
            values += [
                episode.frames,
                episode.states,
                episode.actions,
                np.array([episode.instruction, str(episode.fps)]),
            ]
    return values


def damage(root, kind, rng):
    """Spoil one file, or two; returns what was done to it."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    if kind == "metadata":
        return _change_metadata(root, rng)
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: rng.integers(len(content))])
    elif kind == "flipped":
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
    elif kind == "missing":
        path.unlink()
    else:
        candidates = [p for p in files if p != path and p.suffix == path.suffix]
        if not candidates:
            path.unlink()
            return f"missing {path.name}"
        other = candidates[rng.integers(len(candidates))]
        content, other_content = path.read_bytes(), other.read_bytes()
        path.write_bytes(other_content)
        other.write_bytes(content)
    return f"{kind} {path.relative_to(root)}"


def _change_metadata(root, rng):
    """One value somewhere in what reading relies on becomes another number, another type, or nothing."""
    names = ("meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl")
    path = [root / name for name in names if (root / name).is_file()]
    path = path[rng.integers(len(path))]
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    line = rng.integers(len(lines))
    value = json.loads(lines[line])
    holder, key = value, None
    while True:
        # What a robot, its joints and its splits are called, no file contradicts.
        free = ("robot_type", "names", "splits", "info", "video_info", "total_tasks", "total_chunks", "total_videos")
        inside = [k for k in (holder if isinstance(holder, dict) else range(len(holder))) if k not in free]
        if not inside:
            return "nothing"
        key = inside[rng.integers(len(inside))]
        if not isinstance(holder[key], dict | list) or not holder[key] or rng.random() < 0.2:
            break
        holder = holder[key]
    choices = [None, -1, 0, 7, 10**12, "x", [], {}, 3.5, True]
    if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        choices += [holder[key] * 2, holder[key] + 1, holder[key] / 2]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = choices[rng.integers(len(choices))]
    lines[line] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name}: {key!r} changed"


def same(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


def _too_long(number, frame):
    raise AssertionError("reading hangs")


def run(tmp_path, count, seed):
    """Counts of (sealed, kind, outcome), and of (outcome, layout, what was done, sealed) where it is neither right nor
    an error that names a file; raises where reading takes 20 s."""
    whole, roots = {}, {}
    for name, write in WRITERS.items():
        roots[name] = write(tmp_path / name / "set")
        whole[name] = read(roots[name], name)
    rng, outcomes = np.random.default_rng(seed), Counter()
    previous = signal.signal(signal.SIGALRM, _too_long)
    for number in range(count):
        name, kind = list(WRITERS)[rng.integers(len(WRITERS))], KINDS[number % len(KINDS)]
        sealed = bool(rng.integers(2))
        copy = tmp_path / "copy"
        shutil.copytree(roots[name], copy)
        if sealed:
            seal(copy)
        done = damage(copy, kind, rng)
        signal.alarm(20)
        try:
            outcome = "right" if same(read(copy, name), whole[name]) else "wrong"
        except (ValueError, FileNotFoundError) as error:
            outcome = "named" if str(copy) in str(error) else f"unnamed: {error!r}"
        finally:
            signal.alarm(0)
            shutil.rmtree(copy)
        if outcome not in ("right", "named"):
            outcomes[outcome, name, done, sealed] += 1
        outcomes[sealed, kind, outcome] += 1
    signal.signal(signal.SIGALRM, previous)
    return outcomes


def check(outcomes):
    assert [key for key in outcomes if str(key[0]).startswith("unnamed")] == []
    wrong = [key for key in outcomes if key[0] == "wrong"]
    undetectable = [
        key for key in wrong if key[2].startswith("flipped") or key[1:3] == ("gr1", "tasks.jsonl: 'task' changed")
    ]
    assert [key for key in wrong if key[3] or key not in undetectable] == []
    for kind in KINDS:
        assert outcomes[True, kind, "named"] > 0, kind


def test_a_hundred_damaged_datasets(tmp_path):
    check(run(tmp_path, 100, seed=0))


@pytest.mark.slow
def test_a_thousand_damaged_datasets(tmp_path):
    outcomes = run(tmp_path, int(os.environ.get("DAMAGED", 1000)), seed=1)
    print()
    for key, count in sorted(outcomes.items(), key=str):
        print(*key, count)
    check(outcomes)
