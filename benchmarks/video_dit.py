"""The video DiT's forward and backward pass against diffusers' own, with the same weights, shapes and results.

    python -m benchmarks.video_dit [--quick]

The alternative is the stock forward pass with per-frame noise levels, called as in its pipeline (benchmarks/stock.py).
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from diffusers.models.transformers.transformer_cosmos import CosmosTransformer3DModel
from torch import Tensor

from agra.methods.wam import WAMMethodConfig
from agra.recipes import tiny
from agra.wam.video_dit import VideoDiT
from benchmarks.side_by_side import compare, finish
from benchmarks.stock import stock_transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller batch")
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    method = tiny().method
    assert isinstance(method, WAMMethodConfig)
    config = replace(method.model.video_dit, max_size=(8, 64, 64), learned_positions=False)
    model = VideoDiT(config)
    stock_model = stock_transformer(config, model.transformer)
    for batch, frames, size, label in (
        (4 if quick else 16, 3, (8, 14), "84 tokens"),
        (1 if quick else 8, 5, (24, 42), "1,260 tokens"),
    ):
        latents, text = torch.randn(batch, 24, frames, *size), torch.randn(batch, 16, 384)
        mask = torch.zeros(batch, 1, frames, *size)
        mask[:, :, 0] = 1
        level = torch.rand(batch, frames)

        ours = partial(_ours, model, latents, level, text, mask)
        alternative = partial(_stock, stock_model, latents, level, text, mask)
        difference = (ours() - alternative()).abs().max().item()
        result = compare("video_dit", ours, alternative, unit="s, forward and backward", rounds=3 if quick else 9)
        print(f"{label}: {result['ratio']}x {result['spread']}, largest difference of the outputs {difference:.1e}")
    finish(result | {"max_abs_difference": difference})


def _ours(model: VideoDiT, latents: Tensor, level: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    output = model(latents, level, text, condition_mask=mask).velocity
    output.square().mean().backward()
    return output


def _stock(model: CosmosTransformer3DModel, latents: Tensor, level: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    padding = torch.zeros(1, 1, *latents.shape[3:])
    levels = level[:, None, :, None, None]
    arguments = {"condition_mask": mask, "padding_mask": padding, "return_dict": False}
    output = model(latents, levels, text, **arguments)[0]
    output.square().mean().backward()
    return output


if __name__ == "__main__":
    main()
