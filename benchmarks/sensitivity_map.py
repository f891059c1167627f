"""Sensitivity maps of a tiny policy with 300 tokens under four interventions: batched, against one token per forward.

    python -m benchmarks.sensitivity_map [--quick] [--batch 16]

The alternative is the loop that one would write first. The hidden states are computed once, as in ours. For every token, the
loop copies them with that token replaced, computes the guidance and the action prediction, and takes the distance to one
unchanged prediction. Both use the same tables of replacements, and the maps must agree.
"""

import argparse
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from agra.batch import PolicyInputs
from agra.diagnostics.instruments.intervention import (
    INTERVENTION_KINDS,
    InterventionInputs,
    InterventionKind,
    action_deviation,
    intervene,
    shuffled_cells,
    single_token_sets,
    token_table,
)
from agra.methods.wam import WAMMethod, WAMMethodConfig
from agra.recipes import tiny_wam
from benchmarks.side_by_side import compare, finish

GRID = (3, 10, 10)
Tables = dict[InterventionKind, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one intervention on every fifteenth token, one round")
    parser.add_argument("--batch", type=int, default=16, help="interventions that are computed together")
    options = parser.parse_args()
    method, sample = _policy()
    sets, generator = single_token_sets(GRID, unit="token"), torch.Generator().manual_seed(0)
    sets = sets[::15] if options.quick else sets
    tables: Tables = {
        kind: shuffled_cells(sets, generator=generator)
        if kind == "shuffle"
        else token_table(sets, kind, generator=generator)
        for kind in (INTERVENTION_KINDS[1:2] if options.quick else INTERVENTION_KINDS)
    }
    ours = partial(_batched, method, sample, tables, options.batch)
    alternative = partial(_one_by_one, method, sample, tables)
    first, second = ours(), alternative()
    difference = max((first[kind] - second[kind]).abs().max().item() for kind in tables)
    largest = max(second[kind].max().item() for kind in tables)
    if difference > 1e-3 * largest:
        raise SystemExit(f"the maps differ by {difference:.1e}, at a largest deviation of {largest:.2f}")
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


def _policy() -> tuple[WAMMethod, InterventionInputs]:
    """tiny_wam on a grid of 3 x 10 x 10 tokens, with fresh weights, and the hidden states of one observation."""
    torch.manual_seed(0)
    config = tiny_wam().method
    assert isinstance(config, WAMMethodConfig)
    model, (frames, rows, columns) = config.model, GRID
    model = replace(
        model,
        frame_size=(16 * rows, 16 * columns),
        num_frames=4 * (frames - 1) + 1,
        bridge=replace(model.bridge, position_grid=GRID),
    )
    method = replace(config, model=model).build().eval()
    assert isinstance(method, WAMMethod)
    video = torch.randn(1, *model.latent_shape)
    instruction = torch.randn(1, model.text.length, model.video_dit.text_dim)
    latents, head = torch.randn_like(video[:, :, :1]), model.action_dit
    inputs = PolicyInputs(
        state=torch.randn(1, head.state_dim),
        embodiment=torch.zeros(1, dtype=torch.long),
        latents=latents,
        instruction=instruction,
    )
    noise = {"video": video, "action": torch.randn(1, head.horizon, head.action_dim)}
    with torch.no_grad():
        hidden = method.hidden(inputs, noise)
    sample = InterventionInputs(
        hidden={layer: states[0] for layer, states in hidden.items()}, inputs=inputs, noise=noise
    )
    return method, sample


def _batched(
    method: WAMMethod, sample: InterventionInputs, tables: Tables, batch: int
) -> dict[InterventionKind, Tensor]:
    return {kind: action_deviation(method, sample, table, batch=batch) for kind, table in tables.items()}


@torch.no_grad()
def _one_by_one(method: WAMMethod, sample: InterventionInputs, tables: Tables) -> dict[InterventionKind, Tensor]:
    wam, inputs = method.wam, sample.inputs

    def act(hidden: dict[int, Tensor]) -> Tensor:
        return wam.act(wam.guide(hidden), inputs.state, inputs.embodiment, sample.noise["action"])

    unchanged = act({layer: states[None] for layer, states in sample.hidden.items()})
    deviations = {}
    for kind, table in tables.items():
        distances = [
            (act({layer: intervene(states, row[None]) for layer, states in sample.hidden.items()}) - unchanged).norm()
            for row in table
        ]
        deviations[kind] = torch.stack(distances)
    return deviations


if __name__ == "__main__":
    main()
