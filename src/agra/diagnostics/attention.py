"""Where the action DiT reads: its cross-attention over the latent grid.                          3.2; Figs. 2, 5, 15

The action DiT's query tokens end with its K action tokens; the state token comes before them. The keys are the T x H x W
guidance tokens of one bridged layer. The paper averages over heads and action tokens; it leaves open the state token
and the denoising step: here the state token is left out and the Euler steps are averaged. Letters: B samples, J
cross-attention blocks, Q query tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agra import flow

if TYPE_CHECKING:  # only the interface is needed, and importing the model loads diffusers
    from agra.wam.model import WAM


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedAttention:
    """Every weight of one action prediction, and the prediction itself."""

    actions: Float[Tensor, "B K D"]  # normalised
    weights: Float[Tensor, "B steps J heads Q N"]


def require_eval(model: "WAM") -> None:
    """`ValueError` if dropout is on: an instrument must read what the deployed policy does."""
    if model.training:
        raise ValueError("the model is in training mode, where dropout is on: call model.eval() before diagnosing it")


def _visit_attention(
    model: "WAM",
    guidance: Sequence[Float[Tensor, "B N E"]],
    state: Float[Tensor, "B S"],
    embodiment: Int[Tensor, "B"],
    noise: Float[Tensor, "B K D"],
    steps: int,
    visit: Callable[[tuple[Float[Tensor, "B heads Q N"], ...]], None],
) -> Float[Tensor, "B K D"]:
    """The Euler loop of `WAM.act`, showing every step's attention to `visit`."""
    require_eval(model)

    def predict(noisy_actions: Tensor, noise_level: Tensor) -> Tensor:
        output = model.action_dit(noisy_actions, state, noise_level, guidance, embodiment, return_attention=True)
        assert output.attention is not None
        visit(output.attention)
        return output.velocity

    return flow.euler(predict, noise, steps)


@torch.no_grad()
def capture_attention(
    model: "WAM",
    guidance: Sequence[Float[Tensor, "B N E"]],
    state: Float[Tensor, "B S"],
    embodiment: Int[Tensor, "B"],
    noise: Float[Tensor, "B K D"],
    *,
    steps: int = 4,
) -> CapturedAttention:
    """The weights of every denoising step, block, head and query token: large, so for few samples at a time."""
    seen: list[Tensor] = []
    actions = _visit_attention(
        model, guidance, state, embodiment, noise, steps, lambda blocks: seen.append(torch.stack(blocks, dim=1))
    )
    return CapturedAttention(actions=actions, weights=torch.stack(seen, dim=1))


def average_queries(weights: Float[Tensor, "*lead heads Q N"], horizon: int) -> Float[Tensor, "*lead N"]:
    """Mean over heads and the last `horizon` queries, which are the action tokens; float32."""
    if not 1 <= horizon <= weights.shape[-2]:
        raise ValueError(f"attention of {weights.shape[-2]} query tokens does not hold {horizon} action tokens")
    return weights[..., -horizon:, :].float().mean(dim=(-3, -2))


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionParts:
    """The action tokens' attention seen along one axis, averaged over the others; each sums to 1 over the tokens."""

    steps: Float[Tensor, "B steps J N"]
    heads: Float[Tensor, "B heads J N"]
    actions: Float[Tensor, "B K J N"]


def attention_parts(weights: Float[Tensor, "B steps J heads Q N"], horizon: int) -> AttentionParts:
    """By denoising step, by head and by action token, for each block; state and other tokens left out.       Fig. 15"""
    if not 1 <= horizon <= weights.shape[-2]:
        raise ValueError(f"attention of {weights.shape[-2]} query tokens does not hold {horizon} action tokens")
    own = weights[..., -horizon:, :].float()
    return AttentionParts(
        steps=own.mean(dim=(3, 4)),
        heads=own.mean(dim=(1, 4)).transpose(1, 2),
        actions=own.mean(dim=(1, 3)).transpose(1, 2),
    )


@torch.no_grad()
def action_attention(
    model: "WAM",
    guidance: Sequence[Float[Tensor, "B N E"]],
    state: Float[Tensor, "B S"],
    embodiment: Int[Tensor, "B"],
    noise: Float[Tensor, "B K D"],
    grid: tuple[int, int, int],
    *,
    steps: int = 4,
) -> Float[Tensor, "B J T H W"]:
    """Attention of each cross-attention block on the latent grid `grid` = (T, H, W), summing to 1 over it.

    Averaged over heads, action tokens and denoising steps, reduced step by step so that nothing large is kept.
    """
    total: Tensor = torch.zeros(())

    def add(blocks: tuple[Tensor, ...]) -> None:
        nonlocal total
        total = total + torch.stack([average_queries(block, noise.shape[1]) for block in blocks], dim=1)

    _visit_attention(model, guidance, state, embodiment, noise, steps, add)
    if total.shape[-1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(f"attention over {total.shape[-1]} guidance tokens does not fit the grid {grid}")
    return (total / total.sum(dim=-1, keepdim=True)).unflatten(-1, grid)
