"""Interventions on the hidden tokens that the action head reads (3.2, 4.2.1, Table 1, Figs. 2, 5).

The hidden states are computed once. Tokens are replaced in copies of them, and only the path from there to the actions
(a WAM's bridge and action DiT) runs again, with the same action noise on both sides. The deviation Delta is the
Euclidean distance between the two action chunks, normalised as the method predicts them, over all K x D entries (or
chosen dimensions).

Every intervention is a table of token numbers, one for each position: one of the N = T * H * W tokens of the same
sample and layer, their mean (number N), or zeros (N + 1). The identity table copies the tokens and changes no bit. By
default an intervention acts in every read layer and latent frame at once. The paper does not specify this.

A set of tokens is shuffled among its members. A sensitivity map changes one cell at a time, where a shuffle would do
nothing. It therefore draws one shuffle of all positions within each latent frame and applies it to one cell at a time,
with all other cells unchanged. Under `swap`, a cell's tokens are exchanged with as many random tokens, which therefore
change too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from agra.batch import PolicyInputs
from agra.diagnostics.instruments.attention import require_eval
from agra.methods.method import Method, Noise, ReadsTokens
from agra.precision import autocast_to_weights

InterventionKind = Literal["zero", "mean", "shuffle", "swap"]
INTERVENTION_KINDS: tuple[InterventionKind, ...] = get_args(InterventionKind)
MapUnit = Literal["column", "token"]


@dataclass(frozen=True, kw_only=True, eq=False)
class InterventionInputs:
    """One sample to intervene on: its hidden states, and the other inputs of `ReadsTokens.act_on`."""

    hidden: Mapping[int, Float[Tensor, "T H W D"]]  # from `ReadsTokens.hidden`, at least the read layers
    inputs: PolicyInputs  # one observation
    noise: Noise  # for one answer

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W) of the hidden states."""
        t, h, w, _ = next(iter(self.hidden.values())).shape
        return t, h, w


@dataclass(frozen=True, kw_only=True, eq=False)
class SetDeviation:
    """Delta(I) and Delta(B) of one sample under one kind of intervention."""

    interaction: tuple[float, ...]  # by noise sample
    background: tuple[tuple[float, ...], ...]  # by noise sample and background set


def token_table(
    tokens: Bool[Tensor, "R T H W"], kind: InterventionKind, *, generator: torch.Generator | None = None
) -> Int[Tensor, "R N"]:
    """The tables that intervene on the chosen tokens of R rows.

    `zero` and `mean` replace them. The mean is over all tokens of the sample and layer. `shuffle` permutes them among
    themselves in one random cycle, so that each token moves if there are at least two. `swap` exchanges them with as
    many random tokens of the complement. The two random kinds need a CPU `generator`. Raises ValueError where the
    complement is too small.
    """
    if kind not in INTERVENTION_KINDS:
        raise ValueError(f"unknown intervention {kind!r}: expected one of {', '.join(INTERVENTION_KINDS)}")
    selected = tokens.flatten(1).cpu()
    rows, count = selected.shape
    table = torch.arange(count).repeat(rows, 1)
    if kind in ("zero", "mean"):
        return torch.where(selected, count if kind == "mean" else count + 1, table)
    if generator is None:
        raise ValueError(f"intervention {kind!r} is random: pass a generator")
    for row in range(rows):
        inside = selected[row].nonzero().flatten()
        inside = inside[torch.randperm(len(inside), generator=generator)]
        if kind == "shuffle":
            table[row, inside] = inside.roll(1)
            continue
        outside = (~selected[row]).nonzero().flatten()
        if len(outside) < len(inside):
            raise ValueError(
                f"swap: {len(inside)} chosen tokens need as many others to exchange with, but there are {len(outside)}"
            )
        partners = outside[torch.randperm(len(outside), generator=generator)[: len(inside)]]
        table[row, inside], table[row, partners] = partners, inside
    return table


def shuffled_cells(tokens: Bool[Tensor, "R T H W"], *, generator: torch.Generator) -> Int[Tensor, "R N"]:
    """The tables of a map's shuffle: the chosen positions get the tokens that one shuffle of each latent frame puts
    there.

    All rows share the shuffle, one random cycle of the positions, so that every chosen token comes from another
    position.
    """
    frames, height, width = tokens.shape[1:]
    order = torch.randperm(height * width, generator=generator)
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    shuffled = (torch.arange(frames)[:, None] * height * width + taken).flatten()
    return torch.where(tokens.flatten(1).cpu(), shuffled, torch.arange(len(shuffled)))


def intervene(hidden: Float[Tensor, "T H W D"], table: Int[Tensor, "R N"]) -> Float[Tensor, "R T H W D"]:
    """R copies of one sample's hidden states, with the tokens of the tables."""
    tokens = hidden.flatten(0, 2)
    mean = tokens.mean(dim=0, keepdim=True)
    tokens = torch.cat([tokens, mean, torch.zeros_like(mean)])
    return tokens[table.to(tokens.device)].unflatten(1, hidden.shape[:3])


@torch.no_grad()
def action_deviation(
    method: Method,
    sample: InterventionInputs,
    table: Int[Tensor, "R N"],
    *,
    layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Float[Tensor, "R"]:
    """Delta of each of R interventions on one sample, float32, on the CPU.

    `layers` restricts the intervention to some read layers, `dimensions` the distance to some action dimensions (those
    that the embodiment has). The unchanged prediction is computed in a batch of the same size and compared row by row:
    kernels may round differently by batch size, and that must not look like an effect. `advance` is called with the
    number of finished rows, for a progress bar. Raises ValueError for a method without token grids.
    """
    require_eval(method)
    if not isinstance(method, ReadsTokens):
        raise ValueError(f"interventions on tokens are not applicable to the method {method.config.kind}")
    read = set(method.read_layers)
    affected = read if layers is None else set(layers)
    if not affected <= read:
        raise ValueError(
            f"layers: expected some of {sorted(read)}, which the action head reads, got {sorted(affected)}"
        )
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    count = table.shape[1]
    unchanged = torch.arange(count).expand(1, -1)
    rounds = max(1, -(-len(table) // batch))
    size = -(-len(table) // rounds)

    def act(tables: Tensor) -> Tensor:
        hidden = {
            layer: intervene(sample.hidden[layer], tables if layer in affected else unchanged.expand(len(tables), -1))
            for layer in read
        }
        noise = {name: value.expand(len(tables), *value.shape[1:]) for name, value in sample.noise.items()}
        with autocast_to_weights(method):
            return method.act_on(hidden, sample.inputs.expand(len(tables)), noise, steps=steps).float()

    if not len(table):
        return torch.zeros(0)
    reference = act(unchanged.expand(size, -1))
    deviations = []
    for start in range(0, len(table), size):
        part = table[start : start + size].cpu()
        padded = torch.cat([part, unchanged.expand(size - len(part), -1)])
        change = (act(padded) - reference)[: len(part)]
        change = change if dimensions is None else change[..., list(dimensions)]
        deviations.append(change.flatten(1).norm(dim=1).cpu())
        if advance is not None:
            advance(len(part))
    return torch.cat(deviations)


def single_token_sets(
    grid: tuple[int, int, int], *, unit: MapUnit = "column", frames: Sequence[int] | None = None
) -> Bool[Tensor, "R T H W"]:
    """One set for every cell of a sensitivity map.

    `column`: a spatial position in all chosen latent frames at once, H * W sets. `token`: each token of the chosen
    frames alone, frames * H * W sets.
    """
    t, h, w = grid
    places = list(range(t)) if frames is None else [range(t)[frame] for frame in frames]
    cells = torch.eye(h * w, dtype=torch.bool).view(h * w, h, w)
    if unit == "column":
        sets = torch.zeros(h * w, t, h, w, dtype=torch.bool)
        sets[:, places] = cells[:, None]
        return sets
    if unit != "token":
        raise ValueError(f"unit: expected column or token, got {unit!r}")
    sets = torch.zeros(len(places), h * w, t, h, w, dtype=torch.bool)
    for row, frame in enumerate(places):
        sets[row, :, frame] = cells
    return sets.flatten(0, 1)


def sensitivity_map(
    method: Method,
    sample: InterventionInputs,
    *,
    kind: InterventionKind,
    unit: MapUnit = "column",
    layers: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int = 32,
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] | None = None,
) -> Float[Tensor, "H W"] | Float[Tensor, "frames H W"]:
    """Delta of an intervention on each cell alone, (H, W) for `column` and (chosen frames, H, W) for `token` (Figs. 2,
    5).

    The map is not scaled. Figures stretch each map to [0, 1]. `shuffle` uses `shuffled_cells`.
    """
    sets = single_token_sets(sample.grid, unit=unit, frames=frames)
    if kind == "shuffle":
        if generator is None:
            raise ValueError("intervention 'shuffle' is random: pass a generator")
        table = shuffled_cells(sets, generator=generator)
    else:
        table = token_table(sets, kind, generator=generator)
    deviations = action_deviation(
        method,
        sample,
        table,
        layers=layers,
        dimensions=dimensions,
        steps=steps,
        batch=batch,
        advance=advance,
    )
    _, h, w = sample.grid
    return deviations.view(h, w) if unit == "column" else deviations.view(-1, h, w)


def matched_background(
    interaction: Bool[Tensor, "T H W"], sets: int, *, generator: torch.Generator
) -> Bool[Tensor, "sets T H W"]:
    """Random sets B outside I with as many tokens as I in every latent frame, so |B| = |I| (4.2.1).

    Sets are matched per latent frame, since the observed frame and the imagined frames may differ in importance. Raises
    ValueError for a frame with too few tokens outside I.
    """
    background = torch.zeros(sets, *interaction.shape, dtype=torch.bool)
    for frame, inside in enumerate(interaction.flatten(1).cpu()):
        outside, size = (~inside).nonzero().flatten(), int(inside.sum())
        if len(outside) < size:
            raise ValueError(
                f"latent frame {frame}: the interaction mask covers {size} of {len(inside)} tokens, which leaves too "
                "few to match with background"
            )
        for index in range(sets):
            picked = outside[torch.randperm(len(outside), generator=generator)[:size]]
            background[index, frame].view(-1)[picked] = True
    return background


def set_deviation(
    method: Method,
    samples: Sequence[InterventionInputs],
    interaction: Bool[Tensor, "T H W"],
    *,
    kinds: Sequence[InterventionKind] = INTERVENTION_KINDS,
    background_sets: int = 4,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int = 32,
    advance: Callable[[int], None] | None = None,
) -> dict[InterventionKind, SetDeviation]:
    """Delta(I) and Delta(B) of each kind of intervention, for one observation under several noise samples (4.2.1).

    `samples` holds the observation under each noise sample. Every noise sample has its own `background_sets` background
    sets, the same for all kinds, and its own random interventions. They follow from `seed`: pass another one for every
    observation. `agra.diagnostics.metrics.matched_sensitivity_ratio` takes the deviations.
    """
    if not interaction.any() or background_sets < 1 or not samples:
        raise ValueError(
            "expected a non-empty interaction mask, background_sets >= 1 and a noise sample, got "
            f"{int(interaction.sum())} tokens, {background_sets} sets and {len(samples)} noise samples"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample in samples:
        background = matched_background(interaction, background_sets, generator=generator)
        sets = torch.cat([interaction[None].cpu(), background])
        tables = torch.cat([token_table(sets, kind, generator=generator) for kind in kinds])
        deviations = action_deviation(
            method, sample, tables, layers=layers, dimensions=dimensions, steps=steps, batch=batch, advance=advance
        )
        rows.append(deviations.view(len(kinds), 1 + background_sets))
    stacked = torch.stack(rows, dim=1)  # kind, noise, set
    return {
        kind: SetDeviation(interaction=tuple(rows[:, 0].tolist()), background=tuple(map(tuple, rows[:, 1:].tolist())))
        for kind, rows in zip(kinds, stacked, strict=True)
    }
