"""Layer studies, and probe samples of a dataset, on a world without a renderer."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from agra import api
from agra.checkpoints.folder import BUNDLED, best, resolve
from agra.checkpoints.read import read_config
from agra.cli.main import main
from agra.diagnostics.samples.probe_sample import load_samples, save_samples
from agra.diagnostics.samples.sources import dataset_samples, write_pictures
from agra.diagnostics.study import variants
from agra.diagnostics.visual_reliance import MEASURES, VisualReliance
from agra.evaluation.collect import collect
from agra.evaluation.protocols import default_protocol
from agra.evaluation.results import read_results
from agra.recipes import agra_dino_l8, tiny
from agra.wam.bridge import bridged_layers
from tests.support.point_world import demonstrator


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """tiny() made smaller, with prepared demonstrations of the point world."""
    folder = tmp_path_factory.mktemp("study")
    collect("point", folder / "demonstrations", episodes=8, seed=0, demonstrator=demonstrator, progress=False)
    small = tiny()
    model, alignment = small.method.model, small.method.alignment
    model = replace(
        model,
        frame_size=(32, 48),
        video_dit=replace(model.video_dit, num_layers=3, head_dim=16),
        bridge=replace(model.bridge, layers=bridged_layers(3, 2), head_dim=16, position_grid=(2, 2, 3)),
        action_dit=replace(model.action_dit, num_blocks=2, horizon=8, head_dim=16, guidance_dim=32),
    )
    teacher = replace(alignment.teacher, input_size=(28, 42))
    alignment = replace(alignment, layers=(1,), hidden_dim=16, teacher=teacher)
    smaller = replace(
        small,
        method=replace(small.method, model=model, alignment=alignment),
        data=replace(
            small.data, path=str(folder / "demonstrations"), cache=str(folder / "cache"), embodiments=("dot",),
            frame_stride=1,
        ),
        stage=replace(small.stage, steps=2, batch_size=4, save_every=2, validate_every=1, log_every=1),
    )  # fmt: skip
    api.prepare(smaller)
    return smaller


def with_alignment(config, alignment):
    return replace(config, method=replace(config.method, alignment=alignment))


def test_variants_change_one_thing():
    config = agra_dino_l8()
    alignment = config.method.alignment
    aligned = variants(config, "alignment")
    assert list(aligned) == ["without", *(f"layer_{layer}" for layer in bridged_layers(28, 8))]
    assert aligned["layer_8"] == config
    assert aligned["without"] == with_alignment(config, None)
    assert aligned["layer_15"] == with_alignment(config, replace(alignment, layers=(15,)))
    bridges = variants(config, "bridge", layers=[4])
    assert list(bridges) == ["all_layers", "layer_4"]
    assert bridges["layer_4"].method.model.bridge.layers == (4,) * 8
    assert bridges["layer_4"].stage == config.stage
    with pytest.raises(ValueError, match="a recipe and a stage that align"):
        variants(with_alignment(config, None), "alignment")


def test_a_study_trains_every_variant_and_reaches_the_report(config, tmp_path):
    folder = tmp_path / "study"
    path = api.study(config, over="alignment", output=folder, layers=(0, 2), simulator=None)
    content = json.loads(path.read_text())
    assert [(variant["name"], variant["layers"]) for variant in content["variants"]] == [
        ("without", []),
        ("layer_0", [0]),
        ("layer_2", [2]),
    ]
    for name, layers in (("layer_0", (0,)), ("layer_2", (2,))):
        assert read_config(resolve(folder / name)).method.alignment.layers == layers
    checkpoints = sorted(file.stat().st_mtime_ns for file in folder.rglob("*.safetensors"))
    api.study(config, over="alignment", output=folder, layers=(0, 2), simulator=None)
    assert (
        sorted(file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")) == checkpoints
    )  # nothing is repeated
    text = api.report([folder / "layer_2"], output=tmp_path / "r.html", studies=[folder]).read_text()
    assert 'id="figure-10"' in text
    assert "layer 0" in text
    with pytest.raises(FileNotFoundError, match="that `agra study` wrote"):
        api.report([folder / "layer_2"], output=tmp_path / "r.html", studies=[tmp_path])


def test_a_study_evaluates_as_agra_evaluate_does(tmp_path, monkeypatch):
    """The simulator's usual protocol, and the noise of the policy's recipe in the results."""

    def trained(config, *, output, **options):
        shutil.copytree(BUNDLED / "tabletop-agra", output / "step_000001")
        return True

    monkeypatch.setattr(api, "train", trained)
    monkeypatch.setattr("agra.simulation.default_protocol", lambda name: replace(default_protocol(name), max_steps=1))
    api.study(tiny(), over="alignment", output=tmp_path, layers=(1,), limit=1, samples=0)
    header = read_results(tmp_path / "layer_1" / "results.jsonl").header
    assert (header["policy"], header["protocol"]["execute_steps"]) == ("layer_1", 8)
    assert header["policy_settings"] == {"action_noise": "zero"}


def test_a_study_diagnoses_again_what_was_interrupted_before_the_visual_reliance(tmp_path, monkeypatch):
    def trained(config, *, output, **options):
        shutil.copytree(BUNDLED / "tabletop-agra", output / "step_000001", dirs_exist_ok=True)
        return True

    def diagnose(run, **options):
        diagnosed.append(run.name)
        (run / "diagnosis").mkdir(exist_ok=True)
        (run / "diagnosis" / "diagnosis.json").touch()

    diagnosed = []
    monkeypatch.setattr(api, "train", trained)
    monkeypatch.setattr(api, "evaluate", lambda run, simulator, **options: None)
    monkeypatch.setattr(api, "diagnose", diagnose)
    for _ in range(2):
        api.study(tiny(), over="alignment", output=tmp_path, layers=(1,))
    assert diagnosed == ["without", "layer_1"] * 2
    for name in ("without", "layer_1"):
        reliance = VisualReliance(trials=(), groups=(), values=dict.fromkeys(MEASURES, np.empty(0)))
        reliance.save(tmp_path / name / "diagnosis" / "visual_reliance.json")
    api.study(tiny(), over="alignment", output=tmp_path, layers=(1,))
    assert len(diagnosed) == 4


def test_dataset_samples_are_annotated_and_monitored_in_training(config, tmp_path, capsys):
    samples = dataset_samples(config, 3)
    assert len({sample.name for sample in samples}) == 3
    assert all(not sample.masks.any() and len(sample.video) == 5 for sample in samples)
    save_samples(samples, tmp_path / "probes")
    write_pictures(samples, tmp_path / "probes" / "pictures")
    picture = tmp_path / "probes" / "pictures" / samples[1].image_names()[0]
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), samples[1].frames[0])
    read = load_samples(tmp_path / "probes")
    np.testing.assert_array_equal(read[2].actions, samples[2].actions)
    monitored = replace(config, monitor=replace(config.monitor, probes=str(tmp_path / "probes")))
    with pytest.raises(ValueError, match="no probe sample has a mask"):
        api.train(monitored, output=tmp_path / "run")

    masks = np.zeros_like(samples[0].masks)
    masks[:, :16, :16] = True
    save_samples([replace(sample, masks=masks) for sample in samples], tmp_path / "probes")
    monitored = replace(monitored, stage=replace(monitored.stage, keep_best="max:grounding/in_mask_ratio"))
    assert api.train(monitored, output=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["grounding/in_mask_ratio"] for row in rows if "grounding/in_mask_ratio" in row]
    assert len(logged) == 2
    assert best(tmp_path / "run")[1] == max(logged)

    earlier = [tmp_path / "run" / "diagnosis" / name for name in ("visual_reliance.json", "looking.json")]
    earlier[0].parent.mkdir()
    for path in earlier:
        path.write_text("{}")
    api.diagnose(tmp_path / "run", simulator="none", samples=0, probes=tmp_path / "probes", teacher="none")
    assert not [path for path in earlier if path.exists()]  # visual reliance is not measured on probes
    assert (tmp_path / "run" / "diagnosis" / "diagnosis.json").is_file()
    with pytest.raises(SystemExit):
        main(["study", "tiny", "--over", "depth", "--output", str(tmp_path / "x")])
    assert "depth" in capsys.readouterr().err
