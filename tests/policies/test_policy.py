"""MethodPolicy in batches: the chunks of single requests, on the fast path and the plain one, and continuations."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from agra.data.normalization.normalize import NormStats
from agra.methods.wam import WAMMethod
from agra.policies.instructions import Instructions
from agra.policies.policy import MethodPolicy
from agra.serving.server.policy_checks import check_policy
from agra.types import BatchPolicy, Continuation, ImaginingPolicy, Observation, PolicyRequest
from agra.wam.codec import to_frames


class Codec:
    """Latents of noise that depend on the frame alone."""

    def encode(self, video):
        rows = [torch.Generator().manual_seed(int(abs(one).sum() * 1000)) for one in video]
        return torch.stack([torch.randn(4, 1, 4, 6, generator=row) for row in rows])


class Text:
    def __init__(self):
        self.encoded = []

    def encode(self, instructions):
        if any(len(one) > 20 for one in instructions):
            raise ValueError("instruction: too long")
        self.encoded += instructions
        return torch.stack([torch.full((5, 12), float(len(one))) for one in instructions])


@pytest.fixture
def make_policy(small_config):
    torch.manual_seed(0)
    method = small_config.method.to_act().build()
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)

    class Rows:
        missing_keys, episodes = (), (0,)

        def states(self, _):
            return rng.normal(size=(50, 4))

        def actions(self, _):
            return rng.normal(size=(50, 3))

    stats = {name: NormStats.of([Rows()], "min_max") for name in small_config.data.embodiments}

    def make(config=small_config, **options):
        instructions = Instructions(Text)
        parts = {"codec": Codec(), "instructions": instructions, "stats": stats}
        return MethodPolicy(name="small", config=config, method=method, **parts, **options)

    return make


def see(policy, seed=0, instruction="go"):
    rng = np.random.default_rng(seed)
    return Observation(
        frame=rng.integers(0, 256, (40, 60, 3), dtype=np.uint8),
        state=rng.normal(size=4).astype(np.float32),
        instruction=instruction,
        embodiment=next(iter(policy.stats)),
    )


@pytest.mark.parametrize("fast", [True, False])
def test_a_batch_gives_the_chunks_of_single_requests(make_policy, fast):
    policy = make_policy(fast=fast)
    assert isinstance(policy, BatchPolicy)
    seen = [see(policy, seed, instruction) for seed, instruction in enumerate(("go", "stop", "go"))]
    requests = [PolicyRequest(observation=one, episode=policy.episode(seed)) for seed, one in enumerate(seen)]
    together = policy.act_batch(requests)
    for seed, (one, chunk) in enumerate(zip(seen, together, strict=True)):
        policy.reset(seed)
        alone = policy.act(one)
        np.testing.assert_allclose(chunk.actions, alone.actions, atol=1e-5)
        assert list(chunk.timings) == ["text", "codec", "video", "bridge", "action"]
    assert not np.allclose(together[0].actions, together[2].actions, atol=1e-2)


def test_the_fast_path_answers_as_the_plain_one(make_policy):
    fast, plain = make_policy(), make_policy(fast=False)
    for step in range(3):
        chunks = [policy.act(see(policy, step)) for policy in (fast, plain)]
        np.testing.assert_allclose(chunks[0].actions, chunks[1].actions, atol=1e-5)
    continuation = Continuation(actions=chunks[0].actions[1:], delay=1)
    held = [policy.act(see(policy, 5), continuation=continuation).actions for policy in (fast, plain)]
    np.testing.assert_allclose(held[0], held[1], atol=1e-5)


def test_a_continuation_is_nearer_to_the_earlier_chunk_and_changes_no_other_row(make_policy):
    policy = make_policy(action_steps=10)
    first = policy.act(see(policy)).actions + np.float32(0.5)  # somewhere else, in the robot's units
    continuation = Continuation(actions=first, delay=2)

    def ask(given):
        pair = (given, None)
        return policy.act_batch(
            [
                PolicyRequest(observation=see(policy, 9 + row), episode=policy.episode(row), continuation=one)
                for row, one in enumerate(pair)
            ]
        )

    held, plain = ask(continuation), ask(None)
    far, near = (np.abs(one[0].actions - first)[:2].mean() for one in (plain, held))
    assert near < 0.7 * far
    np.testing.assert_allclose(held[1].actions, plain[1].actions, atol=1e-5)


def test_instructions_are_encoded_once_and_their_cache_is_bounded(make_policy):
    policy = make_policy()
    for _ in range(3):
        policy.act(see(policy, instruction="go"))
    assert policy.instructions.encoder.encoded == ["go"]
    for number in range(100):
        policy.act(see(policy, instruction=str(number)))
    assert policy.instructions.tokens.cache_info().currsize == 64
    assert policy._prepared.cache_info().currsize == 8


def test_an_invalid_observation_draws_no_noise(make_policy):
    policy = make_policy()
    policy.reset(3)
    with pytest.raises(ValueError, match="too long"):
        policy.act(see(policy, instruction="x" * 30))
    after = policy.act(see(policy)).actions
    policy.reset(3)
    np.testing.assert_array_equal(after, policy.act(see(policy)).actions)


def test_from_zero_noise_the_answer_does_not_depend_on_the_seed_of_the_action(make_policy):
    """The other noise is drawn as before: a WAM's predicted video stays random."""
    random, zero = make_policy(action_noise="random"), make_policy(action_noise="zero")
    observation = see(random)
    drawn = random._draw(1, random.episode(0))
    from_zero = drawn | {"action": torch.zeros_like(drawn["action"])}
    actions = zero._actor.act(zero.encode([observation]), from_zero, [zero._prepared("go")])
    expected = zero.unnormalize(actions, observation.embodiment)[0]
    zero.reset(0)
    np.testing.assert_array_equal(zero.act(observation).actions, expected)
    random.reset(0)
    assert not np.allclose(random.act(observation).actions, expected)
    default = make_policy()  # the recipe's
    assert [policy.spec.action_noise for policy in (default, random, zero)] == ["zero", "random", "zero"]
    with pytest.raises(ValueError, match="action_noise: expected random or zero, got 'one'"):
        make_policy(action_noise="one")


@pytest.mark.parametrize("kind", ["fixed", "zero"])
def test_without_random_noise_an_answer_depends_on_the_observation_alone(make_policy, kind):
    """In every episode and batch. The setting leaves the noise of the action as it was."""
    policy = make_policy(action_noise="zero", video_noise=kind)
    observation = see(policy)
    first, again = (policy.act(observation) for _ in range(2))  # of one episode
    np.testing.assert_array_equal(first.actions, again.actions)
    random = make_policy(action_noise="zero", video_noise="random")
    assert not np.allclose(random.act(observation).actions, random.act(observation).actions)
    alone, other = (PolicyRequest(observation=observation, episode=policy.episode(seed)) for seed in (2, 3))
    for chunk in policy.act_batch([alone, other]):
        np.testing.assert_allclose(chunk.actions, first.actions, atol=1e-5)
    drawn = make_policy(video_noise=kind, action_noise="random")._draw(2, policy.episode(4))
    random = make_policy(video_noise="random", action_noise="random")._draw(2, policy.episode(4))
    assert torch.equal(drawn["action"], random["action"])
    assert torch.equal(drawn["video"][0], drawn["video"][1])
    assert drawn["video"].std() == (0 if kind == "zero" else pytest.approx(1, abs=0.1))
    assert policy.spec.video_noise == kind


def test_invalid_video_noise(make_policy, monkeypatch):
    with pytest.raises(ValueError, match="video_noise: expected random, fixed or zero, got 'one'"):
        make_policy(video_noise="one")
    monkeypatch.setattr(WAMMethod, "noise_shapes", lambda _: {"action": (4, 3)})
    with pytest.raises(ValueError, match="video_noise: wam has no video noise, got fixed"):
        make_policy(video_noise="fixed")
    assert make_policy(video_noise="random").video_noise == "random"


def test_the_spec_describes_the_checkpoint(make_policy):
    spec = make_policy().spec
    robot = next(iter(spec.embodiments.values()))
    assert (spec.name, spec.horizon, spec.frame_size) == ("small", 4, (32, 48))
    assert (robot.state_dim, robot.action_dim) == (4, 3)
    assert dict(robot.action) == {"action": (0, 3)}


def test_imagining_changes_no_action_and_starts_from_the_observation(make_policy):
    policy = make_policy()
    policy.codec.decode = lambda latents: latents[:, :3].clamp(-1, 1)
    assert isinstance(policy, ImaginingPolicy)
    chunks = []
    for act in (policy.act, policy.act_and_imagine):
        policy.reset(3)
        chunks.append([act(see(policy, step)) for step in range(2)])
    for plain, imagining in zip(*chunks, strict=True):
        assert np.array_equal(plain.actions, imagining.actions)
        assert plain.imagined is None
        assert imagining.imagined.dtype == np.uint8
        assert list(imagining.timings)[-1] == "imagine"
    observed = policy.encode([see(policy, 1)]).latents
    assert np.array_equal(chunks[1][1].imagined[0], to_frames(observed[:, :3].clamp(-1, 1))[0, 0])
    policy.imagines = False
    assert policy.act_and_imagine(see(policy)).imagined is None
    assert not policy.spec.imagines


def test_a_text_encoder_is_taken_over_unless_its_projection_differs():
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    loads = []

    def make(projection):
        return Instructions(lambda: loads.append(projection) or Text(), projection=projection)

    serving = make(first)
    make(first).take_encoder(serving)
    assert not loads, "there is nothing to take over, and an encoder may never be needed"
    serving.load()
    same, other = make(deepcopy(first)), make(second)
    same.take_encoder(serving)
    other.take_encoder(serving)
    assert same.encoder is serving.encoder
    assert loads == [first, second]
    known = Instructions(None, {"go": torch.zeros(2, 3)}, projection=first)
    known.take_encoder(serving)
    with pytest.raises(ValueError, match="known instructions alone"):
        _ = known.encoder


def test_prefixes_of_instructions_are_stripped_as_in_training(make_policy, small_config):
    data = replace(small_config.data, strip_prefixes=("unlocked_waist: ", "locked_waist: "))
    policy = make_policy(replace(small_config, data=data))
    chunks = []
    for text in ("go", "unlocked_waist: go", "locked_waist: go"):
        policy.reset(3)
        chunks.append(policy.act(replace(see(policy), instruction=text)).actions)
    assert np.array_equal(chunks[0], chunks[1])
    assert np.array_equal(chunks[0], chunks[2])
    assert policy.instructions.encoder.encoded == ["go"]


def test_a_cropped_policy_warms_up(make_policy, small_config):
    """The blank frame is large enough for the crop, which ends beyond the method's 32 x 48 pixels."""
    data = replace(small_config.data, crop_rows=(20, 70), crop_columns=(10, 90))
    policy = make_policy(replace(small_config, data=data))
    assert policy.blank_observation().frame.shape == (70, 90, 3)
    policy.warm_up(1)
    assert make_policy().blank_observation().frame.shape == (32, 48, 3)


def test_each_camera_has_its_recorded_size(make_policy, small_config):
    """Where a crop counts its pixels. A checkpoint without the sizes takes frames of any size, as before."""
    cameras = {"camera": "observation.images.front", "extra_cameras": ("observation.images.wrist",)}
    config = replace(small_config, data=replace(small_config.data, **cameras, crop_rows=(8, 40)))
    sizes = {"observation.images.front": (48, 64), "observation.images.wrist": (60, 80)}
    policy = make_policy(config, recorded_sizes=dict.fromkeys(config.data.embodiments, sizes))
    blank = policy.blank_observation()
    assert (blank.frame.shape, blank.views["wrist"].shape) == ((48, 64, 3), (60, 80, 3))
    check_policy(policy)
    other = replace(blank, views={"wrist": np.zeros((48, 80, 3), np.uint8)})
    with pytest.raises(ValueError, match=r"wrist: expected 60 x 80 pixels as in the training data, .* got 48 x 80"):
        policy.act(other)
    make_policy(config).act(other)


@pytest.mark.parametrize("crop", [None, (8, 56)])
def test_extra_cameras_are_cropped_and_joined_as_in_training(make_policy, small_config, crop):
    front, wrist = (np.random.default_rng(seed).integers(0, 256, (3, 48, 64, 3), np.uint8) for seed in (0, 1))
    cameras = {"camera": "observation.images.front", "extra_cameras": ("observation.images.wrist",)}
    data = replace(small_config.data, **cameras, crop_columns=crop)
    policy = make_policy(replace(small_config, data=data))
    observation = replace(see(policy), frame=front[0], views={"wrist": wrist[0], "other": wrist[1]})
    trained = data.picture([front, wrist], ["front", "wrist"])[0]
    assert trained.shape == (48, 128 if crop is None else 96, 3)
    np.testing.assert_array_equal(policy.observations.picture(observation), trained)
    policy.warm_up(1)
    with pytest.raises(ValueError, match="expected the extra cameras wrist, got hand; pass the view 'wrist'"):
        policy.act(replace(observation, views={"hand": wrist[0]}))
    with pytest.raises(ValueError, match="expected the extra cameras wrist, got none; pass the view 'wrist'"):
        policy.act(replace(observation, views={}))
    with pytest.raises(ValueError, match="expected none with a joined frame, got wrist"):
        replace(observation, views={"wrist": wrist[0]}, joined=True)
    check_policy(policy)
    joined = replace(observation, frame=np.concatenate([front[0], wrist[0]], axis=1), views={}, joined=True)
    if crop is None:
        np.testing.assert_array_equal(policy.observations.picture(joined), trained)
    else:
        with pytest.raises(ValueError, match=r"expected wrist in Observation\.views, got one joined frame"):
            policy.act(joined)
