"""The cost of the grounding monitor in training: tiny's joint step with the monitor at the default interval, against without.

    python -m benchmarks.monitor [--quick]

A training step and a call of the monitor on 24 probe samples are timed in turn, in processor seconds of this process, so that
other work on the machine does not count. `ours` is a step with its fraction of a call.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch

from agra.diagnostics.monitors import GroundingMonitor, ProbeInputs
from agra.methods.method import ReadsTokens, observation_inputs
from agra.recipes import tiny
from agra.training.memory_estimate import fake_batch
from benchmarks.side_by_side import finish

SAMPLES = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 2 if parser.parse_args().quick else 8
    torch.manual_seed(0)
    config = tiny()
    batch, method = fake_batch(config.method, config.stage.batch_size), config.method.build().train()
    assert isinstance(method, ReadsTokens)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    masks = torch.zeros(SAMPLES, *method.token_grid, dtype=torch.bool)
    masks[:, :, 1:3, 2:4] = True
    inputs = observation_inputs(fake_batch(config.method, SAMPLES), config.method)
    monitor = GroundingMonitor(ProbeInputs(inputs=inputs, masks=masks), config.monitor)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method(batch).total.backward()
        optimizer.step()

    pairs = [(_seconds(step), _seconds(lambda: monitor(method))) for _ in range(1 + rounds)][1:]
    interval = config.stage.validate_every
    overheads = [call / interval / alone for alone, call in pairs]
    alone, call = (statistics.median(column) for column in zip(*pairs, strict=True))
    overhead = statistics.median(overheads)
    print(
        f"a step {alone:.3f} s, a call {call:.3f} s, every {interval} steps: {100 * overhead:.2f} % of the training time"
    )
    finish(
        {
            "name": "monitor",
            "ratio": round(1 / (1 + overhead), 4),
            "ours": round(alone + call / interval, 5),
            "alternative": round(alone, 5),
            "unit": "processor seconds a step",
            "spread": [round(1 / (1 + x), 4) for x in (max(overheads), min(overheads))],
            "overhead": round(overhead, 5),
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
