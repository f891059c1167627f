import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from beartype import beartype
from jaxtyping import Bool, Float, Int, TypeCheckError, jaxtyped
from safetensors import safe_open
from torch import Tensor

from agra.batch import Batch
from agra.data.config import DataConfig, SourceConfig
from agra.data.features.cache import CachedFeature, cache_features, feature_folder
from agra.data.features.instruction_tokens import InstructionTokens
from agra.data.features.preparation import write_instruction_tokens
from agra.data.lerobot.checksums import seal
from agra.data.lerobot.writer import write_dataset
from agra.data.normalization import rotations
from agra.data.sampling.sampler import WindowSampler
from agra.data.sampling.windows import Windows
from agra.data.source import embodiment_stats, held_out, open_sources
from agra.methods.method import Needs, Shapes
from agra.types import Embodiment, Episode

ROBOT = Embodiment(name="bot", state_names=("episode", "step"), action_names=("episode", "step", "none"))
LENGTHS = (12, 30, 7, 15)
STRIDE, HORIZON, FRAMES, REFERENCES = 2, 6, 9, (0, 1, 5)
CONFIG = DataConfig(embodiments=("other", "bot"), frame_stride=STRIDE, validation_fraction=0.25)


@jaxtyped(typechecker=beartype)
def check_shapes(
    *,
    latents: Float[Tensor, "B C T h w"],
    instruction: Float[Tensor, "B L E"],
    state: Float[Tensor, "B S"],
    actions: Float[Tensor, "B K D"],
    action_mask: Bool[Tensor, "B K D"],
    embodiment: Int[Tensor, "B"],
    targets: Float[Tensor, "B T H W P"] | None = None,
    target_rows: Int[Tensor, "R"] | None = None,
) -> None:
    """The fields of a Batch, all letters bound together."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """The settings of a method that the sampler reads."""

    targets: tuple[int, ...] = REFERENCES
    state_dim: int = 4
    action_dim: int = 5
    states: tuple[int, ...] = ()
    batch_multiple: int = 1

    @property
    def shapes(self) -> Shapes:
        return Shapes(
            frame_size=(16, 16),
            horizon=HORIZON,
            state_dim=self.state_dim,
            action_dim=self.action_dim,
            num_embodiments=2,
        )

    def needs(self) -> Needs:
        return Needs(clip=FRAMES, targets=self.targets, states=self.states)


class Labels:
    """Arrays that carry (episode, step) in every row, in the shapes of the real features."""

    def __init__(self, name: str) -> None:
        self.name, self.key = name, {}

    def compute(self, episode: Episode) -> dict[str, np.ndarray]:
        count, which = len(episode), episode.states[0, 0]
        rows = np.zeros((count, 3, 3, 2, 2) if self.name == "latents" else (count, 2, 2, 6), np.float16)
        rows[:, 0], rows[:, 1] = which, np.arange(count).reshape(-1, *[1] * (rows.ndim - 2))
        return {self.name: rows}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixture")
    episodes = [
        Episode(
            frames=np.zeros((n, 16, 16, 3), np.uint8),
            states=np.stack([np.full(n, i), np.arange(n)], 1),
            actions=np.stack([np.full(n, i), np.arange(n), np.ones(n)], 1),
            instruction=f"go {i}",
            embodiment="bot",
            fps=10,
        )
        for i, n in enumerate(LENGTHS)
    ]
    write_dataset(root / "set", episodes, embodiment=ROBOT, fps=10)
    config = replace(CONFIG, path=str(root / "set"))
    (source,) = sources = open_sources(config)
    features = [Labels("latents"), Labels("targets")]
    cache_features(source.dataset, features, root, progress=False)
    opened = {f.name: CachedFeature.open(feature_folder(source.dataset, f, root)) for f in features}
    tokens = InstructionTokens(root / "instructions")
    for i in range(len(LENGTHS)):
        tokens.write(f"go {i}", np.full((5, 4), i, np.float16))
    return config, sources, [opened], embodiment_stats(sources), tokens


def make(parts, change=None, method=None, **changes) -> WindowSampler:
    """A sampler of the parts. `change` sets fields of the config, and with it which episodes are used."""
    options = {"batch_size": 8, "seed": 3} | changes
    config, sources, features, stats, tokens = parts
    if change is not None:
        config = replace(config, **change)
        sources = open_sources(config)
    return WindowSampler(config, method or Method(), sources, features, stats, instructions=tokens, **options)


def same(a: Batch, b: Batch) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def test_states_of_earlier_frames(parts):
    """Two frames before the observation at stride 2. Before the episode its first step repeats."""
    plain, sampler = make(parts), make(parts, method=Method(states=(-2, 0)))
    batch, (stats,) = sampler.batch(0), parts[3].values()
    assert batch.states.shape == (8, 2, 4)
    assert torch.equal(batch.states[:, 1], batch.state)
    assert torch.equal(batch.state, plain.batch(0).state)
    assert "states" not in plain.batch(0).tensors
    windows = sampler.windows(0)
    earlier = [(episode, max(start - 2 * STRIDE, 0)) for _, episode, start in windows]
    assert any(start < 2 * STRIDE for _, _, start in windows)
    values = stats.unnormalize("state", batch.states[:, 0, :2].numpy())
    np.testing.assert_allclose(values, np.array(earlier), atol=1e-4)


def test_shapes(parts):
    config, sources, (opened,), *rest = parts
    batch = make(parts).batch(0)
    check_shapes(**batch.tensors)
    assert batch.latents.shape == (8, 3, 3, 2, 2)
    assert batch.targets is not None
    assert batch.targets.shape == (8, 3, 2, 2, 6)
    assert {batch.latents.dtype, batch.targets.dtype, batch.actions.dtype, batch.state.dtype} == {torch.float32}
    baseline = make((config, sources, [{"latents": opened["latents"]}], *rest), method=Method(targets=())).batch(0)
    check_shapes(**baseline.tensors)
    assert baseline.targets is None
    with pytest.raises(TypeCheckError):  # the check itself can fail
        check_shapes(**replace(batch, actions=batch.actions[:, 1:]).tensors)


def test_everything_in_a_sample_belongs_to_its_window(parts):
    sampler = make(parts)
    own = parts[3]["bot"]
    for step in range(5):
        batch = sampler.batch(step)
        for row, (_, episode, start) in enumerate(sampler.windows(step)):
            last = LENGTHS[episode] - 1
            assert (batch.latents[row, 0] == episode).all()
            assert (batch.latents[row, 1] == start).all()
            assert (batch.instruction[row] == episode).all()
            assert batch.targets is not None
            assert (batch.targets[row, :, 0] == episode).all()
            expected = np.minimum(start + STRIDE * np.array(REFERENCES), last)
            assert batch.targets[row, :, 1, 0, 0].tolist() == expected.tolist()
            assert np.allclose(own.unnormalize("state", batch.state[row, :2].numpy()), [episode, start], atol=1e-5)
            actions = own.unnormalize("action", batch.actions[row, :, :3].numpy())
            steps = np.minimum(start + np.arange(HORIZON), last)
            assert np.allclose(actions, np.stack([steps * 0 + episode, steps, steps * 0 + 1], 1), atol=1e-5)
        assert (batch.state[:, 2:] == 0).all()
        assert (batch.actions[..., 3:] == 0).all()
        assert batch.action_mask[..., :3].all()
        assert not batch.action_mask[..., 3:].any()
        assert (batch.embodiment == 1).all()


def test_an_instruction_is_that_of_the_window_s_first_step(parts, tmp_path):
    config, _, features, stats, tokens = parts
    shutil.copytree(config.path, tmp_path / "set")
    data, episodes = tmp_path / "set/data/chunk-000/file-000.parquet", tmp_path / "set/meta/episodes/chunk-000"
    table = pq.read_table(data)
    index, tasks = table["episode_index"].to_numpy(), table["task_index"].to_numpy().copy()
    tasks[(index == 1) & (table["frame_index"].to_numpy() >= 10)] = 3
    place = table.column_names.index("task_index")
    pq.write_table(table.set_column(place, "task_index", pa.array(tasks)), data)
    listed = pq.read_table(episodes / "file-000.parquet")
    place, texts = listed.column_names.index("tasks"), listed["tasks"].to_pylist()
    texts[1] = ["go 1", "go 3"]
    pq.write_table(listed.set_column(place, "tasks", pa.array(texts)), episodes / "file-000.parquet")
    seal(tmp_path / "set")
    config = replace(config, path=str(tmp_path / "set"), validation_fraction=0, training_episodes=2)
    (source,) = sources = open_sources(config)
    assert [source.dataset.instruction(1, step) for step in (0, 9, 10, 29)] == ["go 1", "go 1", "go 3", "go 3"]
    assert source.dataset.instructions(1) == ("go 1", "go 3")
    assert source.dataset.instructions(0) == ("go 0",)
    sampler = make((config, sources, features, stats, tokens), batch_size=64)
    read = {
        (int(e), int(s >= 10)): int(t[0, 0])
        for (_, e, s), t in zip(sampler.windows(0), sampler.batch(0).instruction, strict=True)
    }
    assert (read[1, 0], read[1, 1], read[0, 1]) == (1, 3, 0)
    write_instruction_tokens(tmp_path / "tokens.safetensors", tokens, sources)
    with safe_open(tmp_path / "tokens.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"go 0", "go 1", "go 3"}


def test_a_step_s_samples_follow_from_seed_and_step(parts):
    one, other = make(parts), make(parts)
    later = one.batch(7)
    for step in (0, 3, 100):
        other.batch(step)
    assert same(later, other.batch(7))
    assert not same(later, one.batch(8))
    assert not same(later, make(parts, seed=4).batch(7))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_one_batch(parts, world_size):
    change = {"target_steps": 5}
    whole = make(parts, change).batch(5)
    shares = [make(parts, change, rank=rank, world_size=world_size).batch(5) for rank in range(world_size)]
    targeted = torch.cat([share.target_rows * world_size + rank for rank, share in enumerate(shares)])
    assert torch.equal(targeted.sort().values, whole.target_rows)
    for name in whole.tensors.keys() - {"target_rows"}:
        union = torch.stack([getattr(share, name) for share in shares], 1).flatten(0, 1)
        assert torch.equal(union, getattr(whole, name)), name


def test_windows_are_uniform_over_the_training_steps(parts):
    windows = np.concatenate([make(parts, batch_size=1000).windows(step) for step in range(40)])
    assert set(windows[:, 0]) == {0}
    windows = windows[:, 1:]
    assert set(windows[:, 0]) == {0, 1, 2}
    counts = {(e, s): 0 for e in range(3) for s in range(LENGTHS[e])}
    for episode, start in windows:
        counts[int(episode), int(start)] += 1
    expected = len(windows) / sum(LENGTHS[:3])
    assert np.abs(np.array(list(counts.values())) / expected - 1).max() < 0.2


def test_early_windows(parts):
    always = {"early_window_fraction": 1.0, "early_window_steps": 10}
    windows = make(parts, always, batch_size=6000).windows(0)[:, 1:]
    assert [windows[windows[:, 0] == e, 1].max() for e in range(3)] == [9, 9, 6]
    assert np.abs(np.bincount(windows[:, 0]) / 2000 - 1).max() < 0.1
    half = make(parts, always | {"early_window_fraction": 0.5}, batch_size=6000).windows(0)[:, 1:]
    late = (half[:, 1] >= 10).mean()
    assert abs(late - 0.5 * 22 / 49) < 0.03
    assert np.array_equal(make(parts, always | {"early_window_fraction": 0.0}).windows(0), make(parts).windows(0))


def test_validation_windows(parts):
    sampler = make(parts)
    batch = sampler.validation_batch()
    check_shapes(**batch.tensors)
    assert len(batch) == 8
    assert (batch.latents[:, 0] == 3).all()
    assert batch.latents[:, 1, 0, 0, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert same(batch, make(parts, seed=9).validation_batch())
    starts = make(parts, batch_size=64).validation_batch().latents[:, 1, 0, 0, 0]
    assert sorted(set(starts.tolist())) == list(range(15))  # fewer windows than samples: some come twice
    shares = [make(parts, rank=rank, world_size=4).validation_batch() for rank in range(4)]
    assert torch.equal(torch.stack([share.latents for share in shares], 1).flatten(0, 1), batch.latents)
    with pytest.raises(ValueError, match="validation needs held-out episodes"):
        make(parts, {"validation_fraction": 0.0}).validation_batch()


@pytest.mark.parametrize("spread", [1, 2, 4])
def test_each_part_of_a_validation_batch_holds_every_source(parts, spread):
    """LDA's tasks are quarters of each micro-batch, and `video_batch_fraction` takes the first ones of it."""
    config, (source,), features, stats, tokens = parts
    fewer = replace(source, validation=range(2, 4))

    def batch(multiple, rank=0, world_size=1):
        options = {"batch_size": 64, "seed": 3, "rank": rank, "world_size": world_size}
        method, sources = Method(batch_multiple=multiple), (source, fewer, source)
        sampler = WindowSampler(config, method, sources, features * 3, stats, instructions=tokens, **options)
        windows = []
        sampler._assemble = windows.append
        sampler.validation_batch()
        return windows[0]

    plain, divided = batch(1), batch(4)
    assert set(map(tuple, plain)) == set(map(tuple, divided))
    for rank in range(spread):
        quarters = batch(4, rank, spread).reshape(4, -1, 3)
        assert [set(quarter[:, 0]) for quarter in quarters] == [{0, 1, 2}] * 4
    assert (np.diff(plain[:, 0]) >= 0).all(), "other methods keep their order"


def test_first_windows(parts):
    sampler = make(parts, {"validation_fraction": 0.75})
    for count, episodes in ((None, [1, 2, 3]), (2, [1, 2])):
        latents = sampler.first_batch(count=count).latents
        assert latents[:, 0, 0, 0, 0].tolist() == episodes
        assert (latents[:, 1] == 0).all()


def test_held_out():
    assert list(held_out(40, 0.05)) == [38, 39]
    assert list(held_out(4, 0.05)) == [3]
    assert list(held_out(4, 0.0)) == []
    with pytest.raises(ValueError, match=r"data\.validation_fraction: .* of 1 episodes leaves none .* set it to 0"):
        held_out(1, 0.05)
    with pytest.raises(ValueError, match=r"0\.9 of 2 episodes leaves none to train on; choose a smaller fraction"):
        held_out(2, 0.9)


def test_few_shot_trains_on_the_first_and_validates_on_the_last(parts):
    sampler = make(parts, {"training_episodes": 2})
    windows = np.concatenate([sampler.windows(step) for step in range(40)])
    assert set(windows[:, 1]) == {0, 1}
    assert sampler.validation == [(0, 3)]
    (source,) = sampler.sources
    assert list(source.used) == [0, 1, 3]
    assert embodiment_stats(sampler.sources)["bot"].state["count"] == [sum(LENGTHS[:2])]


def test_past_the_end(parts):
    """Repeat: learned as they are. Mask: not learned. Inside: no such windows. A shorter horizon of its own: masked."""

    def masks(**change):
        sampler = make(parts, change, batch_size=400)
        return sampler, sampler.windows(0), sampler.batch(0).action_mask[..., 0]

    assert masks()[2].all()
    _, windows, mask = masks(past_end="mask")
    for (_, episode, start), row in zip(windows, mask, strict=True):
        assert row.tolist() == [start + k < LENGTHS[episode] for k in range(HORIZON)]
    assert not mask.all()
    _, windows, mask = masks(past_end="inside")
    assert mask.all()
    span = (FRAMES - 1) * STRIDE + 1
    assert {int(e) for _, e, _ in windows} == {1}  # 17 control steps fit into the longest episode only
    assert max(s for _, _, s in windows) == LENGTHS[1] - span
    inside = make(parts, {"past_end": "inside", "validation_fraction": 0.75, "frame_stride": 1}, batch_size=64)
    latents = inside.validation_batch().latents[:, :2, 0, 0, 0]
    starts = {e: {int(s) for i, s in latents if i == e} for e in (1, 2, 3)}
    assert starts == {1: set(range(22)), 2: set(), 3: set(range(7))}  # 9 control steps fit, in episode 2 never
    with pytest.raises(ValueError, match="no window fits into a held-out episode"):
        make(parts, {"past_end": "inside"}).validation_batch()
    _, _, mask = masks(horizon=4)
    assert mask[:, :4].all()
    assert not mask[:, 4:].any()
    with pytest.raises(ValueError, match="no window of 41 control steps fits"):
        make(parts, {"past_end": "inside", "frame_stride": 5})


def test_relative_actions_stop_at_the_end(parts):
    sampler = make(parts, {"action": ("action",), "relative": ("action",)}, batch_size=200)
    own, batch = parts[3]["bot"], sampler.batch(0)
    for row, (_, episode, start) in enumerate(sampler.windows(0)):
        actions = own.unnormalize("action", batch.actions[row, :, :3].numpy())
        past = start + np.arange(HORIZON) >= LENGTHS[episode]
        np.testing.assert_allclose(actions[past][:, :2], 0, atol=1e-5)
        np.testing.assert_allclose(actions[~past, 1], start + np.arange(HORIZON)[~past], atol=1e-5)


@pytest.mark.parametrize("kind", ["quaternion", "matrix", "rotation_6d"])
def test_rotations_that_are_missing_or_past_the_end_are_by_zero(tmp_path, kind):
    size = rotations.WIDTHS[kind]
    six = np.random.default_rng(0).normal(size=(8, 6))
    turns = rotations.from_six(rotations.to_six(rotations.from_six(six, "matrix"), "matrix"), kind)
    names = ("x", *(f"r{i}" for i in range(size)))
    for folder, columns in (("whole", 1 + size), ("part", 1)):
        actions = np.concatenate([np.ones((8, 1)), turns], axis=1)[:, :columns]
        episode = Episode(
            frames=np.zeros((8, 16, 16, 3), np.uint8),
            states=actions,
            actions=actions,
            instruction="turn",
            embodiment="bot",
            fps=10,
        )
        robot = Embodiment(name="bot", state_names=names[:columns], action_names=names[:columns])
        write_dataset(tmp_path / folder, [episode], embodiment=robot, fps=10)
        keys = {"move": {"start": 0, "end": 1}, "turn": {"start": 1, "end": 1 + size, "rotation_type": kind}}
        modality = {q: dict(list(keys.items())[:columns]) for q in ("state", "action")}
        (tmp_path / folder / "meta/modality.json").write_text(json.dumps(modality))
        seal(tmp_path / folder)
    shared = SourceConfig(embodiment="bot", state=("move", "turn:rot6d"), action=("move", "turn:rot6d"))
    mixture = (
        replace(shared, path="whole", relative=("turn",)),
        replace(shared, path="part", missing_keys=("turn",)),
    )
    config = DataConfig(path=str(tmp_path), mixture=mixture, embodiments=("bot",), validation_fraction=0)
    sources = open_sources(config)
    stats = embodiment_stats(sources)["bot"]
    method = Method(state_dim=7, action_dim=7)
    whole, part = (Windows(source, {}, stats, method).numbers([(0, 4)]) for source in sources)
    np.testing.assert_array_equal(whole.actions[0, 4:, 1:], [[1, 0, 0, 0, 1, 0]] * 2)
    assert not np.array_equal(whole.actions[0, 3, 1:], [1, 0, 0, 0, 1, 0])
    assert not part.action_mask[..., 1:].any()
    assert not part.actions[..., 1:].any()
    assert not part.state[..., 1:].any()


def test_quantiles_of_rare_events_are_refused(tmp_path):
    actions = np.stack([np.arange(300), np.full(300, -1)], axis=1).astype(np.float32)
    actions[:2, 1] = 1
    episode = Episode(
        frames=np.zeros((300, 16, 16, 3), np.uint8),
        states=actions[:, :1],
        actions=actions,
        instruction="close",
        embodiment="bot",
        fps=10,
    )
    robot = Embodiment(name="bot", state_names=("x",), action_names=("x", "gripper"))
    write_dataset(tmp_path / "set", [episode], embodiment=robot, fps=10)
    config = replace(CONFIG, path=str(tmp_path / "set"), validation_fraction=0, normalization="q01_q99")
    with pytest.raises(
        ValueError, match=r"action dimension 1 \(gripper\) is -1 in 98 % of the rows and -1 to 1 in all"
    ):
        embodiment_stats(open_sources(config))
    stats = embodiment_stats(open_sources(replace(config, action=("action:min_max",))))["bot"]
    assert np.array_equal(stats.normalize("action", actions)[:, 1], actions[:, 1])


def test_every_second_row(parts):
    sampler = make(parts, {"row_stride": 2})
    dataset = sampler.sources[0].dataset
    assert (dataset.fps, dataset.lengths.tolist()) == (5, [6, 15, 4, 8])
    assert dataset.states(2)[:, 1].tolist() == [0, 2, 4, 6]
    assert dataset.frames(2).shape[0] == 4


def test_misfits(parts):
    with pytest.raises(ValueError, match=r"embodiment 'bot' is not in data.embodiments \('other',\)"):
        make(parts, {"embodiments": ("other",)})
    with pytest.raises(ValueError, match="action has 3 dimensions, the method takes at most 2"):
        make(parts, method=Method(action_dim=2))
    with pytest.raises(ValueError, match="batch_size 8 must be a multiple of world_size 3"):
        make(parts, world_size=3)


@pytest.mark.parametrize(
    "change",
    [
        {"frame_stride": 0},
        {"validation_fraction": 1.0},
        {"early_window_fraction": 1.1},
        {"early_window_steps": 0},
        {"normalization": "minmax"},
        {"embodiments": ("a", "a")},
    ],
)
def test_config_is_checked(change):
    with pytest.raises(ValueError, match=f"data.{next(iter(change))}"):
        DataConfig(**change)


def test_only_windows_from_the_first_steps_have_targets(parts):
    sampler = make(parts, {"target_steps": 5}, batch_size=64)
    windows, batch = sampler.windows(0), sampler.batch(0)
    assert 0 < len(batch.target_rows) < 64
    assert batch.target_rows.tolist() == [row for row, (_, _, start) in enumerate(windows) if start < 5]
    whole = make(parts, batch_size=64).batch(0)
    assert whole.target_rows is None
    assert torch.equal(batch.targets[batch.target_rows], whole.targets[batch.target_rows])
    others = torch.tensor([start >= 5 for _, _, start in windows])
    assert not batch.targets[others].any()
    with pytest.raises(ValueError, match=r"data\.target_steps: expected at least 1 or None, got 0"):
        replace(CONFIG, target_steps=0)


class Pixels:
    """Random frames of the method's size, as a cached feature."""

    name, key = "frames", {}

    def compute(self, episode: Episode) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(len(episode))
        return {"frames": rng.integers(0, 256, (len(episode), 16, 16, 3), dtype=np.uint8)}


class PixelsAsFeatures:
    """An encoder that returns the frames that it is given."""

    def latents(self, clips) -> Tensor:
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)

    def teacher_grids(self, windows) -> Tensor:
        return torch.from_numpy(np.stack(windows)).float()


def test_latents_and_targets_come_from_frames_with_the_same_shift(parts, tmp_path):
    config, (source,), _, stats, tokens = parts
    cache_features(source.dataset, [Pixels()], tmp_path, progress=False)
    frames = CachedFeature.open(feature_folder(source.dataset, Pixels(), tmp_path))
    config = replace(config, shift=3, cached=("frames",))
    sampler = make((config, (source,), [{"frames": frames}], stats, tokens), online=PixelsAsFeatures())
    assert np.array_equal(sampler.windows(1), make(parts).windows(1))
    batch, again, checked = sampler.batch(1), sampler.batch(1), sampler.validation_batch()
    assert same(batch, again)
    assert batch.targets is not None
    seeds, offsets = np.random.SeedSequence([3, 1, 2]).spawn(8), set()
    for row, (_, episode, start) in enumerate(sampler.windows(1)):
        down, right = np.random.default_rng(seeds[row]).integers(-3, 4, size=2).tolist()
        offsets.add((down, right))
        steps = np.minimum(start + STRIDE * np.arange(FRAMES), LENGTHS[episode] - 1)
        padded = np.pad(frames.read(episode), [(0, 0), (3, 3), (3, 3), (0, 0)], mode="edge")
        moved = padded[:, 3 - down : 19 - down, 3 - right : 19 - right]
        np.testing.assert_array_equal(batch.latents[row].permute(1, 2, 3, 0).numpy(), moved[steps])
        np.testing.assert_array_equal(batch.targets[row].numpy(), moved[steps[list(REFERENCES)]])
    assert len(offsets) > 4
    whole = {
        frames.read(episode)[start].tobytes() for episode in source.validation for start in range(LENGTHS[episode])
    }
    assert all(clip[:, 0].permute(1, 2, 0).numpy().astype(np.uint8).tobytes() in whole for clip in checked.latents)
