"""Export, push and pull: a policy in one folder, with a model card."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from agra import files, hub
from agra.checkpoints.folder import BUNDLED, resolve, verify
from agra.checkpoints.lineage import describe, lineage, record_origin
from agra.checkpoints.read import load_parts, read_config
from agra.data.config import SourceConfig
from agra.policies.export import export, model_card, pull, push
from agra.recipes import RECIPES, at_stage
from agra.rng import seed_everything
from agra.stages import Stage
from agra.training.trainer import Trainer
from agra.weights import write_tensors


@pytest.fixture
def run(small_config, make_batch, tmp_path):
    """A finished run with averaged weights."""
    config = replace(small_config, stage=replace(small_config.stage, ema_decay=0.5, steps=3))
    seed_everything(0)
    method = config.method.build()
    kept = []

    def batch(step):
        kept.append({name: p.detach().clone() for name, p in method.wam.named_parameters()})
        return make_batch(config, seed=step)

    extra = {"norm_stats.json": lambda path: path.write_text("{}")}
    Trainer(config, method, batch=batch, validation=None, output=tmp_path / "run", extra_files=extra).run()
    kept.append({name: p.detach().clone() for name, p in method.wam.named_parameters()})
    return tmp_path / "run", kept


def load_all(folder):
    """Return every weight of an export by name."""
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def load_wam(folder):
    method = read_config(folder).method.to_act().build()
    load_parts(method.parts(), folder)
    return method.wam


def test_an_export_is_a_checkpoint_without_the_optimiser(run, tmp_path):
    folder, kept = run
    made = export(folder, tmp_path / "out")
    assert sorted(p.name for p in made.iterdir()) == [
        "README.md", "action_dit.safetensors", "bridge.safetensors", "config.json", "export.json", "history", "manifest.json",
        "norm_stats.json", "trainer.json", "video_dit.safetensors",
    ]  # fmt: skip
    verify(made)
    assert read_config(made) == read_config(resolve(folder))
    stored = load_all(made)
    assert stored.keys() == kept[-1].keys()
    for name, value in stored.items():
        assert torch.equal(value, kept[-1][name])
    card = (made / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: agra\nlicense: apache-2.0")
    for told in ("step 3 of the joint stage", "video layer 1 aligned with packaged dinov2 small", "`action_dit`"):
        assert told in card
    with pytest.raises(ValueError, match="out: not empty"):
        export(folder, tmp_path / "out", half=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_an_export_in_half_precision(run, tmp_path):
    folder, kept = run
    made = export(folder, tmp_path / "half", half=True)
    stored = load_all(made)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = load_wam(made)
    for name, value in model.named_parameters():
        assert value.dtype is torch.float32
        assert torch.equal(value, kept[-1][name].half().float())


def test_values_beyond_half_precision_are_named(run, tmp_path):
    found = resolve(run[0])
    weights = load_file(found / "video_dit.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = 1e6
    write_tensors(found / "video_dit.safetensors", weights)
    manifest = json.loads((found / "manifest.json").read_text())
    manifest["video_dit.safetensors"] = files.sha256(found / "video_dit.safetensors")
    (found / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{name}: holds values beyond float16's range"):
        export(run[0], tmp_path / "half", half=True)
    assert not (tmp_path / "half").exists()


def test_an_export_carries_the_stages_before(run, small_config, make_batch, tmp_path):
    config = at_stage(replace(small_config, stage=replace(small_config.stage, steps=1)), Stage.FINETUNE)
    method = config.method.build()
    later = tmp_path / "later"
    later.mkdir()
    record_origin(later, run[0])
    Trainer(config, method, batch=lambda step: make_batch(config), validation=None, output=later, extra_files={}).run()
    made = export(later, tmp_path / "out")
    stages = lineage(made)
    assert [stage.config for stage in stages] == [stage.config for stage in lineage(later)]
    assert [stage.config.stage.name for stage in stages] == [Stage.JOINT, Stage.FINETUNE]
    logs = [stage.metrics.read_text() for stage in stages]
    assert logs == [(run[0] / "metrics.jsonl").read_text(), (later / "metrics.jsonl").read_text()]
    assert describe(stages).endswith("Stages: joint 3 steps, finetune 1 steps")
    shutil.rmtree(run[0])
    assert len(lineage(later)) == 1
    assert [s.config for s in lineage(export(made, tmp_path / "again"))] == [s.config for s in stages]


def test_the_average_is_exported(run, tmp_path):
    """After steps 1, 2, 3: half of the last weights, a quarter of those before, a quarter of the first."""
    folder, kept = run
    weights = load_all(export(folder, tmp_path / "ema", ema=True))
    for name, value in weights.items():
        expected = 0.5 * kept[3][name] + 0.25 * kept[2][name] + 0.25 * kept[1][name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_a_missing_average_is_an_error(small_config, make_batch, tmp_path):
    config = replace(small_config, stage=replace(small_config.stage, steps=1))
    method = config.method.build()
    options = {"validation": None, "output": tmp_path / "run", "extra_files": {}}
    Trainer(config, method, batch=lambda step: make_batch(config), **options).run()
    with pytest.raises(ValueError, match=r"holds no averaged weights; train with --stage\.ema-decay"):
        export(tmp_path / "run", tmp_path / "out", ema=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


class Hub:
    """A stand-in for the hub, with a folder for each model."""

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
    assert push(folder, "lab/policy") == "https://hub/lab/policy"
    pulled = pull("lab/policy", tmp_path / "pulled")
    for name, parameter in load_wam(resolve(pulled)).named_parameters():
        assert torch.equal(parameter, kept[-1][name])
    (stand_in.root / "lab/policy/video_dit.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"video_dit\.safetensors: checksum differs from manifest\.json"):
        pull("lab/policy", tmp_path / "again")


def test_a_hub_that_cannot_be_reached_is_one_line(run, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"lab/policy: upload failed .*run `hf auth login`") as error:
        push(run[0], "lab/policy")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"policy: cannot load lab/none"):
        pull("lab/none", tmp_path / "none")
    with pytest.raises(ValueError, match="expected owner/model"):
        push(run[0], "no name")


def test_manifest_lists_every_file(run, tmp_path):
    made = export(run[0], tmp_path / "out")
    listed = json.loads((made / "manifest.json").read_text())
    assert {*listed, "manifest.json"} == {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}


def test_cards_name_the_licence_of_the_weights(run, tmp_path):
    made = export(run[0], tmp_path / "out")
    for folder in (made, *BUNDLED.glob("*/")):
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "apache-2.0"
        assert "Weights: Apache-2.0" in card.text
        verify(folder)


@pytest.mark.parametrize(
    ("recipe", "title", "tag"),
    [
        ("tiny", "World action model with AGRA", "wam"),
        ("tiny_diffusion_policy", "Diffusion Policy", "diffusion-policy"),
        ("tiny_dit4dit", "DiT4DiT", "dit4dit"),
    ],
)
def test_a_card_names_its_method(recipe, title, tag):
    config = RECIPES[recipe](Stage.JOINT)
    with torch.device("meta"):
        method = config.method.build()
    card = ModelCard(model_card(config, config.method.describe(), steps=7, method=method, ema=False))
    assert card.text.lstrip().splitlines()[0] == f"# {title}"
    assert card.data.tags == ["robotics", tag]
    assert "World" not in card.text or recipe == "tiny"


def test_a_card_gives_the_frame_strides_of_a_mixture():
    config = RECIPES["tiny"](Stage.JOINT)
    sources = [SourceConfig(path=f"{n}", embodiment="tabletop", frame_stride=n) for n in (3, 1, 3)]
    with torch.device("meta"):
        method = config.method.build()
    for data, told in (
        (config.data, "a frame every 4 control steps"),
        (replace(config.data, mixture=tuple(sources)), "a frame every 3 or 1 control steps"),
    ):
        card = model_card(replace(config, data=data), "A method", steps=7, method=method, ema=False)
        assert told in card


def test_a_repeated_export_changes_nothing(run, tmp_path):
    made = export(run[0], tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert export(run[0], tmp_path / "out") == made
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    with pytest.raises(ValueError, match="not empty; choose a new folder"):
        export(run[0], tmp_path / "out", half=True)
    (made / "video_dit.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"video_dit\.safetensors: checksum differs"):
        export(run[0], tmp_path / "out")
