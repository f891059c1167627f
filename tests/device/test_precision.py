"""Policies, monitors and diagnosis in the precision of training, as near to float32 as autocast."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agra import api
from agra.diagnostics.diagnosis import diagnose
from agra.diagnostics.measurement import DiagnosisConfig
from agra.diagnostics.samples.probe_sample import ProbeSample, save_samples
from agra.diagnostics.samples.sources import dataset_samples
from agra.policies.latency import random_policy
from agra.policies.load import load_policy
from agra.precision import autocast, compute_dtype
from agra.recipes import RECIPES
from agra.wam.fast import FastWAM
from agra.wam.model import WAM


def test_auto_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    for helps, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("agra.precision.bfloat16_helps", lambda device, helps=helps: helps)
        assert compute_dtype(cpu, "auto") is expected
        with autocast(cpu, "auto"):
            assert torch.is_autocast_enabled("cpu") is helps
    assert compute_dtype(cpu, "bfloat16") is torch.bfloat16
    assert compute_dtype(cpu, "float32") is torch.float32


@pytest.fixture
def trained(prepared, recorded, tmp_path):
    config = replace(prepared, stage=replace(prepared.stage, precision="bfloat16", steps=2))
    assert api.train(config, output=tmp_path / "run", init_from=recorded / "cosmos")
    return tmp_path / "run"


def test_a_policy_computes_as_its_training_did(trained, observation):
    """Weights are cast once, actions are integrated in float32."""
    policies = {p: load_policy(trained, precision=p) for p in (None, "float32")}
    assert {parameter.dtype for parameter in policies[None].method.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in policies["float32"].method.parameters()} == {torch.float32}
    actions = {}
    for name, policy in policies.items():
        policy.reset(0)
        actions[name] = policy.normalize(policy.act_and_imagine(observation).actions, "dot")
    difference = np.abs(actions[None] - actions["float32"]).max()
    assert 0 < difference < 0.05


def test_half_weights_are_as_near_to_float32_as_autocast_is(small_config, make_batch):
    """The median over twelve batches of the distance to the float32 answer, at most a quarter more."""
    torch.manual_seed(0)
    model = WAM(small_config.method.model).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    half = WAM(small_config.method.model).eval().requires_grad_(False)
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    distances = {"autocast": [], "half": [], "fast half": []}
    for seed in range(12):
        batch = make_batch(small_config, seed=seed)
        noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed))
        inputs = (batch.latents[:, :, :1], noise, batch.instruction)
        head = (batch.state, batch.embodiment, batch.actions)

        def answer(wam, inputs=inputs, head=head):
            return wam.act(wam.guide(wam.condition(*inputs)), *head)

        exact = answer(model)
        with torch.autocast("cpu", torch.bfloat16):
            distances["autocast"].append((answer(model) - exact).norm() / exact.norm())
        distances["half"].append((answer(half) - exact).norm() / exact.norm())
        fast = FastWAM(half)
        texts = [fast.instruction(tokens) for tokens in batch.instruction]
        quick = fast.act(fast.guide(fast.condition(inputs[0], noise, texts)), *head)
        distances["fast half"].append((quick - exact).norm() / exact.norm())
    medians = {name: float(np.median(values)) for name, values in distances.items()}
    assert medians["half"] < 1.25 * medians["autocast"]
    assert medians["fast half"] < 1.25 * medians["autocast"]


def test_monitors_and_diagnosis_run_in_the_training_s_precision(prepared, trained, recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("agra.diagnostics.monitors.CHUNK", 3)
    samples = dataset_samples(prepared, 8)
    masks = np.zeros_like(samples[0].masks)
    masks[:, :16, :16] = True
    save_samples([replace(sample, masks=masks, position=None) for sample in samples], tmp_path / "probes")
    seen = []
    condition = WAM.condition

    def watch(self, *arguments, **options):
        hidden = condition(self, *arguments, **options)
        if not torch.is_grad_enabled():
            seen.append((len(arguments[0]), next(iter(hidden.values())).dtype))
        return hidden

    monkeypatch.setattr(WAM, "condition", watch)
    monitored = replace(prepared, monitor=replace(prepared.monitor, probes=str(tmp_path / "probes")))
    stage = replace(monitored.stage, precision="bfloat16", steps=2, batch_size=2)
    assert api.train(replace(monitored, stage=stage), output=tmp_path / "monitored", init_from=recorded / "cosmos")
    assert {dtype for _, dtype in seen} == {torch.bfloat16}
    assert max(count for count, _ in seen) == 3
    seen.clear()
    settings = DiagnosisConfig(noise_samples=1, background_sets=1, gallery=1, map_kinds=(), imagination_steps=1)
    api.diagnose(trained, simulator="none", samples=0, probes=tmp_path / "probes", teacher="own", config=settings)
    assert {dtype for _, dtype in seen} == {torch.bfloat16}


@pytest.mark.parametrize(
    "recipe",
    ["tiny", "tiny_dit4dit", "tiny_diffusion_policy", "tiny_flare", "tiny_uwm", "tiny_vla", "tiny_lda_scratch"],
)
def test_every_method_acts_and_is_diagnosed_with_half_weights(recipe, tmp_path):
    """Policies on a GPU have bfloat16 weights. Codec, teacher and inputs stay in float32."""
    policy = random_policy(RECIPES[recipe](), precision="bfloat16")
    assert {parameter.dtype for parameter in policy.method.parameters()} == {torch.bfloat16}
    blank = policy.blank_observation()
    past, clip = len(policy.past), policy.config.method.needs().clip
    grid = getattr(policy.method, "token_grid", (1,))
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (grid[0], *blank.frame.shape), dtype=np.uint8)
    masks = np.zeros(frames.shape[:-1], np.bool_)
    masks[:, : frames.shape[1] // 3, : frames.shape[2] // 3] = True
    sample = ProbeSample(
        trial="random",
        step=0,
        regime="in_distribution",
        instruction=blank.instruction,
        embodiment=blank.embodiment,
        state=blank.state,
        frames=frames,
        masks=masks,
        video=generator.integers(0, 256, (clip, *blank.frame.shape), dtype=np.uint8) if clip else None,
        actions=np.zeros((4, policy.config.method.shapes.action_dim), np.float32),
        past_frames=np.repeat(frames[:1], past, axis=0) if past else None,
        past_states=np.repeat(blank.state[None], past, axis=0) if past else None,
    )
    settings = DiagnosisConfig(noise_samples=1, background_sets=1, gallery=0, imagination_steps=1)
    (row,) = diagnose(policy, [sample], tmp_path, config=settings, progress=False).rows
    assert np.isfinite(row["action_error"])
    policy.reset(0)
    assert np.isfinite(policy.act_and_imagine(blank).actions).all()
