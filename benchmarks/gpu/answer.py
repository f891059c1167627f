"""Section 3: a policy's answer with the paper's full configuration, from frames and states to actions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from agra.data.normalization.normalize import NormStats
from agra.methods.wam import WAMMethod
from agra.policies.instructions import Instructions
from agra.policies.policy import MethodPolicy
from agra.training.memory_estimate import count_flops
from agra.types import PolicyRequest
from agra.wam.codec import WanCodec
from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting, num_bytes
from benchmarks.stock import StockMethod

INSTRUCTION = "put the bottle into the cabinet"
STEPS = 4
"""Denoising steps of the action head."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to answer, and the seconds that its first call may take."""

    options: Mapping[str, Any]
    stock: bool = False
    compile_seconds: float = 0.0


WAYS = {
    "stock": Way(options={}, stock=True),
    "plain": Way(options={"fast": False}),
    "fast": Way(options={}),
    "compiled": Way(options={"compiled": True}, compile_seconds=60),
    "compiled, pool_future 2": Way(options={"compiled": True, "pool_future": 2}, compile_seconds=45),
}


def run(setting: Setting, section: Section) -> None:
    """Every way at batch 1, then at batch 8. Ways share one method's weights and one codec."""
    config = setting.config()
    method = setting.method(replace(config, method=config.method.to_act()))
    assert isinstance(method, WAMMethod)
    codec = setting.codec()
    policies: dict[str, MethodPolicy] = {}
    chunks: dict[int, np.ndarray] = {}
    flops: dict[tuple[int, int], float] = {}
    for batch in setting.pick((1, 8), (1,)):
        for name, way in WAYS.items():

            def measure(name: str = name, way: Way = way, batch: int = batch) -> Figures:
                if name not in policies:
                    policies[name] = make_policy(
                        setting, StockMethod(method) if way.stock else method, codec, way.options
                    )
                    policies[name].warm_up(1)
                policy, pool = policies[name], way.options.get("pool_future", 1)
                if (batch, pool) not in flops:
                    flops[batch, pool] = _flops(setting, method, codec, pool, batch)
                figures = _answer(setting, policy, batch)
                reference = chunks.setdefault(batch, figures.pop("actions"))
                actions = figures.pop("again")
                return figures | {
                    "flops": flops[batch, pool],
                    "bytes": _weights(method, codec),
                    "largest_difference": float(np.abs(actions - reference).max()),
                }

            section.measure(f"{name}, batch {batch}", measure, needs=10 + way.compile_seconds)


def make_policy(setting: Setting, method: WAMMethod, codec: WanCodec, options: Mapping[str, Any]) -> MethodPolicy:
    """A policy with random statistics and one known instruction."""
    config = setting.config()
    shapes = config.method.shapes
    torch.manual_seed(2)
    tokens = torch.randn(*shapes.instruction)

    def statistics(size: int) -> dict[str, np.ndarray]:
        low, high = -np.ones(size), np.ones(size)
        return {"mean": np.zeros(size), "std": high, "min": low, "max": high, "q01": low, "q99": high, "count": high}

    stats = NormStats(method="mean_std", state=statistics(shapes.state_dim), action=statistics(shapes.action_dim))
    return MethodPolicy(
        name="random",
        config=config,
        method=method,
        codec=codec,
        instructions=Instructions(None, {INSTRUCTION: tokens}),
        stats={config.data.embodiments[0]: stats},
        device=setting.device,
        **options,
    )


def requests(policy: MethodPolicy, batch: int) -> Sequence[PolicyRequest]:
    """Observations of `batch` robots, each with a camera frame of twice the model's size."""
    blank, (height, width) = policy.blank_observation(), policy.frame_size
    frames = np.random.default_rng(0).integers(0, 256, (batch, 2 * height, 2 * width, 3), dtype=np.uint8)
    return [
        PolicyRequest(observation=replace(blank, frame=frame), episode=policy.episode(index))
        for index, frame in enumerate(frames)
    ]


def _answer(setting: Setting, policy: MethodPolicy, batch: int) -> Figures:
    """Percentiles of the answer's time, whole and by stage, recompilations after the warm-up, and memory."""
    first = [chunk.actions for chunk in policy.act_batch(requests(policy, batch))]
    for _ in range(3):  # a CUDA graph is recorded at the second call and replayed at the third
        policy.act_batch(requests(policy, batch))
    warm = policy.recompiles
    setting.reset_peak()
    asked = requests(policy, batch)
    stages: list[Mapping[str, float]] = []
    times = setting.seconds(lambda: stages.append(policy.act_batch(asked)[0].timings), rounds=30)
    again = [chunk.actions for chunk in policy.act_batch(requests(policy, batch))]
    return {
        "seconds": float(np.percentile(times, 50)),
        "p95_seconds": float(np.percentile(times, 95)),
        "stages_ms": {
            stage: 1e3 * float(np.percentile([laps[stage] for laps in stages[-len(times) :]], 50))
            for stage in stages[-1]
        },
        "recompiles": policy.recompiles - warm,
        "peak_bytes": setting.peak(),
        "actions": np.stack(first),
        "again": np.stack(again),
    }


def _flops(setting: Setting, method: WAMMethod, codec: WanCodec, pool_future: int, batch: int) -> float:
    """FLOPs of an answer that computes nothing twice."""
    policy = make_policy(setting, method, codec, {"pool_future": pool_future})
    policy.warm_up(1)
    asked = requests(policy, batch)
    return count_flops(lambda: policy.act_batch(asked))


def _weights(method: WAMMethod, codec: WanCodec) -> int:
    """Bytes of weights that an answer reads: the head's for every denoising step."""
    wam = method.wam
    video = [*wam.video_dit.transformer.transformer_blocks[: max(wam.bridged_layers) + 1]]
    return num_bytes(*video, wam.bridge, codec.vae.encoder) + STEPS * num_bytes(wam.action_dit)
