from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agra.diagnostics.instruments.intervention import (
    KINDS,
    Probe,
    action_deviation,
    intervene,
    matched_background,
    sensitivity_map,
    set_deviation,
    shuffled_cells,
    single_token_sets,
    token_table,
)

GRID, COUNT = (3, 4, 5), 60


@pytest.fixture
def probe(wam, policy, make_sample):
    prepared = policy.prepare([make_sample().observation])
    hidden = wam.condition(prepared.latents, policy.video_noise(1, 0), prepared.instruction)
    return Probe(
        hidden={layer: h[0] for layer, h in hidden.items()},
        state=prepared.state[0],
        embodiment=prepared.embodiment[0],
        noise=policy.action_noise(1, 0)[0],
    )


def some_tokens(count=6, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(rows, COUNT, dtype=torch.bool)
    for row in chosen:
        row[torch.randperm(COUNT, generator=generator)[:count]] = True
    return chosen.view(rows, *GRID)


def test_tables_do_what_they_say():
    hidden = torch.randn(*GRID, 7, generator=torch.Generator().manual_seed(1))
    tokens = some_tokens(rows=2)
    generator = torch.Generator().manual_seed(2)
    for kind in KINDS:
        changed = intervene(hidden, token_table(tokens, kind, generator=generator))
        for row, chosen in zip(changed, tokens, strict=True):
            if kind != "swap":
                assert torch.equal(row[~chosen], hidden[~chosen])
            if kind == "zero":
                assert (row[chosen] == 0).all()
            if kind == "mean":
                torch.testing.assert_close(row[chosen], hidden.mean(dim=(0, 1, 2)).expand(6, -1))
            if kind in ("shuffle", "swap"):
                assert (row != hidden).any(dim=-1)[chosen].all()  # every chosen token moved
                as_sets = [sorted(map(tuple, x.flatten(0, 2).tolist())) for x in (row, hidden)]
                assert as_sets[0] == as_sets[1]  # and none was lost
            if kind == "swap":
                moved_outside = (row != hidden).any(dim=-1) & ~chosen
                assert moved_outside.sum() == 6
                ours = {tuple(v) for v in row[chosen].tolist()}
                assert ours == {tuple(v) for v in hidden[moved_outside].tolist()}


def test_identity_is_exact_to_the_last_bit(wam, probe):
    nothing = torch.zeros(7, *GRID, dtype=torch.bool)
    for kind in KINDS:
        table = token_table(nothing, kind, generator=torch.Generator().manual_seed(0))
        for batch in (1, 3, 32):
            assert (action_deviation(wam, probe, table, batch=batch) == 0).all()
    copies = intervene(probe.hidden[0], torch.arange(COUNT)[None])
    assert torch.equal(copies[0], probe.hidden[0])


@pytest.mark.parametrize("kind", KINDS)
def test_map_finds_exactly_the_token(wam, probe, target, kind):
    t, h, w = target
    heat = sensitivity_map(wam, probe, kind=kind, unit="token", generator=torch.Generator().manual_seed(0))
    assert heat.shape == GRID
    assert heat[t, h, w] > 0
    if kind != "swap":  # a swap drags its partner along, which may be the target
        assert (heat > 0).sum() == 1
    column = sensitivity_map(wam, probe, kind=kind, generator=torch.Generator().manual_seed(0))
    assert column.shape == GRID[1:]
    assert column[h, w] > 0
    if kind != "swap":
        assert (column > 0).sum() == 1
        torch.testing.assert_close(column[h, w], heat[t, h, w])


def test_frames_and_layers_can_be_chosen(wam, probe, target):
    t, h, w = target
    others = [frame for frame in range(3) if frame != t]
    assert (sensitivity_map(wam, probe, kind="zero", frames=others) == 0).all()
    last = sensitivity_map(wam, probe, kind="zero", unit="token", frames=[-1])
    assert last.shape == (1, 4, 5)
    one, both = (sensitivity_map(wam, probe, kind="zero", layers=layers)[h, w] for layers in ((0,), (0, 2)))
    assert one > 0
    assert one != both
    with pytest.raises(ValueError, match="reads only"):
        sensitivity_map(wam, probe, kind="zero", layers=(1,))


def test_batched_equals_one_token_at_a_time(wam, probe):
    for kind in KINDS:
        batched = sensitivity_map(wam, probe, kind=kind, batch=16, generator=torch.Generator().manual_seed(0))
        sets, draw = single_token_sets(GRID), torch.Generator().manual_seed(0)
        tables = shuffled_cells(sets, generator=draw) if kind == "shuffle" else token_table(sets, kind, generator=draw)
        reference = wam.act(
            wam.guide({k: v[None] for k, v in probe.hidden.items()}),
            probe.state[None], probe.embodiment[None], probe.noise[None],
        )  # fmt: skip
        for h in range(GRID[1]):
            for w in range(GRID[2]):
                hidden = {k: v.clone()[None] for k, v in probe.hidden.items()}
                taken = tables[h * GRID[2] + w]
                for layer, tokens in hidden.items():
                    before = probe.hidden[layer].flatten(0, 2)
                    for place in (taken != torch.arange(COUNT)).nonzero().flatten().tolist():
                        value = 0 if kind == "zero" else before.mean(dim=0) if kind == "mean" else before[taken[place]]
                        tokens[0].view(COUNT, -1)[place] = value
                actions = wam.act(wam.guide(hidden), probe.state[None], probe.embodiment[None], probe.noise[None])
                torch.testing.assert_close((actions - reference).norm(), batched[h, w], atol=1e-6, rtol=1e-5)


def test_order_and_batch_size_do_not_matter(wam, probe):
    tables = token_table(some_tokens(rows=11), "zero")
    order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    forward = action_deviation(wam, probe, tables, batch=4)
    torch.testing.assert_close(action_deviation(wam, probe, tables[order], batch=4), forward[order])
    torch.testing.assert_close(action_deviation(wam, probe, tables, batch=1), forward)
    done = []
    action_deviation(wam, probe, tables, batch=4, advance=done.append)
    assert sum(done) == 11


def test_dimensions_restrict_the_distance(wam, probe):
    tables = token_table(torch.ones(1, *GRID, dtype=torch.bool), "zero")
    parts = [action_deviation(wam, probe, tables, dimensions=[d]) for d in range(3)]
    whole = action_deviation(wam, probe, tables)
    torch.testing.assert_close(torch.stack(parts).square().sum(0).sqrt(), whole)


def test_background_is_matched_frame_by_frame():
    inside = some_tokens(12, seed=3)[0]
    sets = matched_background(inside, 20, generator=torch.Generator().manual_seed(0))
    assert not (sets & inside).any()
    assert (sets.sum(dim=(2, 3)) == inside.sum(dim=(1, 2))).all()
    assert len({tuple(s.flatten().tolist()) for s in sets}) > 15
    with pytest.raises(ValueError, match="too many to match"):
        matched_background(torch.ones(GRID, dtype=torch.bool), 1, generator=torch.Generator())


def test_set_deviation_sees_the_interaction(wam, policy, probe, target):
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[:, target[1], target[2]] = True
    probes = [probe, replace(probe, noise=policy.action_noise(1, 1)[0])]
    answer = set_deviation(wam, probes, inside, background_sets=5, seed=7)
    assert set(answer) == set(KINDS)
    for found in answer.values():
        assert min(found.interaction) > 0
        assert np.isfinite(found.background).all()
        assert (np.shape(found.interaction), np.shape(found.background)) == ((2,), (2, 5))
    for kind in ("zero", "mean", "shuffle"):  # a swap drags its partners along, and the target may be among them
        assert answer[kind].background == ((0,) * 5,) * 2
    again = set_deviation(wam, probes, inside, background_sets=5, seed=7)
    assert answer["swap"].background == again["swap"].background
    assert set_deviation(wam, probes[:1], inside, background_sets=5, seed=7)["swap"].background == answer["swap"].background[:1]
    with pytest.raises(ValueError, match="non-empty"):
        set_deviation(wam, probes, torch.zeros(GRID, dtype=torch.bool))


def test_every_noise_has_sets_of_its_own(wam, probe):
    """The same noise twice: zero replacement differs by nothing but the sets, and a model that reads all sees that."""
    wam.action_dit = lambda x, state, level, guidance, embodiment, return_attention=False: SimpleNamespace(
        velocity=x + sum(g.square().mean(dim=1) @ wam.read for g in guidance).view(x.shape)
    )
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[:, 0, 0] = True
    found = set_deviation(wam, [probe, probe], inside, kinds=("zero",), background_sets=3)["zero"]
    assert found.interaction[0] == found.interaction[1] > 0
    assert not set(found.background[0]) & set(found.background[1])


def test_a_shuffled_cell_takes_another_position_of_its_frame():
    for unit in ("token", "column"):
        sets = single_token_sets(GRID, unit=unit)
        table = shuffled_cells(sets, generator=torch.Generator().manual_seed(0))
        chosen, own = sets.flatten(1), torch.arange(COUNT).expand(len(sets), -1)
        assert (table[~chosen] == own[~chosen]).all()
        assert (table[chosen] != own[chosen]).all()
        assert (table // 20 == own // 20).all()  # the latent frame stays
        assert sorted(table[chosen].tolist()) == list(range(COUNT))  # one shuffle of the picture, cell by cell
    with pytest.raises(ValueError, match="pass a generator"):
        sensitivity_map(None, Probe(hidden={0: torch.zeros(*GRID, 2)}, state=None, embodiment=None, noise=None),
                        kind="shuffle")  # fmt: skip


def test_single_token_sets_cover_each_token_once():
    assert (single_token_sets(GRID, unit="token").sum(dim=0) == 1).all()
    assert (single_token_sets(GRID).sum(dim=0) == 1).all()
