"""Section 8: FSDP2 over NCCL on all GPUs of this machine; over gloo on two processes in a dry run."""

import json
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist

from agra.files import write_text
from agra.training.distributed import DistributedContext, make_mesh
from agra.training.memory_estimate import fake_batch
from agra.training.parallelize import ParallelConfig, build
from agra.training.trainer import Trainer
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting, fill


def run(setting: Setting, section: Section) -> None:
    """A joint step with parameters gathered in float32, and one with bfloat16."""
    count = setting.pick(torch.cuda.device_count(), 2)
    for half in (False, True):
        name = f"{count} processes, gathered in {'bfloat16' if half else 'float32'}"
        section.measure(name, lambda half=half: _measure(setting, count, half), needs=40)


def _measure(setting: Setting, count: int, half: bool) -> Figures:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = Rank(setting=setting, count=count, port=port, half=half)
    ranks = [setting.processes().Process(target=task, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        raise RuntimeError(f"processes ended with exit codes {codes}")
    return json.loads((setting.scratch / "fsdp.json").read_text())


@dataclass(frozen=True, kw_only=True)
class Rank:
    """A process of the group."""

    setting: Setting
    count: int
    port: int
    half: bool

    def __call__(self, rank: int) -> None:
        """Train a few steps. The first process writes the figures."""
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(self.count), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)
        kind = self.setting.device.type
        device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
        with ExitStack() as stack:
            if kind == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
            stack.callback(dist.destroy_process_group)
            mesh = make_mesh(kind, None, self.count)
            context = DistributedContext(rank=rank, world_size=self.count, device=device, mesh=mesh)
            figures = self._train(replace(self.setting, device=device), context)
        if rank == 0:
            write_text(self.setting.scratch / "fsdp.json", json.dumps(figures))

    def _train(self, setting: Setting, context: DistributedContext) -> Figures:
        config = setting.config()
        each = setting.pick(4, 2)
        stage = replace(config.stage, batch_size=each * self.count, log_every=1_000_000)
        config = replace(config, stage=stage)
        parallel = ParallelConfig(activation_checkpointing=1.0, compile=False, gather_bfloat16=self.half)
        method = build(config.method.build, stage, parallel, context, None)
        torch.manual_seed(0)
        for name, parameter in method.named_parameters():
            fill(name, parameter)
        batch = fake_batch(config.method, each)
        trainer = Trainer(
            config, method, batch=lambda step: batch, validation=None, output=setting.scratch / "fsdp", extra_files={},
            context=context, parallel=parallel,
        )  # fmt: skip
        trainer.meter.start(0)
        setting.reset_peak()
        seconds = median(setting.seconds(lambda: trainer._train_step(0, []), rounds=4))
        rate = stage.batch_size / seconds
        return {
            "seconds": seconds,
            "batch": stage.batch_size,
            "samples_per_second": rate,
            "samples_per_second_per_gpu": rate / self.count,
            "peak_bytes": setting.peak(),
        }
