"""What the grounding monitor costs a training run: tiny's joint step with it, at the default interval, against without.

A training step and a call of the monitor on 24 probe samples are timed in turn, in processor seconds of this process, so
that other work on the machine does not count. `ours` is a step with its share of a call.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from agra.diagnostics.monitors import GroundingMonitor, ProbeInputs
from agra.training.memory_estimate import fake_batch
from agra.recipes import tiny
from agra.methods.wam import Objective
from agra.wam.model import WAM
from benchmarks.side_by_side import finish

SAMPLES, TEACHER_WIDTH = 24, 384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 2 if parser.parse_args().quick else 8
    torch.manual_seed(0)
    config = tiny()
    batch = fake_batch(config, TEACHER_WIDTH, config.stage.batch_size)
    objective = Objective(WAM(config.method.model), config.method.objective, config.method.alignment, TEACHER_WIDTH).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-4)
    masks = torch.zeros(SAMPLES, *config.method.model.token_grid, dtype=torch.bool)
    masks[:, :, 1:3, 2:4] = True
    inputs = ProbeInputs(
        latents=batch.latents[:SAMPLES, :, :1],
        instruction=batch.instruction[:SAMPLES],
        state=batch.state[:SAMPLES],
        embodiment=batch.embodiment[:SAMPLES],
        masks=masks,
    )
    monitor = GroundingMonitor(inputs, config.monitor)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(batch).total.backward()
        optimizer.step()

    pairs = [(_seconds(step), _seconds(lambda: monitor(objective.wam))) for _ in range(1 + rounds)][1:]
    interval = config.stage.validate_every
    shares = [call / interval / one for one, call in pairs]
    one, call = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(shares)
    print(f"a step {one:.3f} s, a call {call:.3f} s, every {interval} steps: {100 * share:.2f} % of the training time")
    finish(
        {
            "name": "monitor",
            "ratio": round(1 / (1 + share), 4),
            "ours": round(one + call / interval, 5),
            "alternative": round(one, 5),
            "unit": "processor seconds a step",
            "spread": [round(1 / (1 + x), 4) for x in (max(shares), min(shares))],
            "overhead": round(share, 5),
            "rounds": rounds,
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        }
    )


def _seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
