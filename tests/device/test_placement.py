"""Placement of tensors: whole commands on the meta device, where operations that mix devices raise as on a GPU."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from agra import api
from agra.checkpoints.folder import newest
from agra.config import VisualRelianceConfig
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.samples.probe_sample import save_samples
from agra.diagnostics.samples.sources import dataset_samples
from agra.policies.instructions import Instructions
from agra.policies.latency import random_policy, timed
from agra.policies.load import load_policy
from agra.recipes import at_stage
from agra.stages import Stage


def test_the_stand_in_refuses_mixtures(meta):
    """The check itself can fail."""
    with pytest.raises((RuntimeError, ValueError), match="device"):
        torch.nn.functional.linear(torch.zeros(2, 3, device=meta), torch.zeros(4, 3))
    with pytest.raises((RuntimeError, ValueError), match="device"):
        torch.nn.functional.linear(torch.zeros(2, 3), torch.zeros(4, 3, device=meta))


@pytest.mark.parametrize("stage", [Stage.ADAPT, Stage.JOINT])
def test_prepare(make_config, meta, stage):
    config = at_stage(make_config(), stage)
    folders = api.prepare(config, device=meta)
    assert len(folders) == (3 if config.method.aligns else 2)
    assert all((folder / "manifest.json").is_file() or list(folder.glob("*.safetensors")) for folder in folders)


def test_estimates_run_the_networks_where_they_are(make_config, meta):
    config = make_config()
    ((_, estimate),) = api.preparation(config, device=meta).estimate()
    assert estimate.episodes == 8


@pytest.fixture
def probes(prepared, tmp_path):
    samples = dataset_samples(prepared, 2)
    masks = np.zeros_like(samples[0].masks)
    masks[:, :16, :16] = True
    save_samples([replace(sample, masks=masks, position=None) for sample in samples], tmp_path / "probes")
    return tmp_path / "probes"


def test_training_with_validation_and_monitors(prepared, probes, meta, tmp_path):
    monitor = replace(prepared.monitor, probes=str(probes), sensitivity_samples=1, background_sets=1)
    reliance = VisualRelianceConfig(step=0)
    stage = replace(prepared.stage, steps=1)
    config = replace(prepared, monitor=monitor, visual_reliance=reliance, stage=stage)
    assert api.train(config, output=tmp_path, device=meta)
    figures = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"validation/loss", "grounding/sensitivity_ratio", "visual_reliance/error"} <= figures.keys()


def test_training_that_encodes_its_windows_resumes(prepared, meta, tmp_path):
    stage = replace(prepared.stage, steps=2, save_every=1, ema_decay=0.9)
    config = replace(prepared, data=replace(prepared.data, cached=()), stage=stage)
    for attempt in range(2):
        assert api.train(config, output=tmp_path / "run", device=meta)
        (tmp_path / "run" / "step_000002").rename(tmp_path / f"finished_{attempt}")
        assert newest(tmp_path / "run").name == "step_000001"


@pytest.fixture(scope="module")
def trained(prepared, recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    assert api.train(prepared, output=folder, init_from=recorded / "cosmos")
    return folder


@pytest.mark.parametrize("fast", [True, False])
def test_policies_answer_and_imagine(trained, meta, observation, fast):
    policy = load_policy(trained, device=meta, fast=fast)
    policy.warm_up(2)
    assert policy.act_and_imagine(observation).imagined.shape == (5, 32, 48, 3)
    unknown = replace(observation, instruction="an instruction that no episode has")
    assert policy.act(unknown).actions.shape == (8, 2)
    assert policy.instructions.encoder.model.device.type == "meta"


def test_diagnosis_of_an_aligned_policy(trained, probes, meta):
    """Its projectors and its teacher read hidden states and frames on the device."""
    settings = DiagnosisConfig(noise_samples=1, background_sets=1, gallery=1, map_kinds=("mean",), imagination_steps=1)
    output = api.diagnose(
        trained, simulator="none", samples=0, probes=probes, teacher="own", config=settings, device=meta
    )
    assert (output / "diagnosis.json").is_file()


def test_studies(prepared, meta, tmp_path):
    config = replace(prepared, stage=replace(prepared.stage, steps=1))
    path = api.study(config, over="alignment", output=tmp_path / "s", layers=(0,), simulator=None, device=meta)
    assert path.is_file()


def test_latency_of_a_recipe(make_config, meta):
    way = timed(random_policy(make_config(), device=meta), 2)
    assert list(way()) == ["text", "codec", "video", "bridge", "action"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(make_config):
    with pytest.raises(ValueError, match="torch finds no GPU"):
        api.preparation(make_config(), device="cuda")


def test_a_robot_needs_no_text_encoder(trained, observation):
    """The checkpoint holds the tokens of the training instructions, and they equal the encoder's."""
    known = load_policy(trained, known_instructions=True)
    whole = load_policy(trained)
    assert sorted(known.instructions.known) == ["go 0", "go 1"]
    encoded = whole.instructions.encoder.encode(["go 0"])[0].half().float()
    assert torch.equal(known.instructions.tokens("go 0"), encoded)
    for policy in (known, whole):
        policy.reset(0)
    np.testing.assert_array_equal(known.act(observation).actions, whole.act(observation).actions)
    with pytest.raises(
        ValueError, match=r"'stop': not among the 2 known ones \('go 0', 'go 1'\).*without a text encoder"
    ):
        known.act(replace(observation, instruction="stop"))
    assert Instructions(None).known == {}
