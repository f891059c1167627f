"""Robot hands, human hands and EgoDex, three embodiments in one run: through all stages to a policy for each."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.layouts import write_egodex

from agra import prepare as frozen
from agra import run
from agra.alignment.teacher import reference_frames
from agra.data.config import SourceConfig
from agra.data.importers.egodex import convert_egodex, egodex_source
from agra.data.lerobot.writer import write_dataset
from agra.data.normalization.normalize import NormStats
from agra.data.sampling.sampler import DataConfig, WindowSampler
from agra.data.source import embodiment_stats
from agra.policies.load import load_policy
from agra.recipes import at_stage, tiny
from agra.stages import Stage
from agra.training import checkpoint
from agra.types import Embodiment, Episode, Observation
from agra.wam.bridge import bridged_layers

EMBODIMENTS = ("tabletop", "tabletop_human", "human_egodex")
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
def world(tmp_path_factory):
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
    config = replace(config, model=model, alignment=alignment, data=data, stage=stage, looking=None)
    run.prepare(config)
    return folder, config


@pytest.fixture(scope="module")
def trained(world):
    folder, config = world
    previous = None
    for stage in Stage:
        assert run.train(at_stage(config, stage), output=folder / stage, init_from=previous)
        previous = folder / stage
    return folder, config


def make_sampler(config, **changes) -> WindowSampler:
    sources = open_sources(config.data)
    head = config.method.model.action_dit
    return WindowSampler(
        config.data,
        sources,
        frozen.open_features(config, sources),
        embodiment_stats(sources),
        horizon=head.horizon,
        num_frames=config.method.model.num_frames,
        references=reference_frames(config.method.model.latent_shape[1]),
        batch_size=config.stage.batch_size,
        seed=config.stage.seed,
        max_state_dim=head.state_dim,
        max_action_dim=head.action_dim,
        instructions=frozen.open_instructions(config, sources),
        **changes,
    )


def test_every_embodiment_acts_in_its_own_units(trained):
    folder, _ = trained
    for stage in (Stage.JOINT, Stage.FINETUNE):
        policy = load_policy(folder / stage)
        assert set(policy.stats) == set(EMBODIMENTS)
        for name in EMBODIMENTS:
            seen = np.full((60, 96, 3), 90, np.uint8)
            state = np.zeros(DIMENSIONS[name], np.float32)
            policy.reset(0)
            chunk = policy.act(Observation(frame=seen, state=state, instruction="move 0", embodiment=name))
            assert chunk.actions.shape == (8, DIMENSIONS[name])
            assert np.isfinite(chunk.actions).all()


def test_a_policy_crops_as_training_did(trained):
    """What lies outside the embodiment's rows changes nothing; what lies inside does."""
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


def test_statistics_are_saved_with_the_parts(trained):
    folder, _ = trained
    stats = NormStats.load_all(checkpoint.newest(folder / Stage.JOINT) / "norm_stats.json")
    assert [part.method for part in stats["human_egodex"].action_parts] == ["mean_std", "rot6d"] * 2
    assert stats["tabletop"].action_parts == ()


def test_samples_belong_to_their_sources(world):
    """Weights 2:1:1; masks show each source's horizon and end; widths its embodiment's."""
    _, config = world
    sampler = make_sampler(config)
    drawn = np.concatenate([sampler.windows(step)[:, 0] for step in range(400)])
    assert np.abs(np.bincount(drawn) / len(drawn) - [0.5, 0.25, 0.25]).max() < 0.03
    windows, batch = sampler.windows(3), sampler.batch(3)
    assert set(windows[:, 0]) == {0, 1, 2}
    for row, (source, episode, start) in enumerate(windows):
        mask = batch.action_mask[row].numpy()
        dimensions = DIMENSIONS[EMBODIMENTS[source]]
        length = sampler.parts[source].lengths[episode]
        learned = {0: 8, 1: min(6, length - start), 2: 4}[int(source)]
        assert mask[:learned, :dimensions].all()
        assert mask.sum() == learned * dimensions
        assert batch.embodiment[row] == source
        assert (batch.state[row, dimensions:] == 0).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_one_process_s_samples(world, world_size):
    _, config = world
    for step in (0, 7):
        whole = make_sampler(config).batch(step)
        shares = [make_sampler(config, rank=r, world_size=world_size).batch(step) for r in range(world_size)]
        for name in vars(whole):
            if getattr(whole, name) is not None:
                union = torch.stack([getattr(share, name) for share in shares], 1).flatten(0, 1)
                assert torch.equal(union, getattr(whole, name)), name


def test_a_resumed_run_is_the_uninterrupted_one(trained, tmp_path):
    """Cut the joint run back to its second step and let it go on: the same weights, byte for byte."""
    folder, config = trained
    whole = folder / Stage.JOINT
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000004")
    assert run.train(at_stage(config, Stage.JOINT), output=tmp_path / "cut", init_from=folder / Stage.ADAPT)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "cut/step_000004" / name).read_bytes() == (whole / "step_000004" / name).read_bytes()


def test_what_is_not_cached_is_computed_the_same(world):
    """Latents and targets of decoded clips equal the cached ones, so that a run may do without the cache."""
    _, config = world
    cached = make_sampler(config).batch(2)
    for names in ((), ("latents",), ("targets",)):
        without = replace(config, data=replace(config.data, cached=names))
        encoder = frozen.OnlineEncoder.open(without, open_sources(without.data))
        encode = {
            "encode_latents": encoder.latents if encoder.codec is not None else None,
            "encode_targets": encoder.targets if encoder.teacher is not None else None,
        }
        online = make_sampler(without, **encode).batch(2)
        assert torch.equal(online.latents, cached.latents)
        assert torch.equal(online.targets, cached.targets)
        assert torch.equal(online.actions, cached.actions)
