"""Two processes of FSDP2 that compute one batch's gradients in several precisions, for `tests/device/test_gather.py`."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from agra.methods.method import Method
from agra.precision import autocast
from agra.rng import seed_everything, sharded_rng
from agra.training.distributed import distributed_context
from agra.training.optimization import named_parameters
from agra.training.parallelize import ParallelConfig, build
from agra.weights import write_tensors
from tests.support.small import make_small_config, random_batch

RANKS, SAMPLES = 2, 8
WAYS = {"float32": ("float32", False), "autocast": ("bfloat16", False), "gathered": ("bfloat16", True)}
"""Name to the precision of products and whether parameters are gathered in bfloat16."""


def work(rank: int, port: int, folder: Path, device: str = "cpu") -> None:
    """Write every way's gradients and loss, from the same weights and noise."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed_context(device, shard_degree=None, deterministic=False) as context:
        seen = {}
        for name, (precision, half) in WAYS.items():
            config = make_small_config()
            config = replace(config, stage=replace(config.stage, precision=precision, batch_size=SAMPLES))

            def make(config=config) -> Method:
                seed_everything(0)
                return config.method.build()

            def initialize(method: Method) -> None:
                for parameter in method.parameters():
                    parameter.data += 0.1 * torch.randn_like(parameter)  # the gates begin shut

            method = build(make, config.stage, ParallelConfig(gather_bfloat16=half, compile=False), context, initialize)

            def note(block: nn.Module, _: object, name=name) -> None:
                seen[name] = str(next(block.parameters()).dtype)

            method.blocks()[0].register_forward_pre_hook(note)
            batch = random_batch(config, count=SAMPLES).micro_batch(rank, RANKS).to(context.device)
            with (
                sharded_rng(0, 0, samples=len(batch), index=rank, count=RANKS),
                autocast(context.device, precision),
            ):
                losses = method(batch)
            losses.total.backward()
            whole = {key: p.grad.full_tensor().cpu() for key, p in named_parameters(method) if p.grad is not None}
            if context.is_main:
                write_tensors(folder / f"{name}.safetensors", whole | {"loss": losses.total.detach().cpu()})
        stopped_by = context.first_signal([signal.SIGTERM] if rank == 0 else [signal.SIGINT])
        (folder / f"rank_{rank}.json").write_text(json.dumps({"dtypes": seen, "signal": stopped_by}))
