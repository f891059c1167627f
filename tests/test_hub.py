"""Export, push and pull: a policy in one folder, with a card that tells what it is."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from agra import hub
from agra.draws import seed_everything
from agra.recipes import at_stage
from agra.training import checkpoint, lineage
from agra.training.loop import Trainer
from agra.training.objective import Objective
from agra.training.stages import Stage
from agra.wam.model import WAM


@pytest.fixture
def run(small_config, make_batch, tmp_path):
    """A finished run that kept an average."""
    config = replace(small_config, stage=replace(small_config.stage, ema_decay=0.5, steps=3))
    seed_everything(0)
    objective = Objective(WAM(config.model), config.stage.objective, config.alignment, 6)
    kept = []

    def batch(step):
        kept.append({name: p.detach().clone() for name, p in objective.wam.named_parameters()})
        return make_batch(config, seed=step)

    extra = {"norm_stats.json": lambda path: path.write_text("{}")}
    Trainer(config, objective, batch=batch, validation=None, output=tmp_path / "run", extra_files=extra).run()
    kept.append({name: p.detach().clone() for name, p in objective.wam.named_parameters()})
    return tmp_path / "run", kept


def test_an_export_is_a_checkpoint_without_the_optimiser(run, tmp_path):
    folder, kept = run
    made = hub.export(folder, tmp_path / "out")
    assert sorted(p.name for p in made.iterdir()) == [
        "README.md", "config.json", "history", "manifest.json", "model.safetensors", "norm_stats.json", "trainer.json",
    ]  # fmt: skip
    checkpoint.verify(made)
    assert checkpoint.read_config(made) == checkpoint.read_config(checkpoint.resolve(folder))
    for name, value in load_file(made / "model.safetensors").items():
        assert torch.equal(value, kept[-1][name])
    card = (made / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: agra")
    for told in ("step 3 of the joint stage", "video layer 1 aligned with packaged dinov2 small", "`action_dit`"):
        assert told in card
    with pytest.raises(ValueError, match="out: not empty"):
        hub.export(folder, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_an_export_in_half_precision(run, tmp_path):
    folder, kept = run
    made = hub.export(folder, tmp_path / "half", half=True)
    stored = load_file(made / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = WAM(checkpoint.read_config(made).model)
    checkpoint.load_weights(model, made)
    for name, value in model.named_parameters():
        assert value.dtype is torch.float32
        assert torch.equal(value, kept[-1][name].half().float())


def test_what_half_precision_cannot_hold(run, tmp_path):
    found = checkpoint.resolve(run[0])
    weights = load_file(found / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = 1e6
    checkpoint.write_tensors(found / "model.safetensors", weights)
    manifest = json.loads((found / "manifest.json").read_text())
    manifest["model.safetensors"] = checkpoint.sha256(found / "model.safetensors")
    (found / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{name}: holds values beyond float16's range"):
        hub.export(run[0], tmp_path / "half", half=True)
    assert not (tmp_path / "half").exists()


def test_an_export_carries_the_stages_before(run, small_config, make_batch, tmp_path):
    config = at_stage(replace(small_config, stage=replace(small_config.stage, steps=1)), Stage.FINETUNE)
    objective = Objective(WAM(config.model), config.stage.objective, config.alignment, 6)
    later = tmp_path / "later"
    later.mkdir()
    lineage.note(later, run[0])
    Trainer(
        config, objective, batch=lambda step: make_batch(config), validation=None, output=later, extra_files={}
    ).run()
    made = hub.export(later, tmp_path / "out")
    stages = lineage.lineage(made)
    assert [stage.config for stage in stages] == [stage.config for stage in lineage.lineage(later)]
    assert [stage.config.stage.name for stage in stages] == [Stage.JOINT, Stage.FINETUNE]
    logs = [stage.metrics.read_text() for stage in stages]
    assert logs == [(run[0] / "metrics.jsonl").read_text(), (later / "metrics.jsonl").read_text()]
    assert lineage.describe(stages).endswith("Stages: joint 3 steps, finetune 1 steps")
    shutil.rmtree(run[0])
    assert len(lineage.lineage(later)) == 1
    assert [s.config for s in lineage.lineage(hub.export(made, tmp_path / "again"))] == [s.config for s in stages]


def test_the_average_is_exported(run, tmp_path):
    """After steps 1, 2, 3: half of the last weights, a quarter of those before, a quarter of the first."""
    folder, kept = run
    weights = load_file(hub.export(folder, tmp_path / "ema", ema=True) / "model.safetensors")
    for name, value in weights.items():
        expected = 0.5 * kept[3][name] + 0.25 * kept[2][name] + 0.25 * kept[1][name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_no_average_is_said(small_config, make_batch, tmp_path):
    config = replace(small_config, stage=replace(small_config.stage, steps=1))
    objective = Objective(WAM(config.model), config.stage.objective, config.alignment, 6)
    options = {"validation": None, "output": tmp_path / "run", "extra_files": {}}
    Trainer(config, objective, batch=lambda step: make_batch(config), **options).run()
    with pytest.raises(ValueError, match=r"holds no averaged weights; train with --stage\.ema-decay"):
        hub.export(tmp_path / "run", tmp_path / "out", ema=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


class Hub:
    """Stands for the hub: a folder for each model."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, name, *, private, exist_ok):
        (self.root / name).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, name, *, revision, local_dir):
        shutil.copytree(self.root / name, local_dir)


def test_push_and_pull(run, tmp_path, monkeypatch):
    folder, kept = run
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "snapshot_download", stand_in.snapshot_download)
    assert hub.push(folder, "lab/policy") == "https://hub/lab/policy"
    pulled = hub.pull("lab/policy", tmp_path / "pulled")
    model = WAM(checkpoint.read_config(pulled).model)
    checkpoint.load_weights(model, checkpoint.resolve(pulled))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[-1][name])
    (stand_in.root / "lab/policy/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model\.safetensors: checksum differs from manifest\.json"):
        hub.pull("lab/policy", tmp_path / "again")


def test_a_hub_that_cannot_be_reached_is_one_line(run, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"lab/policy: could not be uploaded .*run `hf auth login`") as error:
        hub.push(run[0], "lab/policy")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"policy: cannot load lab/none"):
        hub.pull("lab/none", tmp_path / "none")
    with pytest.raises(ValueError, match="expected owner/model"):
        hub.push(run[0], "no name")


def test_manifest_lists_every_file(run, tmp_path):
    made = hub.export(run[0], tmp_path / "out")
    listed = json.loads((made / "manifest.json").read_text())
    assert {*listed, "manifest.json"} == {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
