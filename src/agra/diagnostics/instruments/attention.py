"""Attention of the action head over the token grid that it reads (3.2, Figs. 2, 5, 15).

The last K query tokens of a WAM's action DiT are its actions, and the state token comes before them. The keys are the
T x H x W guidance tokens of one bridged layer. The paper averages over heads and action tokens, and does not specify
the state token and the denoising step: here the state token is left out and the Euler steps are averaged. Letters: B
samples, J blocks with cross-attention, Q query tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from agra.batch import PolicyInputs
from agra.methods.method import Attends, Method, Noise
from agra.precision import autocast_to_weights

Hidden = Mapping[int, Float[Tensor, "B T H W E"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedAttention:
    """Every attention weight of one action prediction, and the prediction."""

    actions: Float[Tensor, "B K D"]  # normalised
    weights: Float[Tensor, "B steps J heads Q N"]


def require_eval(method: Method) -> None:
    """Raise ValueError in training mode: instruments measure the deployed policy, which has no dropout."""
    if method.training:
        raise ValueError("the method is in training mode, where dropout is on: call eval() before diagnosing it")


def _attending(method: Method) -> Attends:
    """The method, if it can show its attention. Raises ValueError otherwise."""
    require_eval(method)
    if not isinstance(method, Attends):
        raise ValueError(f"attention over token grids is not applicable to the method {method.config.kind}")
    return method


@torch.no_grad()
def capture_attention(
    method: Method, hidden: Hidden, inputs: PolicyInputs, noise: Noise, *, steps: int | None = None
) -> CapturedAttention:
    """The weights of every denoising step, block, head and query token. They are large: pass few samples at a time."""
    weights: list[Tensor] = []
    with autocast_to_weights(method):
        actions = _attending(method).visit_attention(
            hidden, inputs, noise, lambda blocks: weights.append(torch.stack(list(blocks), dim=1)), steps=steps
        )
    return CapturedAttention(actions=actions, weights=torch.stack(weights, dim=1))


def average_queries(weights: Float[Tensor, "*lead heads Q N"], horizon: int) -> Float[Tensor, "*lead N"]:
    """Mean over heads and the last `horizon` queries, which are the action tokens, in float32."""
    if not 1 <= horizon <= weights.shape[-2]:
        raise ValueError(f"attention of {weights.shape[-2]} query tokens does not hold {horizon} action tokens")
    return weights[..., -horizon:, :].float().mean(dim=(-3, -2))


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionParts:
    """Attention of the action tokens along one axis, averaged over the others. Each sums to 1 over the N tokens."""

    steps: Float[Tensor, "B steps J N"]
    heads: Float[Tensor, "B heads J N"]
    actions: Float[Tensor, "B K J N"]


def attention_parts(weights: Float[Tensor, "B steps J heads Q N"], horizon: int) -> AttentionParts:
    """Attention by denoising step, by head and by action token, for each block (Fig. 15).

    Other query tokens are left out.
    """
    if not 1 <= horizon <= weights.shape[-2]:
        raise ValueError(f"attention of {weights.shape[-2]} query tokens does not hold {horizon} action tokens")
    actions = weights[..., -horizon:, :].float()
    return AttentionParts(
        steps=actions.mean(dim=(3, 4)),
        heads=actions.mean(dim=(1, 4)).transpose(1, 2),
        actions=actions.mean(dim=(1, 3)).transpose(1, 2),
    )


@torch.no_grad()
def action_attention(
    method: Method,
    hidden: Hidden,
    inputs: PolicyInputs,
    noise: Noise,
    grid: tuple[int, int, int],
    *,
    steps: int | None = None,
) -> Float[Tensor, "B J T H W"]:
    """Attention of each block over the token grid `grid` = (T, H, W), summing to 1 over it.

    Averaged over heads, action tokens and denoising steps. The average is built step by step, so no full weights are
    kept.
    """
    total: Tensor = torch.zeros(())
    horizon = noise["action"].shape[1]

    def add(blocks: Sequence[Tensor]) -> None:
        nonlocal total
        total = total + torch.stack([average_queries(block, horizon) for block in blocks], dim=1)

    with autocast_to_weights(method):
        _attending(method).visit_attention(hidden, inputs, noise, add, steps=steps)
    if total.shape[-1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"attention over {total.shape[-1]} tokens does not fit the grid {grid}")
    return (total / total.sum(dim=-1, keepdim=True)).unflatten(-1, grid)
