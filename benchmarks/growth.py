"""Growth of cost: tiny's joint step and answer with more tokens, samples and layers, and with more processes.

    python -m benchmarks.growth [--quick]

Each variant alternates with tiny itself, in processor seconds. FLOPs are the planner's count. The ratio is that of two
processes, which take one step together over gloo (FSDP2) with one thread each, against one process with one thread. For larger
machines the planner lays out the paper's model, with the assumptions in the first line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from agra.config import RunConfig
from agra.recipes import agra_dino_l8, tiny
from agra.training.distributed import distributed_context
from agra.training.memory_estimate import count_flops, fake_batch, fake_method, flops_per_sample, measure
from agra.training.optimization import parameter_groups
from agra.training.parallelize import ParallelConfig, apply, shard
from agra.training.plan import CHECKPOINTED, Machines, lay_out
from agra.wam.bridge import bridged_layers
from agra.wam.fast import FastWAM
from agra.wam.model import WAM
from benchmarks.side_by_side import finish, peak_flops, ratio_of

ROUNDS = 7
LAYOUTS = ((8, None), (32, None), (32, 8), (128, None), (128, 8), (256, 8))
"""GPUs, and the number of GPUs that share a copy of the model."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="batches of 8, one round of half of the variants, without the paper's model",
    )
    parser.add_argument(
        "--steps", type=int, help="only take steps, as one of several processes, and print their seconds"
    )
    arguments = parser.parse_args()
    base = tiny()
    if arguments.quick:
        base = replace(base, stage=replace(base.stage, batch_size=8))
    if arguments.steps:
        seconds = _steps(base, arguments.steps)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(seconds))
        return
    rounds = 1 if arguments.quick else ROUNDS
    peak = peak_flops()
    print(f"float32 products: at most {peak / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    larger = variants(base)
    if arguments.quick:
        larger = {name: config for name, config in larger.items() if name.endswith("x 2")}
    rows = _growth(base, larger, rounds, peak)
    steps = 3 if arguments.quick else 10
    torch.set_num_threads(1)
    alone, together = _steps(base, steps), _steps_of_two_processes(steps, quick=arguments.quick)
    result = ratio_of("growth", together, alone, unit="s, a step of two processes and of one")
    print(f"two processes of one thread: {result['ratio']}x one {result['spread']}")
    result |= {"peak_flops": peak, "variants": rows}
    if not arguments.quick:
        result["planned"] = _planned()
    finish(result)


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """Return tiny, whose config is `config`, with one dimension larger, by name."""
    method: Any = config.method
    model, stage = method.model, config.stage
    height, width = model.frame_size

    def with_model(**changes: Any) -> RunConfig:
        return replace(config, method=replace(method, model=replace(model, **changes)))

    def sized(size: tuple[int, int]) -> RunConfig:
        grid = replace(model, frame_size=size, bridge=replace(model.bridge, position_grid=None)).token_grid
        return with_model(frame_size=size, bridge=replace(model.bridge, position_grid=grid))

    def deeper(layers: int) -> RunConfig:
        video = replace(model.video_dit, num_layers=layers)
        bridge = replace(model.bridge, layers=bridged_layers(layers, model.action_dit.num_blocks))
        return with_model(video_dit=video, bridge=bridge)

    return {
        "tokens x 2": sized((height, 2 * width)),
        "tokens x 4": sized((2 * height, 2 * width)),
        "batch x 2": replace(config, stage=replace(stage, batch_size=2 * stage.batch_size)),
        "batch x 4": replace(config, stage=replace(stage, batch_size=4 * stage.batch_size)),
        "video layers x 2": deeper(2 * model.video_dit.num_layers),
        "video layers x 4": deeper(4 * model.video_dit.num_layers),
    }


def _growth(base: RunConfig, larger: dict[str, RunConfig], rounds: int, peak: float) -> list[dict]:
    train, answer = _train_step(base), _answer(base)
    base_work = base.stage.batch_size * flops_per_sample(base), count_flops(answer)
    rows = []
    for name, config in {"tiny": base, **larger}.items():
        calls = (train, answer) if config is base else (_train_step(config), _answer(config))
        work = config.stage.batch_size * flops_per_sample(config), count_flops(calls[1])
        row: dict = {"variant": name}
        for label, call, reference, flops, base_flops in zip(
            ("step", "answer"), calls, (train, answer), work, base_work, strict=True
        ):
            seconds, ratio, spread = _alternate(call, reference, rounds)
            row[label] = {
                "seconds": seconds,
                "times_tiny": ratio,
                "spread": spread,
                "flops_times_tiny": flops / base_flops,
                "share_of_peak": flops / seconds / peak,
            }
        rows.append(row)
        step, act = row["step"], row["answer"]
        print(
            f"{name:18} step {step['seconds']:6.2f} s, {step['times_tiny']:5.2f}x (FLOPs {step['flops_times_tiny']:5.2f}x, "
            f"{100 * step['share_of_peak']:.0f} % of peak)   answer {1e3 * act['seconds']:5.0f} ms, "
            f"{act['times_tiny']:5.2f}x (FLOPs {act['flops_times_tiny']:5.2f}x, {100 * act['share_of_peak']:.0f} %)"
        )
    return rows


def _alternate(
    call: Callable[[], object], reference: Callable[[], object], rounds: int
) -> tuple[float, float, tuple[float, float]]:
    """Return a call's median processor seconds, and its median, smallest and largest ratio to the reference."""
    pairs = [(_processor_seconds(call), _processor_seconds(reference)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return statistics.median(a for a, _ in pairs), statistics.median(ratios), (min(ratios), max(ratios))


def _processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) / torch.get_num_threads()


def _train_step(config: RunConfig) -> Callable[[], None]:
    """Return a joint step on noise, warmed up."""
    torch.manual_seed(0)
    method = fake_method(config)
    optimizer = torch.optim.AdamW(list(parameter_groups(method, config.stage)), fused=True)
    batch = fake_batch(config.method, config.stage.batch_size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method(batch).total.backward()
        optimizer.step()

    step()
    return step


def _answer(config: RunConfig) -> Callable[[], object]:
    """Return the model's part of a policy call on noise, warmed up."""
    torch.manual_seed(0)
    method: Any = config.method
    fast, sample = FastWAM(WAM(method.model).eval().requires_grad_(False)), fake_batch(method, 1)
    assert sample.instruction is not None
    assert sample.latents is not None
    latents, text = sample.latents, fast.instruction(sample.instruction[0])

    @torch.inference_mode()
    def answer() -> object:
        guidance = fast.guide(fast.condition(latents[:, :, :1], latents, [text]))
        return fast.act(guidance, sample.state, sample.embodiment, sample.actions)

    answer()
    return answer


def _steps_of_two_processes(steps: int, *, quick: bool) -> list[float]:
    """Return the seconds of each step that two processes of one thread take together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "benchmarks.growth", "--steps", str(steps), *(["--quick"] if quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def _steps(config: RunConfig, steps: int) -> list[float]:
    """Take steps together with the other processes, and return the seconds of each after a first one."""
    parallel = ParallelConfig()
    torch.manual_seed(0)
    with distributed_context("cpu", shard_degree=None, deterministic=False) as context:
        method = fake_method(config)
        apply(method, parallel)
        if context.mesh is not None:
            shard(method, context.mesh, parallel)
        optimizer = torch.optim.AdamW(list(parameter_groups(method, config.stage)), fused=True)
        batch = fake_batch(config.method, config.stage.batch_size // context.world_size)
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            method(batch).total.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        return times[1:]


def _planned() -> list[dict]:
    config = agra_dino_l8()
    counted = [measure(config, activation_checkpointing=fraction) for fraction in CHECKPOINTED]
    print("agra_dino_l8, batch 256, planned: H100s at 35 % of their peak, all traffic beside the products")
    rows = []
    for gpus, shards in LAYOUTS:
        machines = Machines(gpus=gpus, shard_degree=shards)
        best = lay_out(config, machines, counted).best
        row = {"gpus": gpus, "shards": shards or gpus, "bandwidth": machines.rate, "seconds": best.seconds}
        rows.append(row | {"traffic": best.traffic, "efficiency": best.compute_seconds / best.seconds})
        print(
            f"{gpus:4} GPUs, copies of {shards or gpus:3}, {machines.rate:3.0f} GB/s: {best.seconds:5.2f} s a step, "
            f"{best.traffic / 1e9:5.1f} GB to each, {100 * best.compute_seconds / best.seconds:3.0f} % of the time products"
        )
    return rows


if __name__ == "__main__":
    main()
