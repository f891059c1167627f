"""Section 7: training steps per second of `tiny`, as the trainer runs them and as one CUDA graph."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from agra.precision import autocast
from agra.recipes import tiny
from agra.training.memory_estimate import fake_batch, flops_per_sample
from agra.training.optimization import freeze, parameter_groups
from agra.training.trainer import Trainer
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting


def run(setting: Setting, section: Section) -> None:
    """Both ways on the same random batch, the recipe's 32 samples."""
    section.measure("trainer", lambda: _trainer(setting), needs=10)
    section.measure("CUDA graph", lambda: _graph(setting), needs=12)


def _trainer(setting: Setting) -> Figures:
    config = tiny()
    torch.manual_seed(0)
    batch = fake_batch(config.method, _samples(setting))
    trainer = Trainer(
        config, config.method.build(), batch=lambda step: batch, validation=None, output=setting.scratch / "tiny",
        extra_files={}, context=setting.context(),
    )  # fmt: skip
    trainer.meter.start(0)
    return _figures(setting, median(setting.seconds(lambda: trainer._train_step(0, []), rounds=50, warm=5)))


def _graph(setting: Setting) -> Figures:
    """Forward, backward, clipping and AdamW, recorded once and replayed. The random numbers are new in every replay."""
    config = tiny()
    torch.manual_seed(0)
    method = config.method.build().to(setting.device).train()
    freeze(method, config.stage)
    batch = fake_batch(config.method, _samples(setting)).to(setting.device)
    graphs = setting.device.type == "cuda"
    groups = list(parameter_groups(method, config.stage))
    optimizer = torch.optim.AdamW(groups, betas=config.stage.betas, fused=True, capturable=graphs)
    trained = [p for group in groups for p in group["params"]]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(setting.device, config.stage.precision):
            loss = method(batch).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.stage.clip_norm or math.inf)
        optimizer.step()

    replay = step
    with _levels_on(setting.device):
        if graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        times = setting.seconds(replay, rounds=100, warm=5)
    assert all(bool(p.isfinite().all()) for p in trained)
    return _figures(setting, median(times))


@contextmanager
def _levels_on(device: torch.device) -> Iterator[None]:
    """Noise levels drawn on the device. Training draws them on the CPU, which a graph cannot record."""

    def beta(count: int) -> Tensor:
        return torch.rand(count, device=device).pow(1 / 1.5)  # Beta(1.5, 1)

    def logit_normal(count: int, *, shift: float) -> Tensor:
        u = torch.randn(count, device=device).sigmoid()
        return shift * u / (1 + (shift - 1) * u)

    with patch("agra.methods.wam.beta_levels", beta), patch("agra.methods.wam.logit_normal_levels", logit_normal):
        yield


def _samples(setting: Setting) -> int:
    return setting.pick(tiny().stage.batch_size, tiny().method.batch_multiple)


def _figures(setting: Setting, seconds: float) -> Figures:
    flops = {} if setting.dry else {"flops": _samples(setting) * flops_per_sample(tiny())}
    return {"seconds": seconds, "steps_per_second": 1 / seconds, **flops}
