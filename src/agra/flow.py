"""Flow matching with noise level 1 as pure noise: noise-level samplers, Euler steps, real-time chunking.

The velocity points from data to noise. The random levels belong to samples, not to processes (`agra.rng`), so a resumed
run draws the same levels.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agra.rng import sample_shard


def _spread(level: Tensor, like: Tensor) -> Tensor:
    """Append axes of size 1 to `level` so that it broadcasts against `like` from the left."""
    if level.ndim > like.ndim or like.shape[: level.ndim] != level.shape:
        raise ValueError(
            f"noise level: expected the leading axes of the data, whose shape is {tuple(like.shape)}, "
            f"got {tuple(level.shape)}"
        )
    return level.reshape(*level.shape, *([1] * (like.ndim - level.ndim)))


def interpolate(data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Return the noisy sample (1 - level) * data + level * noise (Eqs. 8, 11).

    `level` has the leading axes of `data`, usually (B,), and broadcasts over the other axes.
    """
    level = _spread(level, data)
    return (1 - level) * data + level * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return the network's target, d(noisy) / d(level) = noise - data (Eqs. 9, 13)."""
    return noise - data


def logit_normal_levels(count: int, *, shift: float = 5.0) -> Tensor:
    """Draw video noise levels (count,) in (0, 1), distributed as in Cosmos-Predict2.5 (A.1).

    u = sigmoid(N(0, 1)), then shift * u / (1 + (shift - 1) * u). A shift of 1 leaves u unchanged.
    """
    u = torch.sigmoid(sample_shard(torch.randn, count))
    return shift * u / (1 + (shift - 1) * u)


def uniform_levels(count: int) -> Tensor:
    """Draw video noise levels (count,) uniformly in [0, 1), the reading of A.3."""
    return sample_shard(torch.rand, count)


def beta_levels(count: int, *, alpha: float = 1.5, beta: float = 1.0, scale: float = 0.999) -> Tensor:
    """Draw action noise levels (count,) in [0, 1], GR00T's in the paper's direction (Eq. 11, docs/paper.md #21).

    GR00T draws b ~ Beta(alpha, beta) and trains at time (scale - b) / scale, where time 1 is data. The noise level is
    one minus that time, b / scale, clamped to [0, 1]. Most levels are high.
    """
    levels = torch.distributions.Beta(alpha, beta, validate_args=False)
    return (sample_shard(lambda n: levels.sample((n,)), count) / scale).clamp(0, 1)


Predict = Callable[[Tensor, Tensor], Tensor]
"""(sample (B, ...), level (B,)) -> velocity in the sample's shape."""


def euler(predict: Predict | Sequence[Predict], noise: Tensor, steps: int) -> Tensor:
    """Integrate from level 1 to 0 in `steps` equal steps, x -= v / steps (C.1).

    `predict(sample, level)` gets the level as (B,) and returns the velocity in the sample's shape. A sequence holds one
    function for each step.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1 Euler step, got {steps}")
    functions = [predict] * steps if callable(predict) else predict
    if len(functions) != steps:
        raise ValueError(f"predict: expected one function for each of the {steps} Euler steps, got {len(functions)}")
    sample = noise
    for step, function in enumerate(functions):
        level = torch.full((len(noise),), 1 - step / steps, device=noise.device, dtype=torch.float32)
        sample = sample - function(sample, level) / steps
    return sample


# --- real-time chunking: Black, Galliker, Levine, arXiv 2506.07339 ----------------------------------------------------


def continuation_weights(delay: int, overlap: int, horizon: int) -> Tensor:
    """Return how strongly each action of a new chunk follows the old chunk, (horizon,) in [0, 1] (2506.07339, Eq. 5).

    The robot executes the first `delay` actions before the new chunk arrives: weight 1. From there to the end of the
    old chunk, `overlap` actions from now, the weight decays. After the old chunk's end it is 0.
    """
    if not 0 <= delay <= overlap <= horizon:
        raise ValueError(f"expected 0 <= delay <= overlap <= horizon, got {delay}, {overlap} and {horizon}")
    index = torch.arange(horizon)
    remaining = (overlap - index).clamp(min=0) / (overlap - delay + 1)
    return torch.where(index < delay, 1.0, remaining * torch.expm1(remaining) / (math.e - 1))


def continue_chunk(predict: Predict, previous: Tensor, weights: Tensor, *, strength: float = 5.0) -> Predict:
    """Guide `predict` so that the denoised sample agrees with `previous` as far as `weights` say (2506.07339,
    Eqs. 2-4).

    `previous` and `weights` are (B, K, D). `strength` is the equations' beta. Their time is 1 - level and their
    velocity is minus ours. The denoised estimate is therefore sample - level * velocity, the guidance's factor is
    min(beta, ((1 - level)^2 + level^2) / (level * (1 - level))), and the equations' sum becomes a difference.
    """

    def guided(sample: Tensor, level: Tensor) -> Tensor:
        spread = _spread(level, sample)
        with torch.enable_grad():
            sample = sample.detach().requires_grad_()
            velocity = predict(sample, level)
            estimate = sample - spread * velocity
            error = weights * (previous - estimate.detach())
            (correction,) = torch.autograd.grad(estimate, sample, error)
        factor = ((1 - spread) ** 2 + spread**2) / (spread * (1 - spread))
        return velocity.detach() - factor.clamp(max=strength) * correction

    return guided
