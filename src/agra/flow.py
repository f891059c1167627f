"""Flow matching in the paper's convention: noise level 1 is pure noise, the velocity points from data to noise.

The samplers draw what belongs to a sample (`agra.rng`): a resumed run draws what the interrupted one would have drawn.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from agra.rng import sample_shard


def _spread(level: Tensor, like: Tensor) -> Tensor:
    """Give `level` trailing axes until it broadcasts against `like` from the left."""
    if level.ndim > like.ndim or like.shape[: level.ndim] != level.shape:
        raise ValueError(f"noise level of shape {tuple(level.shape)} does not lead data of shape {tuple(like.shape)}")
    return level.reshape(*level.shape, *([1] * (like.ndim - level.ndim)))


def interpolate(data: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """The noisy sample (1 - level) * data + level * noise.                                        Eqs. 8, 11

    `level` has the leading axes of `data`, usually (B,), and is spread over the rest.
    """
    level = _spread(level, data)
    return (1 - level) * data + level * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: d(noisy)/d(level) = noise - data.                                Eqs. 9, 13"""
    return noise - data


def logit_normal_levels(count: int, *, shift: float = 5.0) -> Tensor:
    """Cosmos's default video noise levels, (count,) in (0, 1).                       A.1; Cosmos-Predict2.5

    u = sigmoid(N(0, 1)), then shift * u / (1 + (shift - 1) * u); shift 1 leaves u alone.
    """
    u = torch.sigmoid(sample_shard(torch.randn, count))
    return shift * u / (1 + (shift - 1) * u)


def uniform_levels(count: int) -> Tensor:
    """Video noise levels uniform in [0, 1), (count,): the reading of A.3."""
    return sample_shard(torch.rand, count)


def beta_levels(count: int, *, alpha: float = 1.5, beta: float = 1.0, scale: float = 0.999) -> Tensor:
    """GR00T's action noise levels in the paper's direction, (count,) in [0, 1].    Eq. 11; docs/paper.md #21

    GR00T draws b ~ Beta(alpha, beta) and trains at time (scale - b) / scale with 1 as data; here the level is one
    minus that, b / scale, clamped to [0, 1]: mostly high noise.
    """
    levels = torch.distributions.Beta(alpha, beta, validate_args=False)
    return (sample_shard(lambda n: levels.sample((n,)), count) / scale).clamp(0, 1)


Predict = Callable[[Tensor, Tensor], Tensor]
"""(sample (B, ...), level (B,)) -> velocity in the sample's shape."""


def euler(predict: Predict, noise: Tensor, steps: int) -> Tensor:
    """Integrate from level 1 to 0 in `steps` equal steps: x -= v / steps.                    C.1

    `predict(sample, level)` gets the level as (B,) and answers the velocity in the sample's shape.
    """
    if steps < 1:
        raise ValueError(f"Euler needs at least one step, got {steps}")
    sample = noise
    for step in range(steps):
        level = torch.full((len(noise),), 1 - step / steps, device=noise.device, dtype=torch.float32)
        sample = sample - predict(sample, level) / steps
    return sample


# --- real-time chunking: Black, Galliker, Levine, arXiv 2506.07339 ----------------------------------------------------


def continuation_weights(delay: int, overlap: int, horizon: int) -> Tensor:
    """How much each action of a new chunk is held to the old one, (horizon,) in [0, 1].            2506.07339, Eq. 5

    The first `delay` will have been executed when the chunk arrives: 1. From there to the old chunk's end, `overlap`
    actions from now, the weight decays; beyond it there is nothing to hold to: 0.
    """
    if not 0 <= delay <= overlap <= horizon:
        raise ValueError(f"expected 0 <= delay <= overlap <= horizon, got {delay}, {overlap} and {horizon}")
    index = torch.arange(horizon)
    share = (overlap - index).clamp(min=0) / (overlap - delay + 1)
    return torch.where(index < delay, 1.0, share * torch.expm1(share) / (math.e - 1))


def continue_chunk(predict: Predict, previous: Tensor, weights: Tensor, *, strength: float = 5.0) -> Predict:
    """`predict` guided so that the denoised sample agrees with `previous` where `weights` say.     2506.07339, Eqs. 2-4

    `previous` and `weights` are (B, K, D); `strength` is the equations' beta. Their time is 1 - level and their velocity
    minus ours, so the denoised estimate is sample - level * velocity, the guidance's factor is
    min(beta, ((1 - level)^2 + level^2) / (level * (1 - level))), and what they add is taken away here.
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
