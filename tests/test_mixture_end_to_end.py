"""Robot hands, human hands and EgoDex, three embodiments in one run: through all stages to a policy for each."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agra import api
from agra.checkpoints.folder import newest
from agra.data.config import DataConfig, SourceConfig
from agra.data.features.online import OnlineEncoder
from agra.data.features.preparation import open_instructions
from agra.data.importers.egodex import convert_egodex, egodex_source
from agra.data.lerobot.writer import write_dataset
from agra.data.normalization.normalize import NormStats
from agra.data.sampling.sampler import WindowSampler
from agra.data.source import embodiment_stats, open_sources
from agra.policies.export import export
from agra.policies.load import load_policy
from agra.recipes import at_stage, tiny
from agra.serving.server.policy_checks import check_policy
from agra.stages import Stage
from agra.training.distributed import DistributedContext
from agra.types import Embodiment, Episode, Observation
from agra.wam.bridge import bridged_layers
from tests.support.layouts import write_egodex

EMBODIMENTS = ("tabletop", "tabletop_human", "human_egodex")
RECORDED = {"tabletop_human": (48, 64), "human_egodex": (54, 96)}
DIMENSIONS = {"tabletop": 12, "tabletop_human": 12, "human_egodex": 18}


def write_hands(path: Path, name: str, dimensions: int, seed: int, size: tuple[int, int]) -> None:
    """Twelve-dimensional hands before a random picture; the real tabletop needs a renderer."""
    rng = np.random.default_rng(seed)
    names = tuple(f"d{i}" for i in range(dimensions))
    episodes = [
        Episode(
            frames=rng.integers(0, 255, (length, *size, 3), dtype=np.uint8),
            states=rng.normal(seed, 1, (length, dimensions)),
            actions=rng.normal(seed, 1, (length, dimensions)),
            instruction=f"move {index % 2}",
            embodiment=name,
            fps=10,
        )
        for index, length in enumerate((12, 20, 15, 11))
    ]
    write_dataset(path, episodes, embodiment=Embodiment(name=name, state_names=names, action_names=names), fps=10)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    write_hands(folder / "robot", "tabletop", 12, 1, (32, 48))
    write_hands(folder / "human", "tabletop_human", 12, 2, (48, 64))
    convert_egodex(write_egodex(folder / "raw", lengths=(14, 9, 12)), folder / "egodex", size=(54, 96))
    config = tiny()
    model = replace(
        config.method.model,
        frame_size=(32, 48),
        video_dit=replace(config.method.model.video_dit, num_layers=3),
        bridge=replace(config.method.model.bridge, layers=bridged_layers(3, 2), position_grid=(2, 2, 3)),
        action_dit=replace(
            config.method.model.action_dit, num_blocks=2, horizon=8, num_embodiments=3, state_dim=20, action_dim=20
        ),
    )
    alignment = replace(
        config.method.alignment, layers=(1,), teacher=replace(config.method.alignment.teacher, input_size=(28, 42))
    )
    data = DataConfig(
        path=str(folder),
        cache=str(folder / "cache"),
        embodiments=EMBODIMENTS,
        validation_fraction=0.25,
        mixture=(
            SourceConfig(path="robot", embodiment="tabletop", frame_stride=2, weight=2.0),
            SourceConfig(path="human", embodiment="tabletop_human", horizon=6, past_end="mask", crop_rows=(8, 48)),
            egodex_source("egodex", crop_rows=(16, 54), row_stride=3, horizon=4),
        ),
    )
    stage = replace(config.stage, steps=4, batch_size=8, save_every=2, validate_every=4, log_every=1)
    method = replace(config.method, model=model, alignment=alignment)
    config = replace(config, method=method, data=data, stage=stage, visual_reliance=None)
    api.prepare(config)
    return folder, config


@pytest.fixture(scope="module")
def trained(prepared):
    folder, config = prepared
    previous = None
    for stage in Stage:
        assert api.train(at_stage(config, stage), output=folder / stage, init_from=previous)
        previous = folder / stage
    return folder, config


def make_sampler(config, *, rank: int = 0, world_size: int = 1) -> WindowSampler:
    sources = open_sources(config.data)
    tokens = open_instructions(config.method, config.data, sources)
    online = OnlineEncoder.open(config.method, config.data, sources)
    context = DistributedContext(rank=rank, world_size=world_size)
    return api.make_sampler(config, sources, embodiment_stats(sources), tokens, online, context)


def test_actions_are_in_each_embodiment_s_units(trained):
    folder, _ = trained
    for stage in (Stage.JOINT, Stage.FINETUNE):
        policy = load_policy(folder / stage)
        assert set(policy.stats) == set(EMBODIMENTS)
        for name in EMBODIMENTS:
            frame = np.full((*RECORDED.get(name, (60, 96)), 3), 90, np.uint8)
            state = np.zeros(DIMENSIONS[name], np.float32)
            policy.reset(0)
            chunk = policy.act(Observation(frame=frame, state=state, instruction="move 0", embodiment=name))
            assert chunk.actions.shape == (8, DIMENSIONS[name])
            assert np.isfinite(chunk.actions).all()


def test_a_policy_crops_as_training_did(trained):
    """Pixels outside the embodiment's rows change nothing. Pixels inside change the actions."""
    folder, _ = trained
    policy = load_policy(folder / Stage.JOINT)

    def act(frame: np.ndarray) -> np.ndarray:
        policy.reset(0)
        state = np.zeros(12, np.float32)
        return policy.act(Observation(frame=frame, state=state, instruction="", embodiment="tabletop_human")).actions

    frame = np.full((48, 64, 3), 90, np.uint8)
    above, inside = frame.copy(), frame.copy()
    above[:8], inside[8:16] = 255, 255
    assert np.array_equal(act(above), act(frame))
    assert not np.array_equal(act(inside), act(frame))


def test_a_policy_with_a_crop_takes_frames_of_the_recorded_size_alone(trained):
    folder, _ = trained
    policy = load_policy(export(folder / Stage.JOINT, folder / "exported"))
    assert {name: policy.spec.embodiments[name].recorded_sizes for name in RECORDED} == {
        name: (size,) for name, size in RECORDED.items()
    }
    assert policy.spec.embodiments["tabletop"].recorded_sizes == (), "it has no crop, so any size fits"
    check_policy(policy)
    state = np.zeros(12, np.float32)
    larger = Observation(
        frame=np.zeros((96, 128, 3), np.uint8), state=state, instruction="move 0", embodiment="tabletop_human"
    )
    with pytest.raises(ValueError, match=r"the observed frame: expected 48 x 64 pixels .* got 96 x 128"):
        policy.act(larger)
    policy.act(replace(larger, embodiment="tabletop"))


def test_a_checkpoint_holds_the_statistics_of_every_part(trained):
    folder, _ = trained
    stats = NormStats.load_all(newest(folder / Stage.JOINT) / "norm_stats.json")
    assert [part.method for part in stats["human_egodex"].action_parts] == ["mean_std", "rot6d"] * 2
    assert stats["tabletop"].action_parts == ()


def test_samples_belong_to_their_sources(prepared):
    """Weights are 2:1:1. Masks follow each source's horizon and episode end, widths the embodiment."""
    _, config = prepared
    sampler = make_sampler(config)
    drawn = np.concatenate([sampler.windows(step)[:, 0] for step in range(400)])
    assert np.abs(np.bincount(drawn) / len(drawn) - [0.5, 0.25, 0.25]).max() < 0.03
    windows, batch = sampler.windows(3), sampler.batch(3)
    assert set(windows[:, 0]) == {0, 1, 2}
    for row, (source, episode, start) in enumerate(windows):
        mask = batch.action_mask[row].numpy()
        dimensions = DIMENSIONS[EMBODIMENTS[source]]
        length = sampler.windows_of[source].lengths[episode]
        learned = {0: 8, 1: min(6, length - start), 2: 4}[int(source)]
        assert mask[:learned, :dimensions].all()
        assert mask.sum() == learned * dimensions
        assert batch.embodiment[row] == source
        assert (batch.state[row, dimensions:] == 0).all()


def test_predictions_are_those_of_the_first_dataset(prepared):
    """Each dataset holds out one episode. More predictions than that ask for no window of another dataset."""
    _, config = prepared
    monitored = replace(config, monitor=replace(config.monitor, predictions=2))
    sampler = make_sampler(monitored)
    assert [source for source, _ in sampler.validation] == [0, 1, 2]
    monitor = api._monitors(monitored, sampler, {}, None, DistributedContext())["prediction"]
    assert torch.equal(monitor.recorded, sampler.first_batch().latents)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_samples_of_one_process(prepared, world_size):
    _, config = prepared
    for step in (0, 7):
        whole = make_sampler(config).batch(step)
        shares = [make_sampler(config, rank=r, world_size=world_size).batch(step) for r in range(world_size)]
        for name, values in whole.tensors.items():
            union = torch.stack([share.tensors[name] for share in shares], 1).flatten(0, 1)
            assert torch.equal(union, values), name


def test_a_resumed_run_equals_the_uninterrupted_run(trained, tmp_path):
    """The joint run, cut back to its second step and resumed, ends with the same weights, byte for byte."""
    folder, config = trained
    whole = folder / Stage.JOINT
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000004")
    assert api.train(at_stage(config, Stage.JOINT), output=tmp_path / "cut", init_from=folder / Stage.ADAPT)
    names = {path.name for path in (whole / "step_000004").glob("*.safetensors")}
    assert {"video_dit.safetensors", "bridge.safetensors", "action_dit.safetensors", "optimizer.safetensors"} <= names
    for name in names:
        assert (tmp_path / "cut/step_000004" / name).read_bytes() == (whole / "step_000004" / name).read_bytes(), name


def test_uncached_features_equal_the_cached_ones(prepared):
    """Latents and targets of decoded clips equal the cached ones, so a run can train without the cache."""
    _, config = prepared
    cached = make_sampler(config).batch(2)
    for names in ((), ("latents",), ("targets",)):
        without = replace(config, data=replace(config.data, cached=names))
        online = make_sampler(without).batch(2)
        assert torch.equal(online.latents, cached.latents)
        assert torch.equal(online.targets, cached.targets)
        assert torch.equal(online.actions, cached.actions)
