"""How cost grows: tiny's joint step and answer with more tokens, samples and layers, and with more processes.

    python -m benchmarks.growth [--quick]

Each variant is timed in turn with tiny itself, in processor seconds; its FLOPs are the planner's count. Two processes take
the same step together over gloo (FSDP2), one thread each, against one with one thread. Past this machine, the paper's
model is laid out by the planner, whose assumptions its first line names.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from agra.config import RunConfig
from agra.training.memory_estimate import count_flops, fake_batch, fake_objective, flops_per_sample, measure
from agra.training.plan import SHARES, Machines, lay_out
from agra.recipes import agra_dino_l8, tiny
from agra.training.parallelize import ParallelConfig, apply, joined, shard
from agra.training.optimization import parameter_groups
from agra.wam.bridge import bridged_layers
from agra.wam.fast import FastWAM
from agra.wam.model import WAM
from benchmarks.side_by_side import finish, peak_flops

ROUNDS = 7
LAYOUTS = ((8, None), (32, None), (32, 8), (128, None), (128, 8), (256, 8))
"""GPUs, and how many share a copy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, without the paper's model")
    parser.add_argument("--steps", type=int, help="as one of several processes: take steps and print their seconds")
    arguments = parser.parse_args()
    if arguments.steps:
        _steps_together(arguments.steps)
        return
    rounds = 2 if arguments.quick else ROUNDS
    peak = peak_flops()
    print(f"float32 products: at most {peak / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    rows = _growth(rounds, peak)
    alone, together = (_seconds_of(size, 3 if arguments.quick else 10) for size in (1, 2))
    print(f"two processes of one thread: {alone / together:.2f}x one")
    result = {"name": "growth", "peak_flops": peak, "variants": rows, "two_processes": alone / together}
    if not arguments.quick:
        result["planned"] = _planned()
    finish(result)


def variants(config: RunConfig) -> dict[str, RunConfig]:
    """tiny, and tiny with one thing larger."""
    model, stage = config.method.model, config.stage
    height, width = model.frame_size

    def sized(size: tuple[int, int], num_frames: int) -> RunConfig:
        changed = replace(model, frame_size=size, num_frames=num_frames)
        grid = changed.token_grid
        return replace(config, model=replace(changed, bridge=replace(model.bridge, position_grid=grid)))

    def deeper(layers: int) -> RunConfig:
        video = replace(model.video_dit, num_layers=layers)
        bridge = replace(model.bridge, layers=bridged_layers(layers, model.action_dit.num_blocks))
        return replace(config, model=replace(model, video_dit=video, bridge=bridge))

    return {
        "tokens x 2": sized((height, 2 * width), model.num_frames),
        "tokens x 4": sized((2 * height, 2 * width), model.num_frames),
        "batch x 2": replace(config, stage=replace(stage, batch_size=2 * stage.batch_size)),
        "batch x 4": replace(config, stage=replace(stage, batch_size=4 * stage.batch_size)),
        "video layers x 2": deeper(2 * model.video_dit.num_layers),
        "video layers x 4": deeper(4 * model.video_dit.num_layers),
    }


def _growth(rounds: int, peak: float) -> list[dict]:
    base = tiny()
    train, answer = _train_step(base), _answer(base)
    flops = base.stage.batch_size * flops_per_sample(base), count_flops(answer)
    rows = []
    for name, config in {"tiny": base, **variants(base)}.items():
        one = (train, answer) if config is base else (_train_step(config), _answer(config))
        work = config.stage.batch_size * flops_per_sample(config), count_flops(one[1])
        row: dict = {"variant": name}
        for label, own, reference, own_flops, base_flops in zip(
            ("step", "answer"), one, (train, answer), work, flops, strict=True
        ):
            seconds, ratio, spread = _in_turn(own, reference, rounds)
            row[label] = {
                "seconds": seconds,
                "times_tiny": ratio,
                "spread": spread,
                "flops_times_tiny": own_flops / base_flops,
                "share_of_peak": own_flops / seconds / peak,
            }
        rows.append(row)
        step, act = row["step"], row["answer"]
        print(
            f"{name:18} step {step['seconds']:6.2f} s, {step['times_tiny']:5.2f}x (FLOPs {step['flops_times_tiny']:5.2f}x, "
            f"{100 * step['share_of_peak']:.0f} % of peak)   answer {1e3 * act['seconds']:5.0f} ms, "
            f"{act['times_tiny']:5.2f}x (FLOPs {act['flops_times_tiny']:5.2f}x, {100 * act['share_of_peak']:.0f} %)"
        )
    return rows


def _in_turn(
    own: Callable[[], object], reference: Callable[[], object], rounds: int
) -> tuple[float, float, tuple[float, float]]:
    """Seconds of a call, and the ratio to the reference with its smallest and largest; in processor seconds."""
    pairs = [(_processor_seconds(own), _processor_seconds(reference)) for _ in range(rounds)]
    ratios = [a / b for a, b in pairs]
    return statistics.median(a for a, _ in pairs), statistics.median(ratios), (min(ratios), max(ratios))


def _processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) / torch.get_num_threads()


def _train_step(config: RunConfig) -> Callable[[], None]:
    """A joint step on noise, warmed up."""
    torch.manual_seed(0)
    objective, width, _ = fake_objective(config)
    optimizer = torch.optim.AdamW(list(parameter_groups(objective, config.stage)), fused=True)
    batch = fake_batch(config, width, config.stage.batch_size)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(batch).total.backward()
        optimizer.step()

    step()
    return step


def _answer(config: RunConfig) -> Callable[[], object]:
    """The model's share of a policy's answer on noise, warmed up."""
    torch.manual_seed(0)
    model = WAM(config.method.model).eval().requires_grad_(False)
    fast, one = FastWAM(model), fake_batch(config, None, 1)
    text = fast.instruction(one.instruction[0])

    @torch.inference_mode()
    def answer() -> object:
        guidance = model.guide(fast.condition(one.latents[:, :, :1], one.latents, [text]))
        return fast.act(guidance, one.state, one.embodiment, one.actions)

    answer()
    return answer


def _seconds_of(size: int, steps: int) -> float:
    """Median seconds of a step that `size` processes take together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), "--master-port", "29571"]
    command += ["-m", "benchmarks.growth", "--steps", str(steps)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def _steps_together(steps: int) -> None:
    config = tiny()
    torch.manual_seed(0)
    with joined(ParallelConfig(), "cpu") as world:
        objective, width, _ = fake_objective(config)
        apply(objective, ParallelConfig())
        if world.mesh is not None:
            shard(objective, world.mesh)
        optimizer = torch.optim.AdamW(list(parameter_groups(objective, config.stage)), fused=True)
        batch = fake_batch(config, width, config.stage.batch_size // world.size)
        times = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            objective(batch).total.backward()
            optimizer.step()
            times.append(time.perf_counter() - start)
        if world.leads:
            print(statistics.median(times[1:]))


def _planned() -> list[dict]:
    config = agra_dino_l8()
    counted = [measure(config, activation_checkpointing=share) for share in SHARES]
    print("agra_dino_l8, batch 256, planned: H100s at 35 % of their peak, all traffic beside the products")
    rows = []
    for gpus, shards in LAYOUTS:
        machines = Machines(gpus=gpus, shards=shards)
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
