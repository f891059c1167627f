"""Time of a policy call, ours against the stock implementation, with the same checkpoint, observations, noise and actions.

    python -m benchmarks.policy_call [POLICY] [--quick]

Ours encodes an instruction once and computes the guidance once per chunk, with a video pass that ends at the last bridged layer.
The stock implementation repeats both for each of the four denoising steps (benchmarks/stock.py).
"""

import argparse
from itertools import count
from typing import cast

import numpy as np

from agra.policies.load import load_policy
from agra.policies.policy import MethodPolicy
from agra.training.memory_estimate import count_flops
from agra.types import Observation
from benchmarks.side_by_side import compare, finish, peak_flops
from benchmarks.stock import StockPolicy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", nargs="?", default="tabletop-agra")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    arguments = parser.parse_args()
    ours = load_policy(arguments.policy)
    stock = StockPolicy(ours)
    embodiment = next(iter(ours.stats))
    generator = np.random.default_rng(0)
    observations = [
        Observation(
            frame=generator.integers(0, 256, (128, 224, 3), dtype=np.uint8),
            state=generator.normal(size=ours.stats[embodiment].width("state")).astype(np.float32),
            instruction="put the banana on the plate",
            embodiment=embodiment,
        )
        for _ in range(8)
    ]

    def call(policy: MethodPolicy):
        turn = count()
        return lambda: policy.act(observations[next(turn) % len(observations)]).actions

    difference = 0.0
    for observation in observations:
        chunks = []
        for policy in (ours, stock):
            policy.reset(0)
            chunks.append(policy.act(observation).actions)
        difference = max(difference, float(np.abs(chunks[0] - chunks[1]).max()))
    rounds = 20 if arguments.quick else 60
    result = compare("policy_call", call(ours), call(stock), unit="s per chunk", rounds=rounds)
    flops = count_flops(call(ours))
    peak = peak_flops()
    utilization = flops / cast(float, result["ours"]) / peak
    print(
        f"{flops / 1e9:.2f} GFLOP per chunk: ours reaches {100 * utilization:.0f} % of this machine's {peak / 1e9:.0f} GFLOP/s"
    )
    print(f"{result['ratio']}x {result['spread']}, largest difference of an action {difference:.1e}")
    finish(
        result | {"max_abs_difference": difference, "flops": flops, "peak_flops": peak, "share_of_peak": utilization}
    )


if __name__ == "__main__":
    main()
