from dataclasses import replace

import numpy as np
import pytest
import torch

from agra.diagnostics.instruments.intervention import (
    INTERVENTION_KINDS,
    InterventionInputs,
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
def sample(method, policy, make_sample):
    inputs, noise = policy.encode([make_sample().observation]), policy.noise(1, 0)
    hidden = method.hidden(inputs, noise)
    return InterventionInputs(hidden={layer: h[0] for layer, h in hidden.items()}, inputs=inputs, noise=noise)


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
    for kind in INTERVENTION_KINDS:
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


def test_identity_is_exact_to_the_last_bit(method, sample):
    nothing = torch.zeros(7, *GRID, dtype=torch.bool)
    for kind in INTERVENTION_KINDS:
        table = token_table(nothing, kind, generator=torch.Generator().manual_seed(0))
        for batch in (1, 3, 32):
            assert (action_deviation(method, sample, table, batch=batch) == 0).all()
    copies = intervene(sample.hidden[0], torch.arange(COUNT)[None])
    assert torch.equal(copies[0], sample.hidden[0])


@pytest.mark.parametrize("kind", INTERVENTION_KINDS)
def test_map_finds_exactly_the_token(method, sample, target, kind):
    t, h, w = target
    heat = sensitivity_map(method, sample, kind=kind, unit="token", generator=torch.Generator().manual_seed(0))
    assert heat.shape == GRID
    assert heat[t, h, w] > 0
    if kind != "swap":  # a swap drags its partner along, which may be the target
        assert (heat > 0).sum() == 1
    column = sensitivity_map(method, sample, kind=kind, generator=torch.Generator().manual_seed(0))
    assert column.shape == GRID[1:]
    assert column[h, w] > 0
    if kind != "swap":
        assert (column > 0).sum() == 1
        torch.testing.assert_close(column[h, w], heat[t, h, w])


def test_frames_and_layers_can_be_chosen(method, sample, target):
    t, h, w = target
    others = [frame for frame in range(3) if frame != t]
    assert (sensitivity_map(method, sample, kind="zero", frames=others) == 0).all()
    last = sensitivity_map(method, sample, kind="zero", unit="token", frames=[-1])
    assert last.shape == (1, 4, 5)
    one, both = (sensitivity_map(method, sample, kind="zero", layers=layers)[h, w] for layers in ((0,), (0, 2)))
    assert one > 0
    assert one != both
    with pytest.raises(ValueError, match=r"expected some of \[0, 2\]"):
        sensitivity_map(method, sample, kind="zero", layers=(1,))


def test_batched_equals_one_token_at_a_time(method, sample):
    for kind in INTERVENTION_KINDS:
        batched = sensitivity_map(method, sample, kind=kind, batch=16, generator=torch.Generator().manual_seed(0))
        sets, draw = single_token_sets(GRID), torch.Generator().manual_seed(0)
        tables = shuffled_cells(sets, generator=draw) if kind == "shuffle" else token_table(sets, kind, generator=draw)
        unchanged = {layer: states[None] for layer, states in sample.hidden.items()}
        reference = method.act_on(unchanged, sample.inputs, sample.noise)
        for h in range(GRID[1]):
            for w in range(GRID[2]):
                hidden = {k: v.clone()[None] for k, v in sample.hidden.items()}
                taken = tables[h * GRID[2] + w]
                for layer, tokens in hidden.items():
                    before = sample.hidden[layer].flatten(0, 2)
                    for place in (taken != torch.arange(COUNT)).nonzero().flatten().tolist():
                        value = 0 if kind == "zero" else before.mean(dim=0) if kind == "mean" else before[taken[place]]
                        tokens[0].view(COUNT, -1)[place] = value
                actions = method.act_on(hidden, sample.inputs, sample.noise)
                torch.testing.assert_close((actions - reference).norm(), batched[h, w], atol=1e-6, rtol=1e-5)


def test_order_and_batch_size_do_not_matter(method, sample):
    tables = token_table(some_tokens(rows=11), "zero")
    order = torch.randperm(11, generator=torch.Generator().manual_seed(5))
    forward = action_deviation(method, sample, tables, batch=4)
    torch.testing.assert_close(action_deviation(method, sample, tables[order], batch=4), forward[order])
    torch.testing.assert_close(action_deviation(method, sample, tables, batch=1), forward)
    done = []
    action_deviation(method, sample, tables, batch=4, advance=done.append)
    assert sum(done) == 11


def test_dimensions_restrict_the_distance(method, sample):
    tables = token_table(torch.ones(1, *GRID, dtype=torch.bool), "zero")
    parts = [action_deviation(method, sample, tables, dimensions=[d]) for d in range(3)]
    whole = action_deviation(method, sample, tables)
    torch.testing.assert_close(torch.stack(parts).square().sum(0).sqrt(), whole)


def test_background_is_matched_frame_by_frame():
    inside = some_tokens(12, seed=3)[0]
    sets = matched_background(inside, 20, generator=torch.Generator().manual_seed(0))
    assert not (sets & inside).any()
    assert (sets.sum(dim=(2, 3)) == inside.sum(dim=(1, 2))).all()
    assert len({tuple(s.flatten().tolist()) for s in sets}) > 15
    with pytest.raises(ValueError, match="too few to match"):
        matched_background(torch.ones(GRID, dtype=torch.bool), 1, generator=torch.Generator())


def test_set_deviation_sees_the_interaction(method, policy, sample, target):
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[:, target[1], target[2]] = True
    samples = [sample, replace(sample, noise=policy.noise(1, 1))]
    answer = set_deviation(method, samples, inside, background_sets=5, seed=7)
    assert set(answer) == set(INTERVENTION_KINDS)
    for deviation in answer.values():
        assert min(deviation.interaction) > 0
        assert np.isfinite(deviation.background).all()
        assert (np.shape(deviation.interaction), np.shape(deviation.background)) == ((2,), (2, 5))
    for kind in ("zero", "mean", "shuffle"):  # a swap drags its partners along, and the target may be among them
        assert answer[kind].background == ((0,) * 5,) * 2
    again = set_deviation(method, samples, inside, background_sets=5, seed=7)
    assert answer["swap"].background == again["swap"].background
    assert (
        set_deviation(method, samples[:1], inside, background_sets=5, seed=7)["swap"].background
        == answer["swap"].background[:1]
    )
    with pytest.raises(ValueError, match="non-empty"):
        set_deviation(method, samples, torch.zeros(GRID, dtype=torch.bool))


def test_every_noise_has_sets_of_its_own(method, sample):
    """The same noise twice: zero replacement differs by nothing but the sets, and a model that reads all sees that."""
    method.tokens_read = lambda hidden: sum(
        hidden[layer].flatten(1, 3).square().mean(dim=1) for layer in method.read_layers
    )
    inside = torch.zeros(GRID, dtype=torch.bool)
    inside[:, 0, 0] = True
    deviation = set_deviation(method, [sample, sample], inside, kinds=("zero",), background_sets=3)["zero"]
    assert deviation.interaction[0] == deviation.interaction[1] > 0
    assert not set(deviation.background[0]) & set(deviation.background[1])


def test_a_shuffled_cell_takes_another_position_of_its_frame(method, sample):
    for unit in ("token", "column"):
        sets = single_token_sets(GRID, unit=unit)
        table = shuffled_cells(sets, generator=torch.Generator().manual_seed(0))
        chosen, own = sets.flatten(1), torch.arange(COUNT).expand(len(sets), -1)
        assert (table[~chosen] == own[~chosen]).all()
        assert (table[chosen] != own[chosen]).all()
        assert (table // 20 == own // 20).all()  # the latent frame stays
        assert sorted(table[chosen].tolist()) == list(range(COUNT))  # one shuffle of the picture, cell by cell
    with pytest.raises(ValueError, match="pass a generator"):
        sensitivity_map(method, sample, kind="shuffle")


def test_single_token_sets_cover_each_token_once():
    assert (single_token_sets(GRID, unit="token").sum(dim=0) == 1).all()
    assert (single_token_sets(GRID).sum(dim=0) == 1).all()


def test_a_method_without_token_grids_is_named(plain_policy, sample):
    with pytest.raises(ValueError, match="not applicable to the method plain"):
        action_deviation(plain_policy.method, sample, torch.arange(COUNT)[None])
