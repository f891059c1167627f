"""A joint training step of tiny against the stock way, with the same weights, samples, noise and losses.

    python -m benchmarks.training_step [--quick]

Two comparisons. The first compares the models: both take the features of the frozen networks from the cache. The second
compares the whole step: the public code runs codec, text encoder and teacher on every step, ours reads its cache.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from agra.alignment.teacher import load_teacher
from agra.batch import Batch
from agra.data.features.online import OnlineEncoder
from agra.methods.method import Losses
from agra.methods.wam import WAMMethod
from agra.recipes import tiny
from agra.rng import seed_everything, sharded_rng
from agra.training.memory_estimate import fake_batch, flops_per_sample
from agra.training.optimization import parameter_groups
from agra.wam.codec import to_video
from agra.wam.patch_pca import PatchPCACodec
from agra.wam.text import load_text_encoder
from benchmarks.side_by_side import compare, finish, peak_flops
from benchmarks.stock import StockMethod

CONFIG = tiny()
METHOD: Any = CONFIG.method
QUICK_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"fewer rounds, batches of {QUICK_BATCH}, no peak memory")
    parser.add_argument(
        "--peak", choices=("ours", "stock"), help="run only two steps of one way and print the peak memory in MiB"
    )
    arguments = parser.parse_args()
    if arguments.peak:
        batch = random_batch(CONFIG.stage.batch_size)
        train_step = step(methods()[arguments.peak == "stock"], lambda: batch)
        for _ in range(2):
            train_step()
        # Not getrusage, whose maximum includes that of the parent process.
        status = Path("/proc/self/status").read_text()
        print(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024)
        return
    size = QUICK_BATCH if arguments.quick else CONFIG.stage.batch_size
    samples, (ours, stock) = Samples(size), methods()
    difference = max_difference(ours, stock, samples.cached())
    unit = f"s, a step of {size}"
    cached, stock_cached, stock_online = (
        step(ours, samples.cached),
        step(stock, samples.cached),
        step(stock, samples.online),
    )
    model = compare("training_step", cached, stock_cached, unit=unit, rounds=3 if arguments.quick else 9)
    whole = compare("training_step", cached, stock_online, unit=unit, rounds=1 if arguments.quick else 3)
    print(
        f"the model alone {model['ratio']}x {model['spread']}, with frozen networks {whole['ratio']}x {whole['spread']}"
    )
    flops, most = size * flops_per_sample(CONFIG), peak_flops()
    fraction = flops / cast(float, model["ours"]) / most
    print(
        f"{flops / 1e9:.1f} GFLOP a step: ours reaches {100 * fraction:.0f} % of this machine's {most / 1e9:.0f} GFLOP/s"
    )
    print(f"largest difference of a loss {difference:.1e}")
    result = model | {
        "whole_ratio": whole["ratio"],
        "whole_spread": whole["spread"],
        "loss_difference": difference,
        "flops": flops,
        "peak_flops": most,
        "share_of_peak": fraction,
    }
    if not arguments.quick:
        result["peak_mib"] = peaks = {way: peak(way) for way in ("ours", "stock")}
        print(f"peak memory {peaks['ours']:.0f} MiB, stock {peaks['stock']:.0f} MiB")
    finish(result)


class Samples:
    """A batch of random windows: frames and words, and the features of the frozen networks."""

    def __init__(self, size: int) -> None:
        generator = np.random.default_rng(0)
        self.clips = [generator.integers(0, 256, (5, 128, 224, 3), dtype=np.uint8) for _ in range(size)]
        self.texts = [f"put the banana on plate {row}" for row in range(size)]
        codec = PatchPCACodec.fit([to_video(clip, METHOD.model.frame_size) for clip in self.clips], channels=24)
        self.text = load_text_encoder(METHOD.text)
        self.encoder = OnlineEncoder(METHOD, codec, load_teacher(METHOD.teacher))
        self.references = list(METHOD.grid_frames)
        self._cached = self.online()

    def cached(self) -> Batch:
        """Return the batch with cached features."""
        return self._cached

    def online(self) -> Batch:
        """Encode the batch again from frames and words, with the three frozen networks."""
        latents = self.encoder.latents(self.clips)
        targets = self.encoder.teacher_grids([clip[self.references] for clip in self.clips])
        text = self.text.encode(self.texts).half().float()
        return replace(
            random_batch(len(self.clips)), latents=latents.float(), targets=targets.float(), instruction=text
        )


def random_batch(size: int) -> Batch:
    """Return a batch of noise in the shapes of tiny, always the same."""
    torch.manual_seed(1)
    return fake_batch(METHOD, size)


def methods() -> tuple[WAMMethod, WAMMethod]:
    """Build tiny's joint method, ours and stock, with equal weights that are not initial, because initial gates are zero."""
    seed_everything(0)
    ours = METHOD.build()
    with torch.no_grad():
        for parameter in ours.wam.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return ours.train(), StockMethod(deepcopy(ours)).train()


def losses(method: WAMMethod, batch: Batch) -> Losses:
    """Compute the losses with the noise of step 0."""
    with sharded_rng(0, 0, samples=len(batch)):
        return method(batch)


def step(method: WAMMethod, batch: Callable[[], Batch]) -> Callable[[], None]:
    """Return a whole training step: forward, backward, clipping, AdamW."""
    groups = list(parameter_groups(method, CONFIG.stage))
    optimizer = torch.optim.AdamW(groups, betas=CONFIG.stage.betas, fused=not isinstance(method, StockMethod))

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses(method, batch()).total.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), CONFIG.stage.clip_norm or math.inf)
        optimizer.step()

    return train


@torch.no_grad()
def max_difference(ours: WAMMethod, stock: WAMMethod, batch: Batch) -> float:
    """Return the largest difference between the losses of the two, before any training."""
    terms, stock_terms = losses(ours, batch).terms, losses(stock, batch).terms
    return max(abs((terms[name] - stock_terms[name]).item()) for name in ("video", "action", "alignment"))


def peak(way: str) -> float:
    """Return the peak resident memory of a process that runs two steps of one way, MiB."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--peak", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
