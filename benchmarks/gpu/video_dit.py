"""Section 2: our forward of the Cosmos transformer beside diffusers' own, with the same weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from agra.precision import autocast
from agra.training.memory_estimate import count_flops
from agra.wam.video_dit import VideoDiT
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting, num_bytes, wam_of
from benchmarks.stock import stock_transformer

Pass = Callable[[], Tensor]


def run(setting: Setting, section: Section) -> None:
    """Equality in float32 and in bfloat16, then the time of both ways with and without a backward pass."""
    model = wam_of(setting.config()).model
    config = replace(model.video_dit, text_projection_dim=None)  # tokens come projected, as from the cache
    with torch.device("meta"):
        ours = VideoDiT(config)
    ours = setting.materialise(ours)
    stock = stock_transformer(config, ours.transformer)

    def passes(batch: int, dtype: torch.dtype) -> tuple[Pass, Pass]:
        torch.manual_seed(1)
        shape = model.latent_shape
        latents = torch.randn(batch, *shape, device=setting.device, dtype=dtype)
        text = torch.randn(batch, model.text.length, config.text_dim, device=setting.device, dtype=dtype)
        level = torch.rand(batch, shape[1], device=setting.device)
        mask = torch.zeros_like(latents[:, :1])
        mask[:, :, 0] = 1
        return partial(_ours, ours, latents, level, text, mask), partial(_stock, stock, latents, level, text, mask)

    section.measure("equality", lambda: _equality(setting, *passes(1, torch.float32)), needs=10)
    batch = setting.pick(2, 1)
    section.measure(
        f"forward and backward, batch {batch}",
        lambda: _training(setting, *passes(batch, torch.float32), [ours, stock]),
        needs=15,
    )
    for module in (ours, stock):
        module.bfloat16()
    for batch in setting.pick((1, 8), (1,)):
        section.measure(
            f"forward, batch {batch}",
            lambda batch=batch: _inference(setting, *passes(batch, torch.bfloat16), num_bytes(ours)),
            needs=8,
        )


@torch.no_grad()
def _equality(setting: Setting, ours: Pass, stock: Pass) -> Figures:
    """The largest difference of the two velocities over the largest velocity."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact, other = ours(), stock()
    torch.set_float32_matmul_precision(before)
    with autocast(setting.device, "bfloat16"):
        half = ours()
    scale = exact.abs().max().item()
    assert scale > 0
    return {
        "float32_difference": (exact - other).abs().max().item() / scale,
        "bfloat16_difference": (exact - half).abs().max().item() / scale,
    }


def _training(setting: Setting, ours: Pass, stock: Pass, modules: list[nn.Module]) -> Figures:
    def step(forward: Pass) -> None:
        with autocast(setting.device, "bfloat16"):
            output = forward()
        output.float().square().mean().backward()
        for module in modules:
            module.zero_grad(set_to_none=True)

    flops = count_flops(lambda: step(ours))
    return _compare(setting, partial(step, ours), partial(step, stock), rounds=5) | {"flops": flops}


@torch.no_grad()
def _inference(setting: Setting, ours: Pass, stock: Pass, weights: int) -> Figures:
    flops = count_flops(ours)
    return _compare(setting, ours, stock, rounds=10) | {"flops": flops, "bytes": weights}


def _compare(setting: Setting, ours: Callable[[], object], stock: Callable[[], object], *, rounds: int) -> Figures:
    """Medians of the two and their peak memory."""
    figures: Figures = {}
    for name, call in (("", ours), ("stock_", stock)):
        setting.reset_peak()
        figures[f"{name}seconds"] = median(setting.seconds(call, rounds=rounds))
        figures[f"{name}peak_bytes"] = setting.peak()
    return figures | {"stock_over_ours": figures["stock_seconds"] / figures["seconds"]}


def _ours(model: VideoDiT, latents: Tensor, level: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    velocity = model(latents, level, text, condition_mask=mask).velocity
    assert velocity is not None
    return velocity


def _stock(model: nn.Module, latents: Tensor, level: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    padding = latents.new_zeros(1, 1, *latents.shape[3:])
    levels = level[:, None, :, None, None]
    return model(latents, levels, text, condition_mask=mask, padding_mask=padding, return_dict=False)[0]
