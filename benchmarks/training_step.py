"""A joint training step of tiny, ours against the stock way: same weights, samples, noise and losses.

    python -m benchmarks.training_step [--quick]

Twice: with what the frozen networks make of the samples taken from the cache, as both could, which compares the models; and as
the public code trains, which runs codec, text encoder and teacher on every step, against ours with its cache.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from agra.alignment.teacher import load_teacher, reference_frames
from agra.batch import Batch
from agra.rng import seed_everything, sharded_rng
from agra.training.memory_estimate import fake_batch, flops_per_sample
from agra.data.features.preparation import OnlineEncoder
from agra.recipes import tiny
from agra.methods.wam import Losses, Objective
from agra.training.optimization import parameter_groups
from agra.wam.codec import to_video
from agra.wam.model import WAM
from agra.wam.patch_pca import PatchPCACodec
from agra.wam.text import load_text_encoder
from benchmarks.side_by_side import compare, finish, peak_flops
from benchmarks.stock import StockWAM

CONFIG = tiny()
WIDTH = 384  # of DINOv2-S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--peak", choices=("ours", "stock"), help="run two steps of one way and print its peak memory in MiB"
    )
    arguments = parser.parse_args()
    if arguments.peak:
        batch = random_batch()
        train_step = step(objectives()[arguments.peak == "stock"], lambda: batch)
        for _ in range(2):
            train_step()
        # Not getrusage: its maximum begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        print(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024)
        return
    samples, (ours, stock) = Samples(), objectives()
    rounds = 3 if arguments.quick else 9
    difference = max_difference(ours, stock, samples.cached())
    unit = f"s, a step of {CONFIG.stage.batch_size}"
    model = compare("training_step", step(ours, samples.cached), step(stock, samples.cached), unit=unit, rounds=rounds)
    whole = compare("training_step whole", step(ours, samples.cached), step(stock, samples.online), unit=unit, rounds=3)
    peaks = {way: peak(way) for way in ("ours", "stock")}
    print(
        f"the model alone {model['ratio']}x {model['spread']}, with frozen networks {whole['ratio']}x {whole['spread']}"
    )
    flops, most = CONFIG.stage.batch_size * flops_per_sample(CONFIG), peak_flops()
    share = flops / cast(float, model["ours"]) / most
    print(
        f"{flops / 1e9:.1f} GFLOP a step: ours reaches {100 * share:.0f} % of this machine's {most / 1e9:.0f} GFLOP/s"
    )
    print(
        f"largest difference of a loss {difference:.1e}; peak memory {peaks['ours']:.0f} and {peaks['stock']:.0f} MiB"
    )
    finish(
        model
        | {
            "whole_ratio": whole["ratio"],
            "whole_spread": whole["spread"],
            "peak_mib": peaks,
            "loss_difference": difference,
            "flops": flops,
            "peak_flops": most,
            "share_of_peak": share,
        }
    )


class Samples:
    """A batch of random windows: as frames and words, and as what the frozen networks make of them."""

    def __init__(self) -> None:
        generator, size = np.random.default_rng(0), CONFIG.stage.batch_size
        self.clips = [generator.integers(0, 256, (5, 128, 224, 3), dtype=np.uint8) for _ in range(size)]
        self.texts = [f"put the banana on plate {row}" for row in range(size)]
        assert CONFIG.alignment is not None
        codec = PatchPCACodec.fit([to_video(clip, CONFIG.model.frame_size) for clip in self.clips], channels=24)
        self.text = load_text_encoder(CONFIG.model.text)
        self.encoder = OnlineEncoder(CONFIG, codec, load_teacher(CONFIG.alignment.teacher))
        self.references = list(reference_frames(CONFIG.model.latent_shape[1]))
        self._cached = self.online()

    def cached(self) -> Batch:
        """The batch as the cache gives it."""
        return self._cached

    def online(self) -> Batch:
        """The batch anew from frames and words, by the three frozen networks."""
        latents = self.encoder.latents(self.clips)
        targets = self.encoder.targets([clip[self.references] for clip in self.clips])
        text = self.text.encode(self.texts).half().float()
        return replace(random_batch(), latents=latents.float(), targets=targets.float(), instruction=text)


def random_batch() -> Batch:
    """A batch of noise in the shapes of tiny, always the same."""
    torch.manual_seed(1)
    return fake_batch(CONFIG, WIDTH, CONFIG.stage.batch_size)


def objectives() -> tuple[Objective, Objective]:
    """tiny's joint objective, ours and stock, with the same weights; away from the start, where every gate is shut."""
    seed_everything(0)
    wam = WAM(CONFIG.model)
    with torch.no_grad():
        for parameter in wam.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours, stock = (Objective(one, CONFIG.method.objective, CONFIG.alignment, WIDTH) for one in (wam, StockWAM(wam)))
    assert ours.projectors is not None
    assert stock.projectors is not None
    stock.projectors.load_state_dict(ours.projectors.state_dict())
    return ours.train(), stock.train()


def losses(objective: Objective, batch: Batch) -> Losses:
    """One step's losses under the noise of step 0."""
    with sharded_rng(0, 0, samples=len(batch)):
        return objective(batch)


def step(objective: Objective, batch: Callable[[], Batch]) -> Callable[[], None]:
    """A whole training step: forward, backward, clipping, AdamW."""
    groups = list(parameter_groups(objective, CONFIG.stage))
    optimizer = torch.optim.AdamW(groups, betas=CONFIG.stage.betas, fused=not isinstance(objective.wam, StockWAM))

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses(objective, batch()).total.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), CONFIG.stage.clip_norm)
        optimizer.step()

    return train


@torch.no_grad()
def max_difference(ours: Objective, stock: Objective, batch: Batch) -> float:
    """The largest difference between the two ways' losses, before any training."""
    pairs = [
        (getattr(losses(ours, batch), name), getattr(losses(stock, batch), name))
        for name in ("video", "action", "alignment")
    ]
    return max(abs((a - b).item()) for a, b in pairs)


def peak(way: str) -> float:
    """Peak resident memory of a process that runs two steps of one way, MiB."""
    command = [sys.executable, "-m", "benchmarks.training_step", "--peak", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
