import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict

import numpy as np
import pytest
from safetensors import safe_open

from agra.data.config import SourceConfig
from agra.data.features.cache import CachedFeature, cache_features, estimate_cost, feature_folder, save_arrays
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.lerobot.checksums import seal
from agra.data.lerobot.dataset import LeRobotDataset
from agra.data.lerobot.writer import write_dataset
from agra.types import Embodiment, Episode
from tests.support.full_disk import file_size_limit

ROBOT = Embodiment(name="bot", state_names=("a",), action_names=("u",))
LENGTHS = (6, 9, 4)


class Brightness:
    """The mean of every column of a frame, and of the frame. Counts the computed episodes."""

    name = "brightness"

    def __init__(self, gain: float = 1.0) -> None:
        self.gain, self.computed = gain, 0

    @property
    def key(self) -> dict[str, float]:
        return {"gain": self.gain}

    def compute(self, episode: Episode) -> dict[str, np.ndarray]:
        self.computed += 1
        means = episode.frames.mean((1, 3)) * self.gain  # (N, W)
        return {"brightness": means.astype(np.float16), "whole": means.mean(1).astype(np.float32)}


class Words(Brightness):
    name = "words"

    def compute(self, episode: Episode) -> dict[str, np.ndarray]:
        self.computed += 1
        return {"words": np.array([[len(word)] for word in episode.instruction.split()], dtype=np.float16)}


@pytest.fixture
def dataset(tmp_path) -> LeRobotDataset:
    rng = np.random.default_rng(0)
    episodes = [
        Episode(
            frames=rng.integers(0, 255, (n, 16, 16, 3), dtype=np.uint8),
            states=rng.normal(size=(n, 1)),
            actions=rng.normal(size=(n, 1)),
            instruction="put it there",
            embodiment="bot",
            fps=10,
        )
        for n in LENGTHS
    ]
    write_dataset(tmp_path / "set", episodes, embodiment=ROBOT, fps=10)
    return LeRobotDataset(tmp_path / "set")


def test_values_and_partial_reads(dataset, tmp_path):
    feature = Brightness()
    (path,) = cache_features(dataset, [feature], tmp_path / "cache", progress=False)
    assert path == feature_folder(dataset, feature, tmp_path / "cache")
    for limit in (0, 10**9):
        cached = CachedFeature.open(feature_folder(dataset, feature, tmp_path / "cache"), memory_limit=limit)
        assert (cached._memory is None) == (limit == 0)
        assert cached.shape == (16,)
        for index, length in enumerate(LENGTHS):
            expected = Brightness().compute(dataset.episode(index))
            assert np.array_equal(cached.read(index), expected["brightness"])
            assert np.array_equal(cached.read(index, "whole"), expected["whole"])
            rows = [3, 1, 1, length - 1]
            assert np.array_equal(cached.read(index, rows=rows), expected["brightness"][rows])
            assert np.array_equal(cached.read(index, "whole", [2]), expected["whole"][[2]])


def test_prepared_once_and_decoded_once(dataset, tmp_path, monkeypatch):
    decoded = []
    frames = LeRobotDataset.frames
    monkeypatch.setattr(LeRobotDataset, "frames", lambda self, i: decoded.append(i) or frames(self, i))
    features = [Brightness(), Words()]
    cache_features(dataset, features, tmp_path / "cache", progress=False)
    assert decoded == [0, 1, 2]
    cache_features(dataset, features, tmp_path / "cache", progress=False)
    assert decoded == [0, 1, 2]
    assert [feature.computed for feature in features] == [3, 3]


def test_key_view_and_contents_name_the_folder(dataset, tmp_path):
    root = tmp_path / "cache"
    first = feature_folder(dataset, Brightness(), root)
    assert feature_folder(dataset, Brightness(2.0), root) != first
    assert feature_folder(dataset, Words(), root) != first
    for change in ({"crop_rows": (2, 10)}, {"row_stride": 2}, {"strip_prefixes": ("put ",)}):
        other = LeRobotDataset(dataset.path, source=SourceConfig(**change))
        assert feature_folder(other, Brightness(), root) != first, change
    stats = dataset.path / "meta/stats.json"
    stats.write_text(stats.read_text() + " ")
    seal(dataset.path)
    assert feature_folder(LeRobotDataset(dataset.path), Brightness(), root) != first


def test_missing_and_unfinished(dataset, tmp_path):
    root = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"brightness-[0-9a-f]+: not prepared; run agra prepare"):
        CachedFeature.open(feature_folder(dataset, Brightness(), root))

    class Fails(Brightness):
        def compute(self, episode: Episode) -> dict[str, np.ndarray]:
            if self.computed == 2:
                raise KeyboardInterrupt
            return super().compute(episode)

    with pytest.raises(KeyboardInterrupt):
        cache_features(dataset, [Fails()], root, progress=False)
    with pytest.raises(FileNotFoundError, match="only 2 episodes are prepared; run agra prepare"):
        CachedFeature.open(feature_folder(dataset, Brightness(), root))
    feature = Brightness()
    (path,) = cache_features(dataset, [feature], root, progress=False)
    assert feature.computed == 1
    (path / "episode-000001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"episode-000001\.safetensors: prepared file is missing"):
        CachedFeature.open(feature_folder(dataset, feature, root))


def test_a_start_reads_the_episode_list_a_few_times_whatever_its_length(dataset, tmp_path, monkeypatch):
    read = []

    class Counted(list):
        def __iter__(self):
            read.append(len(self))
            return super().__iter__()

    (path,) = cache_features(dataset, [Brightness()], tmp_path / "cache", progress=False)
    manifest = json.loads((path / "manifest.json").read_text())
    listed = {**manifest, "episodes": Counted(manifest["episodes"])}
    monkeypatch.setattr("agra.data.features.cache.json.loads", lambda text: listed)
    for episodes in ([0], [0, 1, 2] * 10):
        CachedFeature.open(path, episodes=episodes)
    assert len(read) == 8


def test_a_kill_leaves_no_partial_file(dataset, tmp_path):
    """After SIGKILL in the middle of a file the next run completes the cache with right values."""
    script = textwrap.dedent(f"""
        import os, signal
        import agra.data.features.cache as cache
        from agra.data.lerobot.dataset import LeRobotDataset
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_cache import Brightness
        save = cache.save_file
        def half(arrays, path, metadata):
            save(arrays, path, metadata)
            if "000001" in str(path):
                with open(path, "r+b") as file:
                    file.truncate(40)
                os.kill(os.getpid(), signal.SIGKILL)
        cache.save_file = half
        cache.cache_features(LeRobotDataset({str(dataset.path)!r}), [Brightness()], __import__("pathlib").Path({str(tmp_path)!r}))
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    feature = Brightness()
    cache_features(dataset, [feature], tmp_path, progress=False)
    assert feature.computed == 2
    cached = CachedFeature.open(feature_folder(dataset, feature, tmp_path))
    assert np.array_equal(cached.read(1), Brightness().compute(dataset.episode(1))["brightness"])


def test_damage_is_named(dataset, tmp_path):
    (path,) = cache_features(dataset, [Brightness()], tmp_path, progress=False)
    file = path / "episode-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"episode-000002\.safetensors: damaged .* run agra prepare"):
        CachedFeature.open(feature_folder(dataset, Brightness(), tmp_path))
    with pytest.raises(ValueError, match=r"episode-000002\.safetensors: damaged"):
        CachedFeature.open(feature_folder(dataset, Brightness(), tmp_path), memory_limit=0).read(2, rows=[1])


def test_episodes_of_different_shapes_are_refused(dataset, tmp_path):
    class Ragged(Brightness):
        def compute(self, episode: Episode) -> dict[str, np.ndarray]:
            return {"brightness": np.zeros((len(episode), len(episode)), np.float16)}

    with pytest.raises(ValueError, match=r"episode-000001\.safetensors: expected rows of"):
        cache_features(dataset, [Ragged()], tmp_path, progress=False)


def test_several_processes_fill_one_folder(dataset, tmp_path):
    feature = [Brightness() for _ in range(2)]
    (path,) = cache_features(dataset, [feature[1]], tmp_path, rank=1, world_size=2, progress=False)
    with pytest.raises(FileNotFoundError, match="only 1 episodes are prepared"):
        CachedFeature.open(path)
    cache_features(dataset, [feature[0]], tmp_path, rank=0, world_size=2, progress=False)
    assert [f.computed for f in feature] == [2, 1]
    whole = CachedFeature.open(path)
    for index in range(3):
        assert np.array_equal(whole.read(index), Brightness().compute(dataset.episode(index))["brightness"])


def test_four_processes_write_what_one_writes(dataset, tmp_path):
    for rank in range(4):
        (shards,) = cache_features(dataset, [Brightness()], tmp_path / "four", rank=rank, world_size=4, progress=False)
    (single,) = cache_features(dataset, [Brightness()], tmp_path / "one", progress=False)
    assert {p.name: p.read_bytes() for p in shards.iterdir()} == {p.name: p.read_bytes() for p in single.iterdir()}


def test_requested_episodes_only(dataset, tmp_path):
    feature = Brightness()
    (path,) = cache_features(dataset, [feature], tmp_path, episodes=[0, 2], progress=False)
    assert CachedFeature.open(path, episodes=[2, 0]).episodes == (0, 2)
    with pytest.raises(FileNotFoundError, match="episode 1 is not prepared; run agra prepare"):
        CachedFeature.open(path, episodes=[0, 1])
    cache_features(dataset, [feature], tmp_path, episodes=[1], progress=False)
    assert CachedFeature.open(path, episodes=[0, 1, 2]).episodes == (0, 1, 2)
    assert feature.computed == 3


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_flipped_bit_is_detected_in_its_row(dataset, tmp_path, limit):
    """Every row has its checksum, so the rows beside a damaged one are still read."""
    (path,) = cache_features(dataset, [Brightness()], tmp_path, progress=False)
    file = path / "episode-000001.safetensors"
    expected = Brightness().compute(dataset.episode(1))["brightness"]
    content = bytearray(file.read_bytes())
    content[content.index(expected[4].tobytes()) + 3] ^= 8
    file.write_bytes(content)
    if limit:
        with pytest.raises(ValueError, match=r"episode-000001\.safetensors: damaged \(a row of 'brightness' differs"):
            CachedFeature.open(path, memory_limit=limit)
        return
    cached = CachedFeature.open(path, memory_limit=limit)
    assert np.array_equal(cached.read(1, rows=[3, 5]), expected[[3, 5]])
    with pytest.raises(ValueError, match=r"episode-000001\.safetensors: damaged \(a row of 'brightness' differs"):
        cached.read(1, rows=[3, 4])


def test_equal_arrays_give_equal_files(tmp_path):
    """The metadata are sorted, with texts outside ASCII and characters that JSON escapes."""
    metadata = {"text": 'nimm den "Apfel"\n苹果', "folder": "a", "z": "", "b": "é"}
    arrays = {"tokens": np.arange(12, dtype=np.float16).reshape(3, 4)}
    for index in range(8):
        save_arrays(tmp_path / f"{index}", arrays, metadata)
    assert len({(tmp_path / f"{index}").read_bytes() for index in range(8)}) == 1
    with safe_open(tmp_path / "0", framework="numpy") as file:
        assert file.metadata() == metadata
        assert np.array_equal(file.get_tensor("tokens"), arrays["tokens"])


def test_exchanged_files(dataset, tmp_path):
    (path,) = cache_features(dataset, [Brightness()], tmp_path, progress=False)
    one, other = (path / f"episode-{i:06d}.safetensors" for i in (0, 1))
    os.rename(one, path / "spare")
    os.rename(other, one)
    os.rename(path / "spare", other)
    with pytest.raises(ValueError, match=r"episode-000000\.safetensors: damaged \(its metadata is"):
        CachedFeature.open(path, memory_limit=0).read(0)


def test_a_full_disk_names_the_file_and_leaves_no_temporary_file(dataset, tmp_path):
    feature, root = Brightness(), tmp_path / "cache"
    with file_size_limit(200), pytest.raises(OSError, match=r"episode-000000\.safetensors: .*File too large"):
        cache_features(dataset, [feature], root, progress=False)
    assert [path for path in root.rglob("*") if path.is_file()] == []
    (path,) = cache_features(dataset, [feature], root, progress=False)
    assert np.array_equal(CachedFeature.open(path).read(0), Brightness().compute(dataset.episode(0))["brightness"])


def test_a_full_disk_leaves_no_instruction_tokens(tmp_path):
    tokens = InstructionTokens(tmp_path / "instructions")
    with file_size_limit(100), pytest.raises(OSError, match=r"instructions/[0-9a-f]+\.safetensors: "):
        tokens.write("go", np.zeros((5, 4), np.float16))
    assert list((tmp_path / "instructions").iterdir()) == []
    assert tokens.missing(["go"]) == ["go"]


def test_tokens_read_by_several_threads(tmp_path):
    """Each of two threads may evict what the other reads, and both may load the same text."""
    tokens = InstructionTokens(tmp_path / "instructions", memory_limit=100)
    for text in ("go", "stop"):
        tokens.write(text, np.full((5, 8), len(text), np.float16))
    load, others = tokens._load, []

    class Interrupted(OrderedDict):
        """Lets another thread read before `text in` returns."""

        def __contains__(self, text):
            held = super().__contains__(text)
            if not others:
                others.append(threading.Thread(target=tokens.read, args=("stop",)))
                others[0].start()
                others[0].join(timeout=0.2)
            return held

    tokens.read("go")
    tokens._memory = Interrupted(tokens._memory)
    assert tokens.read("go")[0, 0] == 2
    others[0].join()

    def load_while_another_thread_reads(text):
        tokens._load = load
        return tokens.read(text)

    tokens._memory.clear()
    tokens._bytes, tokens._load = 0, load_while_another_thread_reads
    tokens.read("go")
    assert tokens._bytes == sum(value.nbytes for value in tokens._memory.values()) == 80


def test_estimate(dataset, tmp_path):
    """Sizes are exact for features with one row for each step, and 0 after all episodes are prepared."""
    expected = estimate_cost(dataset, [Brightness(), Words()], tmp_path)
    assert expected.episodes == 3
    rows = sum(LENGTHS) * (16 * 2 + 4) + 3 * 3 * 2  # brightness and whole, and three words an episode
    assert expected.bytes == rows
    assert expected.free_bytes > 0
    assert str(expected).startswith("3 episodes to prepare, about 0.0 MiB")
    assert list(tmp_path.glob("brightness*")) == []
    cache_features(dataset, [Brightness(), Words()], tmp_path, progress=False)
    assert estimate_cost(dataset, [Brightness(), Words()], tmp_path).bytes == 0
