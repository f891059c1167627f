"""Sensitivity maps of a tiny policy with 300 tokens, four interventions: batched against one token per forward.

The alternative is the loop that one would write first: the hidden states computed once, as ours has them, then for every
token a copy with that token replaced, the guidance and the action prediction, and the distance to a prediction made once.
Both get the same tables of replacements, and the maps must agree.
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from agra.diagnostics.instruments.intervention import (
    INTERVENTION_KINDS,
    InterventionKind,
    InterventionInputs,
    action_deviation,
    intervene,
    shuffled_cells,
    single_token_sets,
    token_table,
)
from agra.recipes import tiny_wam
from agra.wam.model import WAM
from benchmarks.side_by_side import compare, finish

GRID = (3, 10, 10)
Tables = dict[InterventionKind, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one intervention on a fifth of the tokens, one round")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    model, probe = _policy()
    sets, generator = single_token_sets(GRID, unit="token"), torch.Generator().manual_seed(0)
    sets = sets[::5] if options.quick else sets
    tables: Tables = {
        kind: shuffled_cells(sets, generator=generator)
        if kind == "shuffle"
        else token_table(sets, kind, generator=generator)
        for kind in (INTERVENTION_KINDS[1:2] if options.quick else INTERVENTION_KINDS)
    }
    ours = partial(_batched, model, probe, tables, options.batch)
    alternative = partial(_one_by_one, model, probe, tables)
    first, second = ours(), alternative()
    difference = max((first[kind] - second[kind]).abs().max().item() for kind in tables)
    largest = max(second[kind].max().item() for kind in tables)
    assert difference <= 1e-3 * largest, (difference, largest)
    print(
        f"{len(tables)} maps of {len(sets)} cells; largest difference {difference:.1e}, largest deviation {largest:.2f}"
    )
    result = compare(
        "sensitivity_map",
        ours,
        alternative,
        unit="s for a sample's maps",
        rounds=1 if options.quick else 3,
        warm=True,
    )
    finish(
        result
        | {
            "maps": len(tables),
            "cells": len(sets),
            "tokens": sets[0].numel(),
            "batch": options.batch,
            "max_abs_difference": difference,
        }
    )


def _policy() -> tuple[WAM, InterventionInputs]:
    """tiny_wam on a grid of 3 x 10 x 10 tokens, with fresh weights, and the hidden states of one observation."""
    torch.manual_seed(0)
    config = tiny_wam().model
    frames, rows, columns = GRID
    config = replace(
        config,
        frame_size=(16 * rows, 16 * columns),
        num_frames=4 * (frames - 1) + 1,
        bridge=replace(config.bridge, position_grid=GRID),
    )
    model = WAM(config).eval()
    noise = torch.randn(1, *config.latent_shape)
    instruction = torch.randn(1, config.text.length, config.video_dit.text_dim)
    with torch.no_grad():
        hidden = model.condition(torch.randn_like(noise[:, :, :1]), noise, instruction)
    head = config.action_dit
    return model, InterventionInputs(
        hidden={layer: states[0] for layer, states in hidden.items()},
        state=torch.randn(head.state_dim),
        embodiment=torch.tensor(0),
        noise=torch.randn(head.horizon, head.action_dim),
    )


def _batched(model: WAM, probe: InterventionInputs, tables: Tables, batch: int) -> dict[InterventionKind, Tensor]:
    return {kind: action_deviation(model, probe, table, batch=batch) for kind, table in tables.items()}


@torch.no_grad()
def _one_by_one(model: WAM, probe: InterventionInputs, tables: Tables) -> dict[InterventionKind, Tensor]:
    def act(hidden: dict[int, Tensor]) -> Tensor:
        return model.act(model.guide(hidden), probe.state[None], probe.embodiment[None], probe.noise[None])

    untouched = act({layer: states[None] for layer, states in probe.hidden.items()})
    found = {}
    for kind, table in tables.items():
        distances = [
            (act({layer: intervene(states, row[None]) for layer, states in probe.hidden.items()}) - untouched).norm()
            for row in table
        ]
        found[kind] = torch.stack(distances)
    return found


if __name__ == "__main__":
    main()
