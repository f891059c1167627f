"""The small things that a first run on a GPU would have met: each process's own GPU, TF32, tokens, optimiser state."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import agra.precision
from agra import api
from agra.checkpoints.folder import OPTIMIZER, newest
from agra.data.features.preparation import open_instructions
from agra.data.source import embodiment_stats, open_sources
from agra.diagnostics.samples.probe_sample import save_samples
from agra.diagnostics.samples.sources import dataset_samples, probe_inputs
from agra.policies.load import load_policy
from agra.precision import allow_tensor_cores, local_device, prepare_compilation
from agra.training.distributed import DistributedContext
from agra.training.optimization import parameter_groups
from agra.wam.action_dit import ActionDiT, ActionDiTConfig, EmbodimentLinear
from agra.wam.bridge import BridgeConfig, SelfAttentionBlock


@pytest.fixture(scope="module")
def trained(prepared, recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = replace(prepared, stage=replace(prepared.stage, steps=1))
    assert api.train(config, output=folder, init_from=recorded / "cosmos")
    return folder


def test_each_process_takes_the_gpu_of_its_local_rank(monkeypatch, make_config):
    """Under torchrun, `agra prepare --device cuda` included."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device("cuda") == torch.device("cuda", 3)
    assert local_device("cuda:1") == torch.device("cuda", 1)
    assert api.preparation(make_config(), device="cuda")._device == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="cuda:4: there are 4 GPUs"):
        local_device("cuda")


def test_compilation_for_a_gpu_needs_a_compiler(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(agra.precision.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C compiler, which Triton calls: install gcc"):
        prepare_compilation(torch.device("cuda"))
    prepare_compilation(torch.device("cpu"))
    monkeypatch.setenv("CC", "cc")
    prepare_compilation(torch.device("cuda"))


def test_ranks_that_see_different_checkpoints_do_not_start(trained, prepared, tmp_path, monkeypatch):
    seen = iter([["none", "step_000007"], ["none", "none"]])
    monkeypatch.setattr(api, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(DistributedContext, "gather", lambda self, value: next(seen))
    assert api._agree_on_newest(tmp_path / "late", DistributedContext()) is None
    monkeypatch.setattr(DistributedContext, "gather", lambda self, value: [value, "step_000007"])
    with pytest.raises(ValueError, match=r"run: the processes see different newest checkpoints \(none, step_000007\)"):
        api.train(prepared, output=tmp_path / "run")
    assert not [*(tmp_path / "run").glob("*.json")]


def test_float32_products_may_run_in_tf32_on_a_gpu(monkeypatch, trained):
    """In every policy and in training; on a CPU nothing changes."""
    before = torch.get_float32_matmul_precision()
    try:
        allow_tensor_cores(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == before
        allow_tensor_cores(torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    asked = []
    monkeypatch.setattr("agra.policies.policy.allow_tensor_cores", asked.append)
    load_policy(trained)
    assert asked == [torch.device("cpu")]


def test_tokens_are_kept_once_for_each_text(prepared):
    """Eight episodes with two instructions are two files, and training reads these."""
    sources = open_sources(prepared.data)
    tokens = open_instructions(prepared.method, prepared.data, sources)
    assert sum(len(source.used) for source in sources) == 8
    assert len(list(tokens.folder.glob("*.safetensors"))) == 2
    width = prepared.method.model.video_dit.text_dim
    assert tokens.read("go 0").shape == (prepared.method.model.text.length, width)


def test_probes_hold_projected_tokens_and_need_no_text_encoder_but_the_main_process_s(prepared, tmp_path, monkeypatch):
    samples = dataset_samples(prepared, 3)
    masks = np.zeros_like(samples[0].masks)
    masks[:, :16, :16] = True
    save_samples([replace(s, masks=masks, position=None, instruction="go 7") for s in samples], tmp_path / "probes")
    cache = replace(prepared.data, cache=str(tmp_path / "cache"))
    config = replace(prepared, data=cache, monitor=replace(prepared.monitor, probes=str(tmp_path / "probes")))
    api.prepare(config)
    sources = open_sources(config.data)
    tokens = open_instructions(config.method, config.data, sources)
    arguments = (config, sources, embodiment_stats(sources), tokens)
    inputs = probe_inputs(*arguments, DistributedContext()).inputs
    assert inputs.instruction.shape[-1] == config.method.model.video_dit.text_dim

    def refuse(*_, **__):
        raise AssertionError("another process loads the text encoder")

    monkeypatch.setattr("agra.data.features.preparation.open_text_encoder", refuse)
    other = probe_inputs(*arguments, DistributedContext(rank=1, world_size=2)).inputs
    assert torch.equal(other.instruction, inputs.instruction)


def test_biases_and_vectors_do_not_decay(small_config):
    method = small_config.method.build()
    decaying = {id(p) for g in parameter_groups(method, small_config.stage) if g["weight_decay"] for p in g["params"]}
    assert decaying
    banks = [module for module in method.modules() if isinstance(module, EmbodimentLinear)]
    assert len(banks) == 7
    assert all(id(bank.weight) in decaying and id(bank.bias) not in decaying for bank in banks)
    assert not any(id(p) in decaying for p in method.parameters() if p.ndim < 2)


def test_banks_begin_as_groot_s():
    torch.manual_seed(0)
    head = ActionDiT(ActionDiTConfig(num_blocks=1, num_heads=2, head_dim=32, hidden_dim=64, guidance_dim=32))
    stds = [module.weight.std().item() for module in head.modules() if isinstance(module, EmbodimentLinear)]
    assert len(stds) == 7
    assert stds == pytest.approx([0.02] * 7, rel=0.05)


def test_the_bridge_drops_the_attention_s_result_twice():
    """As N1.5's vision-language blocks do: to_out's dropout, then a final one."""
    config = BridgeConfig(num_heads=2, head_dim=16, dropout=0.5)
    block = SelfAttentionBlock(config).train()
    with torch.no_grad():
        for parameter in block.ff.parameters():
            parameter.zero_()
    x = torch.randn(64, 16, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    dropped = ((block(x) - x).abs() < 1e-7).float().mean().item()
    assert dropped == pytest.approx(1 - 0.5**2, abs=0.02)


def test_a_policy_reads_no_optimiser_state(trained):
    """At the paper's size it takes 22 GB, and every worker would hash it."""
    folder = newest(trained)
    content = (folder / OPTIMIZER).read_bytes()
    try:
        (folder / OPTIMIZER).write_bytes(b"damaged")
        load_policy(trained)
    finally:
        (folder / OPTIMIZER).write_bytes(content)
