"""Samples a second of the data loader: 17-frame clips from mp4 and windows from the cache, against a plain PyAV loop.

    python -m benchmarks.loader [--quick] [--clips N]

The alternative opens the file, seeks to the key frame before the clip and turns every frame from there on into RGB until it
has the clip. Both read the same files at random places. Beside it stand the appetite of tiny's joint training step, and how
much memory an hour's worth of samples at that appetite leaves behind; with `--clips`, so many clips decoded as well (104,000
are an hour's worth at 29 samples a second, and take a core a quarter of an hour).
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from agra.batch import Batch
from agra.data.features.cache import CachedFeature, folder, prepare
from agra.data.lerobot.writer import write_dataset
from agra.data.sampling.prefetch import Prefetched
from agra.data.sampling.sampler import DataConfig, WindowSampler
from agra.data.source import Source, embodiment_stats
from agra.methods.wam import Objective
from agra.recipes import tiny
from agra.types import Embodiment, Episode
from agra.wam.model import WAM
from benchmarks.side_by_side import compare, finish

ROBOT = Embodiment(name="tabletop", state_names=tuple("abcdefghijkl"), action_names=tuple("abcdefghijkl"))
FRAMES, SIZE, BATCH = 17, (256, 256), 16
TINY = tiny()


class Zeros:
    """A feature of the shapes that tiny caches; what the values are costs nothing to read."""

    def __init__(self, name: str, shape: tuple[int, ...], rows: int | None = None) -> None:
        self.name, self.key, self._shape, self._rows = name, {"shape": list(shape)}, shape, rows

    def compute(self, episode: Episode) -> dict[str, np.ndarray]:
        """As many rows as the episode has, or as were asked for."""
        return {self.name: np.zeros((self._rows or len(episode), *self._shape), np.float16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--clips", type=int, default=0)
    options = parser.parse_args()
    quick = options.quick
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_dataset(root / "set", (_episode(i) for i in range(4 if quick else 12)), embodiment=ROBOT, fps=20)
        data = DataConfig(path=str(root / "set"), cached=())
        (source,) = SOURCES
        clips = 8 if quick else 32
        result = compare(
            "loader",
            lambda: _read(_ours, source, clips),
            lambda: _read(_plain, source, clips),
            unit=f"s for {clips} clips of {FRAMES} frames of {SIZE[0]} x {SIZE[1]}",
            rounds=3 if quick else 9,
        )
        print(
            f"mp4: {clips / float(str(result['ours'])):.1f} clips/s, plain PyAV {clips / float(str(result['alternative'])):.1f}"
        )
        cached = _cached_sampler(data, source, root / "cache")
        from_cache = _rate(cached.batch, 20 if quick else 200)
        with Prefetched(cached.batch, workers=1) as ahead:
            prefetched = _rate(ahead, 20 if quick else 200)
        appetite = _appetite(cached.batch(0), 3 if quick else 10)
        hour = BATCH * 5 if quick else int(appetite * 3600)
        grown = _memory_growth(cached.batch, hour // BATCH)
        extra = _decoding_growth(source, options.clips) if options.clips else {}
    print(
        f"cache: {from_cache:.0f} samples/s, prefetched {prefetched:.0f}; tiny's joint step takes {appetite:.1f} samples/s"
    )
    print(f"memory after {hour} samples from the cache: {grown:+.1f} MiB")
    extra |= {"cache_samples_per_second": round(from_cache), "training_samples_per_second": round(appetite, 1)}
    finish(
        result | extra | {"hour_of_samples": hour, "memory_growth_mib": round(grown, 1), "machine": _machine(result)}
    )


def _episode(index: int) -> Episode:
    """400 steps of a textured background and a square that moves: motion, and detail for the decoder."""
    rng = np.random.default_rng(index)
    background = rng.integers(0, 200, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.repeat(background[None], 400, axis=0)
    for step, frame in enumerate(frames):
        top, left = 40 + step % 150, 20 + (2 * step) % 180
        frame[top : top + 40, left : left + 40] = (230, 60, 40)
    rows = rng.normal(size=(400, 12))
    return Episode(frames=frames, states=rows, actions=rows, instruction="go", embodiment="tabletop", fps=20)


def _places(source: Source, clips: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    return [(int(rng.integers(source.dataset.num_episodes)), int(rng.integers(400 - FRAMES))) for _ in range(clips)]


def _read(read: Callable[[Source, int, int], np.ndarray], source: Source, clips: int) -> None:
    for episode, start in _places(source, clips):
        assert read(source, episode, start).shape == (FRAMES, *SIZE, 3)


def _ours(source: Source, episode: int, start: int) -> np.ndarray:
    return source.dataset.clip(episode, np.arange(start, start + FRAMES), threads=1)


def _plain(source: Source, episode: int, start: int) -> np.ndarray:
    path, begins = source.dataset.layout.entries[episode].videos[source.dataset.camera]
    first = begins + start / 20
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int(first / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            picture = frame.to_ndarray(format="rgb24")
            if float(frame.pts * stream.time_base) >= first - 0.025:
                frames.append(picture)
            if len(frames) == FRAMES:
                break
    return np.stack(frames)


def _cached_sampler(data: DataConfig, source: Source, root: Path) -> WindowSampler:
    model = TINY.model
    latents = Zeros("latents", model.latent_shape)
    targets = Zeros("targets", (*model.token_grid[1:], 384))
    text = Zeros("instruction", (model.video_dit.text_dim,), rows=model.text.length)
    features = [latents, text, targets]
    prepare(source.dataset, features, root, progress=False)
    opened = {f.name: CachedFeature.open(folder(source.dataset, f, root), memory_limit=0) for f in features}
    return WindowSampler(
        data,
        [source],
        [opened],
        embodiment_stats([source]),
        horizon=model.action_dit.horizon,
        num_frames=model.num_frames,
        references=range(model.latent_shape[1]),
        batch_size=BATCH,
        seed=0,
        max_state_dim=model.action_dit.state_dim,
        max_action_dim=model.action_dit.action_dim,
    )


def _rate(batch: Callable[[int], Batch], steps: int) -> float:
    batch(0)
    clock = time.perf_counter()
    for step in range(1, steps + 1):
        batch(step)
    return BATCH * steps / (time.perf_counter() - clock)


def _appetite(batch: Batch, steps: int) -> float:
    """Samples a second of tiny's joint step, forward and backward."""
    torch.manual_seed(0)
    objective = Objective(WAM(TINY.model), TINY.method.objective, TINY.alignment, 384)
    return _rate(lambda step: objective(batch).total.backward() or batch, steps)


def _decoding_growth(source: Source, clips: int) -> dict[str, object]:
    rng = np.random.default_rng(1)

    def decode(_: int) -> None:
        _ours(source, int(rng.integers(source.dataset.num_episodes)), int(rng.integers(400 - FRAMES)))

    grown = _memory_growth(decode, clips)
    print(f"memory after {clips} clips from mp4: {grown:+.1f} MiB")
    return {"clips": clips, "decoding_memory_growth_mib": round(grown, 1)}


def _memory_growth(sample: Callable[[int], object], steps: int) -> float:
    """MiB by which the process has grown from a tenth of the steps to all of them."""
    before = 0.0
    for step in range(steps):
        sample(step)
        if step == steps // 10:
            before = _resident()
    return _resident() - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _machine(result: dict[str, object]) -> str:
    return f"{result['machine']}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
