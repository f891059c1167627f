"""The cost of frozen features, cached or encoded while training: `agra prepare --estimate`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agra.config import RunConfig
from agra.data.features.preparation import target_limit
from agra.data.source import Source
from agra.methods.method import MethodConfig
from agra.training.memory_estimate import cached_name, encoding_flops_per_sample, feature_width, flops_per_sample
from agra.wam.codec import latent_shape


@dataclass(frozen=True, kw_only=True)
class EncodingCost:
    """Cost of a feature of the training windows: bytes of the cache, or FLOPs of encoding while training."""

    feature: str
    cached: bool
    """True where the config caches the feature."""
    bytes_per_step: int
    """Bytes of a control step in the cache."""
    bytes: int
    """Bytes of all training and validation episodes in the cache."""
    fraction: float
    """Fraction of a training step's FLOPs that encoding takes."""

    def __str__(self) -> str:
        return (
            f"{self.feature}: cached {self.bytes / 1e9:,.1f} GB ({self.bytes_per_step / 1e3:,.0f} kB per control "
            f"step), or encoded while training {self.fraction:.0%} of a step's FLOPs; this config: "
            + ("the cache" if self.cached else "while training")
        )


def encoding_costs(config: RunConfig, sources: Sequence[Source]) -> list[EncodingCost]:
    """Estimate the cost of every frozen feature that a config's method needs. Loads no frozen network."""
    method, cached = config.method, config.data.cached
    encoding, step = encoding_flops_per_sample(method), flops_per_sample(config)
    costs = []
    for name, flops in encoding.items():
        store = cached_name(name)
        limits = [target_limit(method, config.data, source) if store == "targets" else None for source in sources]
        steps = sum(_steps(source, limit) for source, limit in zip(sources, limits, strict=True))
        bytes_per_step = 2 * _values(method, name) + 4  # float16 and a checksum
        online = sum(encoding[other] for other in encoding if other == name or cached_name(other) not in cached)
        costs.append(
            EncodingCost(
                feature=name,
                cached=store in cached,
                bytes_per_step=bytes_per_step,
                bytes=steps * bytes_per_step,
                fraction=flops / (step + online),
            )
        )
    return costs


def _values(method: MethodConfig, feature: str) -> int:
    """Return the count of numbers that the cache holds for a control step."""
    if cached_name(feature) == "targets":
        return math.prod(method.shapes.feature_grid) * feature_width(method)
    assert method.codec is not None
    frames = method.needs().clip if feature == "latents" else 1
    return math.prod(latent_shape(method.codec, method.shapes.frame_size, frames))


def _steps(source: Source, limit: int | None) -> int:
    lengths = source.dataset.lengths[list(source.used)]
    return int((lengths if limit is None else np.minimum(lengths, limit)).sum())
