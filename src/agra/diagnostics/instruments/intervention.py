"""Interventions on the hidden tokens that the action head reads (3.2, 4.2.1; Table 1, Figs. 2, 5).

The hidden states are computed once. Tokens are replaced in copies of them, and only the path from there to the actions
(a WAM's bridge and action DiT) runs again, with the same action noise on both sides. The deviation Delta is the Euclidean
distance between the two action chunks, normalised as the method predicts them, over all K x D entries (or chosen dimensions).

Every intervention is a table with the token that each position gets: one of the N = T * H * W tokens of the same sample and
layer, their mean (number N), or zeros (N + 1). The identity table therefore copies, and changes no bit. By default an
intervention acts in every read layer and latent frame at once. The paper leaves that open.

A set of tokens is shuffled among its own members. A sensitivity map, which takes one cell at a time, needs another meaning: it
draws one shuffle of all positions within each latent frame, and gives one cell at a time the tokens that it would hold then,
while the rest stay. Under `swap`, a cell changes places with a random other one, which therefore changes too.
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

Kind = Literal["zero", "mean", "shuffle", "swap"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Unit = Literal["column", "token"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """One sample: the results of `ReadsTokens.hidden`, and the other inputs of `ReadsTokens.act_on`."""

    hidden: Mapping[int, Float[Tensor, "T H W D"]]  # at least the read layers
    inputs: PolicyInputs  # of one observation
    noise: Noise  # of one answer

    @property
    def grid(self) -> tuple[int, int, int]:
        """(T, H, W) of the hidden states."""
        t, h, w, _ = next(iter(self.hidden.values())).shape
        return t, h, w


@dataclass(frozen=True, kw_only=True, eq=False)
class SetDeviation:
    """Delta(I) and Delta(B) of one sample under one kind of intervention."""

    interaction: tuple[float, ...]  # one for each noise sample
    background: tuple[tuple[float, ...], ...]  # for each noise sample one for each background set


def token_table(
    tokens: Bool[Tensor, "R T H W"], kind: Kind, *, generator: torch.Generator | None = None
) -> Int[Tensor, "R N"]:
    """The tables that intervene on the chosen tokens of R rows.

    `zero` and `mean` replace them; the mean is over all tokens of the sample and layer. `shuffle` permutes them among
    themselves in one random cycle, so that each one moves if there are two. `swap` exchanges them with as many random
    tokens of the complement. The two random kinds need a CPU `generator`; `ValueError` where the complement is too small.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown intervention {kind!r}: expected one of {', '.join(KINDS)}")
    chosen = tokens.flatten(1).cpu()
    rows, count = chosen.shape
    table = torch.arange(count).repeat(rows, 1)
    if kind in ("zero", "mean"):
        return torch.where(chosen, count if kind == "mean" else count + 1, table)
    if generator is None:
        raise ValueError(f"intervention {kind!r} draws at random: pass a generator")
    for row in range(rows):
        inside = chosen[row].nonzero().flatten()
        inside = inside[torch.randperm(len(inside), generator=generator)]
        if kind == "shuffle":
            table[row, inside] = inside.roll(1)
            continue
        outside = (~chosen[row]).nonzero().flatten()
        if len(outside) < len(inside):
            raise ValueError(
                f"swap: {len(inside)} chosen tokens, but only {len(outside)} outside to exchange them with"
            )
        partners = outside[torch.randperm(len(outside), generator=generator)[: len(inside)]]
        table[row, inside], table[row, partners] = partners, inside
    return table


def shuffled_cells(tokens: Bool[Tensor, "R T H W"], *, generator: torch.Generator) -> Int[Tensor, "R N"]:
    """The tables of a map's shuffle: the chosen tokens take what one shuffle of every latent frame puts there.

    The same shuffle for all rows, one random cycle of the positions, so that each row's tokens come from elsewhere.
    """
    frames, height, width = tokens.shape[1:]
    order = torch.randperm(height * width, generator=generator)
    taken = torch.empty_like(order)
    taken[order] = order.roll(1)
    shuffled = (torch.arange(frames)[:, None] * height * width + taken).flatten()
    return torch.where(tokens.flatten(1).cpu(), shuffled, torch.arange(len(shuffled)))


def intervene(hidden: Float[Tensor, "T H W D"], table: Int[Tensor, "R N"]) -> Float[Tensor, "R T H W D"]:
    """R copies of one sample's hidden states with their tokens taken as the tables say."""
    tokens = hidden.flatten(0, 2)
    mean = tokens.mean(dim=0, keepdim=True)
    tokens = torch.cat([tokens, mean, torch.zeros_like(mean)])
    return tokens[table.to(tokens.device)].unflatten(1, hidden.shape[:3])


@torch.no_grad()
def action_deviation(
    method: Method,
    probe: Probe,
    table: Int[Tensor, "R N"],
    *,
    layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int = 32,
    advance: Callable[[int], None] | None = None,
) -> Float[Tensor, "R"]:
    """Delta of each of R interventions on one sample, float32, on the CPU.

    `layers` restricts the intervention to some read layers, `dimensions` the distance to some action dimensions (those that
    the embodiment has). The untouched prediction is computed in a batch of the same size, and each row is compared with its
    row there: kernels may round differently by batch size, and that must not look like an effect. `advance` is called with
    the number of finished rows, for a progress bar.
    """
    require_eval(method)
    if not isinstance(method, ReadsTokens):
        raise ValueError(f"{method.config.kind}: interventions on tokens are not applicable to this method")
    read = set(method.read_layers)
    affected = read if layers is None else set(layers)
    if not affected <= read:
        raise ValueError(f"layers {sorted(affected)}: the action head reads only {sorted(read)}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    count = table.shape[1]
    untouched = torch.arange(count).expand(1, -1)
    rounds = max(1, -(-len(table) // batch))
    size = -(-len(table) // rounds)

    def act(tables: Tensor) -> Tensor:
        hidden = {
            layer: intervene(probe.hidden[layer], tables if layer in affected else untouched.expand(len(tables), -1))
            for layer in read
        }
        noise = {name: value.expand(len(tables), *value.shape[1:]) for name, value in probe.noise.items()}
        return method.act_on(hidden, probe.inputs.expand(len(tables)), noise, steps=steps).float()

    if not len(table):
        return torch.zeros(0)
    reference = act(untouched.expand(size, -1))
    deviations = []
    for start in range(0, len(table), size):
        part = table[start : start + size].cpu()
        padded = torch.cat([part, untouched.expand(size - len(part), -1)])
        change = (act(padded) - reference)[: len(part)]
        change = change if dimensions is None else change[..., list(dimensions)]
        deviations.append(change.flatten(1).norm(dim=1).cpu())
        if advance is not None:
            advance(len(part))
    return torch.cat(deviations)


def single_token_sets(
    grid: tuple[int, int, int], *, unit: Unit = "column", frames: Sequence[int] | None = None
) -> Bool[Tensor, "R T H W"]:
    """One set for every cell of a sensitivity map.

    `column`: a spatial position in all chosen latent frames at once, H * W sets. `token`: every token of the chosen
    frames by itself, frames * H * W sets.
    """
    t, h, w = grid
    chosen = list(range(t)) if frames is None else [range(t)[frame] for frame in frames]
    cells = torch.eye(h * w, dtype=torch.bool).view(h * w, h, w)
    if unit == "column":
        sets = torch.zeros(h * w, t, h, w, dtype=torch.bool)
        sets[:, chosen] = cells[:, None]
        return sets
    if unit != "token":
        raise ValueError(f"unknown unit {unit!r}: expected column or token")
    sets = torch.zeros(len(chosen), h * w, t, h, w, dtype=torch.bool)
    for row, frame in enumerate(chosen):
        sets[row, :, frame] = cells
    return sets.flatten(0, 1)


def sensitivity_map(
    method: Method,
    probe: Probe,
    *,
    kind: Kind,
    unit: Unit = "column",
    layers: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int = 32,
    generator: torch.Generator | None = None,
    advance: Callable[[int], None] | None = None,
) -> Float[Tensor, "H W"] | Float[Tensor, "frames H W"]:
    """Delta of replacing each token by itself, (H, W) for `column` and (chosen frames, H, W) for `token` (Figs. 2, 5).

    Not scaled; figures stretch each map to [0, 1]. A cell is shuffled as `shuffled_cells` says.
    """
    sets = single_token_sets(probe.grid, unit=unit, frames=frames)
    if kind == "shuffle":
        if generator is None:
            raise ValueError("intervention 'shuffle' draws at random: pass a generator")
        table = shuffled_cells(sets, generator=generator)
    else:
        table = token_table(sets, kind, generator=generator)
    deviations = action_deviation(
        method,
        probe,
        table,
        layers=layers,
        dimensions=dimensions,
        steps=steps,
        batch=batch,
        advance=advance,
    )
    _, h, w = probe.grid
    return deviations.view(h, w) if unit == "column" else deviations.view(-1, h, w)


def matched_background(
    interaction: Bool[Tensor, "T H W"], sets: int, *, generator: torch.Generator
) -> Bool[Tensor, "sets T H W"]:
    """Random sets B outside I with as many tokens as I in every latent frame, so |B| = |I| (4.2.1).

    Matched frame by frame, since the observed frame and the imagined ones need not matter alike. `ValueError` where a
    frame has too few tokens left.
    """
    background = torch.zeros(sets, *interaction.shape, dtype=torch.bool)
    for frame, inside in enumerate(interaction.flatten(1).cpu()):
        outside, wanted = (~inside).nonzero().flatten(), int(inside.sum())
        if len(outside) < wanted:
            raise ValueError(
                f"latent frame {frame}: the interaction mask covers {wanted} of {len(inside)} tokens, too many to"
                " match with background"
            )
        for index in range(sets):
            picked = outside[torch.randperm(len(outside), generator=generator)[:wanted]]
            background[index, frame].view(-1)[picked] = True
    return background


def set_deviation(
    method: Method,
    probes: Sequence[Probe],
    interaction: Bool[Tensor, "T H W"],
    *,
    kinds: Sequence[Kind] = KINDS,
    background_sets: int = 4,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    dimensions: Sequence[int] | None = None,
    steps: int | None = None,
    batch: int = 32,
    advance: Callable[[int], None] | None = None,
) -> dict[Kind, SetDeviation]:
    """Delta(I) and Delta(B) of each kind for one sample under several noise samples (4.2.1).

    `probes` are the sample's, one for each noise sample. Each gets `background_sets` background sets of its own, the same for all kinds,
    and random interventions of its own. `seed` decides them; give each sample its own. Feed the answer's deviations to
    `agra.diagnostics.metrics.matched_sensitivity_ratio`.
    """
    if not interaction.any() or background_sets < 1 or not probes:
        raise ValueError(
            f"expected a non-empty interaction mask, background_sets >= 1 and a probe, got {background_sets} sets,"
            f" {len(probes)} probes"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for probe in probes:
        background = matched_background(interaction, background_sets, generator=generator)
        sets = torch.cat([interaction[None].cpu(), background])
        tables = torch.cat([token_table(sets, kind, generator=generator) for kind in kinds])
        deviations = action_deviation(
            method, probe, tables, layers=layers, dimensions=dimensions, steps=steps, batch=batch, advance=advance
        )
        rows.append(deviations.view(len(kinds), 1 + background_sets))
    stacked = torch.stack(rows, dim=1)  # kind, noise, set
    return {
        kind: SetDeviation(interaction=tuple(each[:, 0].tolist()), background=tuple(map(tuple, each[:, 1:].tolist())))
        for kind, each in zip(kinds, stacked, strict=True)
    }
