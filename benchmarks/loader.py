"""Samples a second of the data loader: clips of 17 frames from mp4 and windows from the cache, against a plain PyAV loop.

    python -m benchmarks.loader [--quick] [--clips N]

The alternative opens the file, seeks to the key frame before the clip and converts every frame from there on to RGB until
it has the clip. Both read the same files at random places. The benchmark also prints the speed of tiny's joint training
step, and the growth of memory over an hour of samples at that speed. `--clips N` decodes N more clips and prints the growth
of memory over them. 104,000 are an hour of samples at 29 a second, and take a quarter of an hour on one core.
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
from agra.data.config import DataConfig
from agra.data.features.cache import CachedFeature, cache_features, feature_folder
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.lerobot.writer import write_dataset
from agra.data.sampling.prefetch import Prefetched
from agra.data.sampling.sampler import WindowSampler
from agra.data.source import Source, embodiment_stats, open_sources
from agra.methods.wam import WAMMethodConfig
from agra.recipes import tiny
from agra.types import Embodiment, Episode
from benchmarks.side_by_side import compare, finish

ROBOT = Embodiment(name="tabletop", state_names=tuple("abcdefghijkl"), action_names=tuple("abcdefghijkl"))
FRAMES, SIZE, STEPS, FPS, BATCH = 17, (256, 256), 400, 20, 16
INSTRUCTION = "go"
TINY = tiny()
TEACHER_WIDTH = 384


class Zeros:
    """A feature of zeros in a shape that tiny caches. Reading them costs the same as reading real values."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.key, self._shape = name, {"shape": list(shape)}, shape

    def compute(self, episode: Episode) -> dict[str, np.ndarray]:
        """One row for each control step."""
        return {self.name: np.zeros((len(episode), *self._shape), np.float16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer clips and samples")
    parser.add_argument("--clips", type=int, default=0, help="clips to decode for the growth of memory")
    options = parser.parse_args()
    quick = options.quick
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_dataset(root / "set", (_episode(i) for i in range(4 if quick else 12)), embodiment=ROBOT, fps=FPS)
        data = DataConfig(path=str(root / "set"))
        (source,) = open_sources(data)
        clips = 8 if quick else 32
        result = compare(
            "loader",
            lambda: _read(_agra_clip, source, clips),
            lambda: _read(_pyav_clip, source, clips),
            unit=f"s for {clips} clips of {FRAMES} frames of {SIZE[0]} x {SIZE[1]}",
            rounds=3 if quick else 9,
        )
        rates = {name: clips / float(str(result[name])) for name in ("ours", "alternative")}
        print(f"mp4: {rates['ours']:.1f} clips/s, plain PyAV {rates['alternative']:.1f} clips/s")
        sampler = _cached_sampler(data, source, root / "cache")
        cached = _rate(sampler.batch, 20 if quick else 200)
        with Prefetched(sampler.batch, workers=1) as batches:
            prefetched = _rate(batches, 20 if quick else 200)
        training = _training_rate(sampler.batch(0), 3 if quick else 10)
        samples = BATCH * 5 if quick else int(training * 3600)
        growth = _memory_growth(sampler.batch, samples // BATCH)
        extra = _decoding_growth(source, options.clips) if options.clips else {}
    print(
        f"cache: {cached:.0f} samples/s, prefetched {prefetched:.0f} samples/s; tiny's joint step trains {training:.1f} samples/s"
    )
    print(f"memory after {samples} samples from the cache: {growth:+.1f} MiB")
    extra |= {"cache_samples_per_second": round(cached), "training_samples_per_second": round(training, 1)}
    extra |= {"hour_of_samples": samples, "memory_growth_mib": round(growth, 1)}
    finish(result | extra | {"machine": f"{result['machine']}, {os.cpu_count()} cores"})


def _episode(index: int) -> Episode:
    """A moving square before a textured background: motion, and detail for the decoder."""
    rng = np.random.default_rng(index)
    background = rng.integers(0, 200, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.repeat(background[None], STEPS, axis=0)
    for step, frame in enumerate(frames):
        top, left = 40 + step % 150, 20 + (2 * step) % 180
        frame[top : top + 40, left : left + 40] = (230, 60, 40)
    rows = rng.normal(size=(STEPS, 12))
    return Episode(frames=frames, states=rows, actions=rows, instruction=INSTRUCTION, embodiment="tabletop", fps=FPS)


def _read(read: Callable[[Source, int, int], np.ndarray], source: Source, clips: int) -> None:
    """Read `clips` clips at random places, the same at every call."""
    rng = np.random.default_rng(0)
    for _ in range(clips):
        episode, start = int(rng.integers(source.dataset.num_episodes)), int(rng.integers(STEPS - FRAMES))
        assert read(source, episode, start).shape == (FRAMES, *SIZE, 3)


def _agra_clip(source: Source, episode: int, start: int) -> np.ndarray:
    return source.dataset.clip(episode, np.arange(start, start + FRAMES), threads=1)


def _pyav_clip(source: Source, episode: int, start: int) -> np.ndarray:
    path, episode_start = source.dataset.layout.entries[episode].videos[source.dataset.camera]
    first = episode_start + start / FPS
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        stream.codec_context.thread_count = 1
        container.seek(int(first / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            picture = frame.to_ndarray(format="rgb24")
            assert frame.pts is not None
            if float(frame.pts * stream.time_base) >= first - 0.5 / FPS:
                frames.append(picture)
            if len(frames) == FRAMES:
                break
    return np.stack(frames)


def _cached_sampler(data: DataConfig, source: Source, root: Path) -> WindowSampler:
    """A sampler for tiny's method that reads every row from disk."""
    method = TINY.method
    assert isinstance(method, WAMMethodConfig)
    features = [
        Zeros("latents", method.model.latent_shape),
        Zeros("targets", (*method.shapes.feature_grid, TEACHER_WIDTH)),
    ]
    cache_features(source.dataset, features, root, progress=False)
    cached = {f.name: CachedFeature.open(feature_folder(source.dataset, f, root), memory_limit=0) for f in features}
    tokens = InstructionTokens(root / "instructions")
    tokens.write(INSTRUCTION, np.zeros(method.shapes.instruction, np.float16))
    stats = embodiment_stats([source])
    return WindowSampler(data, method, [source], [cached], stats, batch_size=BATCH, seed=0, instructions=tokens)


def _rate(batch: Callable[[int], Batch], steps: int) -> float:
    """Samples a second over `steps` batches, after one that does not count."""
    batch(0)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch(step)
    return BATCH * steps / (time.perf_counter() - start)


def _training_rate(batch: Batch, steps: int) -> float:
    """Samples a second of tiny's joint step, forward and backward."""
    torch.manual_seed(0)
    method = TINY.method.build()
    return _rate(lambda step: method.loss(batch).total.backward() or batch, steps)


def _decoding_growth(source: Source, clips: int) -> dict[str, object]:
    rng = np.random.default_rng(1)

    def decode(_: int) -> None:
        _agra_clip(source, int(rng.integers(source.dataset.num_episodes)), int(rng.integers(STEPS - FRAMES)))

    growth = _memory_growth(decode, clips)
    print(f"memory after {clips} clips from mp4: {growth:+.1f} MiB")
    return {"clips": clips, "decoding_memory_growth_mib": round(growth, 1)}


def _memory_growth(sample: Callable[[int], object], steps: int) -> float:
    """Growth of the process, in MiB, from a tenth of the steps to all of them."""
    before = 0.0
    for step in range(steps):
        sample(step)
        if step == steps // 10:
            before = _resident()
    return _resident() - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
