"""A session of the demo without its page."""

import numpy as np
import pytest
import torch

from agra.demo.pictures import camera, read
from agra.demo.player import masked
from agra.demo.session import Session, all_trials
from agra.diagnostics.instruments.attention import capture_attention
from agra.evaluation.rollout import run_episode
from agra.policies.load import load_policy
from agra.simulators.registry import expert
from agra.simulators.tabletop.placement import pixels
from agra.simulators.tabletop.tabletop_env import Tabletop
from agra.types import Observation

TRIAL = all_trials()["semantic/place-lemon-plate-or-basket/basket-swapped"]
BANANA = all_trials()["semantic/pick-banana-or-apple/banana-designed"]


@pytest.fixture(scope="module")
def policy():
    return load_policy("tabletop-agra")


@pytest.fixture
def session(policy):
    """The bundled AGRA policy and the scripted expert."""
    opened = Session(["agra", "expert"], lambda name, env: policy if name == "agra" else expert(env), BANANA)
    yield opened
    opened.close()


@pytest.fixture
def experts():
    opened = Session(["one", "two"], lambda _, env: expert(env), BANANA)
    yield opened
    opened.close()


def place(session, name, player=0):
    return session.players[player].simulator.scene.position(name)[:2]


def pixel(session, name, player=0):
    simulator = session.players[player].simulator
    column, row = pixels(simulator.scene, simulator.scene.position(name)[None], simulator.frame_size)[0].round()
    return int(column), int(row)


def test_a_policy_plays_as_in_an_evaluation(session, policy):
    """Also where the policy is shared with other sessions, and its attention and video are shown."""
    session.reset(TRIAL)
    player, executed = session.players[0], []
    while not player.finished:
        session.step()
        executed.append(player.answer.chunk.actions[player.executed - 1])
    env = Tabletop()
    episode = run_episode(policy, env, TRIAL, execute_steps=8, record=False)
    env.close()
    np.testing.assert_array_equal(np.stack(executed), episode.actions)
    assert player.success == episode.success


def test_the_expert_succeeds_and_a_finished_episode_stays(experts):
    while not experts.finished:
        experts.step()
    one, two = experts.players
    assert one.success
    assert one.steps == two.steps < 60
    experts.step()
    assert one.steps == two.steps < 60
    assert experts.rate > 0


def test_attention_is_that_of_the_executed_chunk(session, policy):
    """The same noise: the instrument's actions are the chunk's."""
    player = session.players[0]
    inputs, noise = policy.encode([player.observation]), policy.noise(1, BANANA.seed)
    hidden = policy.method.hidden(inputs, noise)
    captured = capture_attention(policy.method, hidden, inputs, noise)
    actions = policy.unnormalize(captured.actions, "tabletop")[0]
    np.testing.assert_allclose(player.answer.chunk.actions, actions, atol=1e-5)
    horizon = policy.spec.horizon
    weights = captured.weights[0, :, :, :, -horizon:].mean(dim=(0, 1, 2, 3)).reshape(policy.method.token_grid)
    np.testing.assert_allclose(player.answer.attention.grid, weights[0].numpy(), atol=1e-6)
    assert player.answer.attention.on_mask < weights[0].sum()
    assert session.players[1].answer.attention is None


def test_a_mask_hides_a_patch_from_the_policy_alone(session, policy):
    player = session.players[0]
    frame, free = player.observation.frame, player.answer.chunk
    session.restart()
    session.add_mask((60, 90), (40, 70))
    seen = player.answer.seen
    assert session.mask.sum() == 21 * 21
    assert (seen[70:91, 40:61] == frame.reshape(-1, 3).mean(axis=0).round()).all()
    np.testing.assert_array_equal(seen[~session.mask], frame[~session.mask])
    np.testing.assert_array_equal(player.observation.frame, frame)
    # The restarted policy has answered once without the mask, so that this is its second noise.
    generator = torch.Generator().manual_seed(BANANA.seed)
    policy.noise(1, generator)
    second = policy.noise(1, generator)
    actions = policy.method.act(policy.encode([player.observation]), second)
    np.testing.assert_allclose(player.answer.unmasked.actions, policy.unnormalize(actions, "tabletop")[0], atol=1e-5)
    change = policy.normalize(player.answer.chunk.actions, "tabletop") - actions[0, :, :10].numpy()  # of 16, padded
    assert player.answer.deviation == pytest.approx(float(np.sqrt((change**2).sum())), abs=1e-4)
    assert player.answer.deviation > 0.01
    assert session.players[1].answer.deviation is None
    session.clear_mask()
    assert player.answer.deviation is player.answer.unmasked is session.mask is None
    session.restart()
    np.testing.assert_array_equal(player.answer.chunk.actions, free.actions)


def test_a_mask_stays_over_a_restart_and_goes_with_the_scene(experts):
    experts.add_mask((0, 0), (223, 127))
    experts.restart()
    assert len(np.unique(experts.players[0].answer.seen.reshape(-1, 3), axis=0)) == 1
    experts.random(seed=3)
    assert experts.mask is None


def test_past_frames_are_masked_too():
    frame = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    past = Observation(frame=frame, state=np.zeros(2, np.float32), instruction="", embodiment="tabletop")
    now = Observation(frame=frame, state=past.state, instruction="", embodiment="tabletop", past=(past,))
    mask = np.eye(4, dtype=bool)
    hidden = masked(now, mask)
    for seen in (hidden.frame, hidden.past[0].frame):
        assert (seen[mask] == frame.reshape(-1, 3).mean(axis=0).round()).all()
        np.testing.assert_array_equal(seen[~mask], frame[~mask])


def test_the_hand_moves_objects_on_every_table(experts):
    """By a drag, by two clicks and by the list. The policies go on from there."""
    start = place(experts, "can")
    assert "The can is at" in experts.point(0, pixel(experts, "can"), (112, 100), "move")
    np.testing.assert_array_equal(place(experts, "can"), place(experts, "can", player=1))
    assert np.linalg.norm(place(experts, "can") - start) > 0.02
    assert "the can goes" in experts.point(1, pixel(experts, "can"), pixel(experts, "can"), "move")
    experts.point(1, (30, 20), (30, 20), "move")
    assert place(experts, "can")[0] < -0.1
    experts.select("banana")
    experts.point(0, (112, 64), (112, 64), "move")
    assert np.abs(place(experts, "banana")).max() < 0.03
    arranged = place(experts, "banana")
    while not experts.finished:
        experts.step()
    assert experts.players[0].success
    experts.restart()
    np.testing.assert_allclose(place(experts, "banana"), arranged, atol=0.004)


def test_a_move_that_one_table_refuses_moves_nothing(experts):
    for player in experts.players[:1]:  # on the first table alone the apple is elsewhere
        scene = player.simulator.scene
        scene.place_item("apple", (0.0, 0.03), 0.0, 0.0)
    before = [place(experts, "can", player) for player in range(2)]
    with pytest.raises(ValueError, match="the apple is there"):
        experts.move("can", (0.0, 0.03))
    np.testing.assert_array_equal([place(experts, "can", player) for player in range(2)], before)
    assert experts.point(0, (2, 2), (2, 2), "move") == "No object there."
    with pytest.raises(ValueError, match="expected one of the 224 x 128 frame"):
        experts.point(0, (224, 0), (0, 0), "mask")


def test_a_task_of_the_scene_is_judged_and_other_words_are_not(experts):
    assert experts.instructions == [f"put the {item} in the box" for item in ("banana", "apple", "can")]
    assert experts.instruct(" Put the  apple in the box. ") == "Instruction: put the apple in the box."
    while not experts.finished:
        experts.step()
    scene = experts.players[0].simulator.scene
    assert experts.players[0].success
    assert scene.within("apple", "box")
    assert "success is not judged" in experts.instruct("wave at me")
    assert experts.players[0].observation.instruction == "wave at me"
    experts.step()
    assert not experts.players[0].success
    for text in ("  ", "x" * 201):
        with pytest.raises(ValueError, match="expected 1 to 200 characters"):
            experts.instruct(text)


def test_pictures_show_plan_mask_and_attention(session):
    player = session.players[0]
    free = camera(player, None)
    assert free.shape == (256, 448, 3)
    session.add_mask((40, 70), (60, 90))
    covered = camera(player, session.mask, corner=(10, 10))
    assert (covered[140:182, 80] == (20, 110, 255)).all()  # the mask's left border
    assert (covered == 255).all(axis=-1).any()  # the plan without the mask
    brightest = np.unravel_index(player.answer.attention.grid.argmax(), player.answer.attention.grid.shape)
    height, width = (size / cells for size, cells in zip((128, 224), player.answer.attention.grid.shape, strict=True))
    row, column = (int((cell + 0.5) * size) for cell, size in zip(brightest, (height, width), strict=True))
    seen = player.answer.seen[row, column].astype(float)
    expected = seen + 0.65 * (np.array((252, 255, 164)) - seen)
    np.testing.assert_allclose(read(player)[row, column], expected, atol=0.51)
    np.testing.assert_array_equal(read(session.players[1]), session.players[1].answer.seen)
