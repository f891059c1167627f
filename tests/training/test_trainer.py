"""A run gives the same bits however often it is stopped."""

import json
import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from agra.checkpoints import write
from agra.checkpoints.folder import artifact_dir, best, newest, resolve, verify
from agra.checkpoints.lineage import lineage, record_origin
from agra.config import RunConfig
from agra.recipes import at_stage
from agra.rng import seed_everything
from agra.stages import Stage, StageConfig
from agra.training.distributed import DistributedContext
from agra.training.initialization import load_initial_weights
from agra.training.optimization import clip_gradients
from agra.training.trainer import Trainer
from tests.support.small import with_model, with_objective


def make_trainer(config, output, make_batch, *, on_step=None, validation=True):
    seed_everything(config.stage.seed, 2**31 + 1)
    method = config.method.build()

    def batch(step):
        if on_step is not None:
            on_step(step)
        return make_batch(config, seed=step)

    held_out = (lambda: make_batch(config, seed=10_000)) if validation else None
    return Trainer(config, method, batch=batch, validation=held_out, output=output, extra_files={})


def _weights(folder):
    return {path.name: load_file(path) for path in newest(folder).glob("*.safetensors")}


def _assert_same(a, b):
    assert a.keys() == b.keys()
    assert {"video_dit.safetensors", "projectors.safetensors", "optimizer.safetensors"} <= a.keys()
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), (name, key)


def _rows(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("meter/", "samples_per_second"))} for row in rows]


@pytest.mark.parametrize("stop_before", [1, 3, 4, 5])
def test_resumed_run_equals_uninterrupted_bit_for_bit(small_config, make_batch, tmp_path, stop_before):
    """An exception in the middle of a step stands for a kill: nothing after the last checkpoint survives it."""
    assert make_trainer(small_config, tmp_path / "whole", make_batch).run()

    class Killed(Exception):
        pass

    def kill(step):
        if step == stop_before:
            raise Killed

    with pytest.raises(Killed):
        make_trainer(small_config, tmp_path / "cut", make_batch, on_step=kill).run()
    started = []
    assert make_trainer(small_config, tmp_path / "cut", make_batch, on_step=started.append).run()
    assert started[0] == stop_before // small_config.stage.save_every * small_config.stage.save_every
    _assert_same(_weights(tmp_path / "whole"), _weights(tmp_path / "cut"))
    assert _rows(tmp_path / "whole") == _rows(tmp_path / "cut")


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_shards_without_moments_of_a_parameter_without_gradient_are_resumed(
    small_config, make_batch, tmp_path, ema_decay
):
    """Without a video loss the video DiT's output layers are trained and never have a gradient."""
    config = with_objective(small_config, video_weight=0.0)
    config = replace(config, stage=replace(config.stage, keep_checkpoints=3, ema_decay=ema_decay))
    make_trainer(config, tmp_path / "whole", make_batch).run()
    stored = load_file(tmp_path / "whole" / "step_000002" / "optimizer.safetensors")
    assert "exp_avg/video_dit.norm_out.linear_1.weight" not in stored
    sharded = tmp_path / "cut" / "step_000002"
    shutil.copytree(tmp_path / "whole" / "step_000002", sharded)
    (sharded / "sharded").mkdir()
    manifest = json.loads((sharded / "manifest.json").read_text())
    for path in list(sharded.glob("*.safetensors")):
        path.rename(sharded / "sharded" / path.name)
        manifest[f"sharded/{path.name}"] = manifest.pop(path.name)
    (sharded / "manifest.json").write_text(json.dumps(manifest))
    assert make_trainer(config, tmp_path / "cut", make_batch).run()
    _assert_same(_weights(tmp_path / "whole"), _weights(tmp_path / "cut"))


def test_sigterm_saves_and_the_rest_follows(small_config, make_batch, tmp_path):
    make_trainer(small_config, tmp_path / "whole", make_batch).run()
    stopped = make_trainer(
        small_config,
        tmp_path / "cut",
        make_batch,
        on_step=lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None,
    ).run()
    assert stopped is False
    assert newest(tmp_path / "cut").name == "step_000003"
    assert make_trainer(small_config, tmp_path / "cut", make_batch).run()
    _assert_same(_weights(tmp_path / "whole"), _weights(tmp_path / "cut"))


@pytest.fixture
def failing_logger(monkeypatch):
    """A logger that fails when it closes."""

    @contextmanager
    def fail(*args, **kwargs):
        yield lambda row, pictures=None: None
        raise ConnectionError("network is down")

    monkeypatch.setattr("agra.training.trainer.open_loggers", fail)


def test_the_last_checkpoint_is_written_before_the_loggers_close(small_config, make_batch, tmp_path, failing_logger):
    with pytest.raises(ConnectionError):
        make_trainer(small_config, tmp_path, make_batch).run()
    assert newest(tmp_path).name == "step_000006"


@pytest.mark.parametrize("stopped", [False, True])
def test_sigterm_during_the_last_save_does_not_end_it(small_config, make_batch, tmp_path, monkeypatch, stopped):
    """Also where an earlier SIGTERM stopped the run."""
    config = replace(small_config, stage=replace(small_config.stage, steps=3, save_every=10, validate_every=10))

    def terminate(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(config, tmp_path, make_batch, on_step=terminate if stopped else None)
    save, earlier = write.save, []
    previous = signal.signal(signal.SIGTERM, lambda *_: earlier.append(1))  # instead of the end of the tests
    monkeypatch.setattr(write, "save", lambda *args, **kw: terminate() or save(*args, **kw))
    try:
        assert trainer.run() is not stopped
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not earlier
    assert newest(tmp_path).name == ("step_000001" if stopped else "step_000003")


def test_training_lowers_the_loss(small_config, make_batch, tmp_path):
    config = replace(small_config, stage=replace(small_config.stage, steps=60, learning_rate=3e-3))
    trainer = make_trainer(config, tmp_path, lambda config, seed: make_batch(config, seed=0), validation=False)
    trainer.run()
    rows = _rows(tmp_path)
    for name in ("action_loss", "alignment_loss"):
        first, last = (sum(row[name] for row in part) / 10 for part in (rows[:10], rows[-10:]))
        assert last < first - 0.1, name


def test_metrics_name_what_the_stage_computes(small_config, make_batch, tmp_path):
    make_trainer(small_config, tmp_path / "joint", make_batch).run()
    row = _rows(tmp_path / "joint")[0]
    assert {
        "step",
        "loss",
        "video_loss",
        "action_loss",
        "alignment_loss",
        "alignment_cosine_gain",
        "learning_rate",
    } <= row.keys()
    assert {f"gradient_norm/{name}" for name in ("video_dit", "bridge", "action_dit", "projectors")} <= row.keys()
    adapt = at_stage(small_config, Stage.ADAPT)
    make_trainer(adapt, tmp_path / "adapt", make_batch).run()
    row = _rows(tmp_path / "adapt")[0]
    assert "action_loss" not in row
    assert "gradient_norm/video_dit" in row
    assert "gradient_norm/action_dit" not in row


def test_stages_hand_over_what_c3_says(small_config, make_batch, tmp_path):
    adapt = at_stage(small_config, Stage.ADAPT)
    make_trainer(adapt, tmp_path / "adapt", make_batch).run()
    joint = make_trainer(small_config, tmp_path / "joint", make_batch)
    fresh = {k: v.clone() for k, v in joint.method.wam.state_dict().items()}
    load_initial_weights(joint.method, resolve(tmp_path / "adapt"), small_config)
    adapted = load_file(newest(tmp_path / "adapt") / "video_dit.safetensors")
    for name, value in joint.method.wam.state_dict().items():
        assert torch.equal(value, adapted[name] if name.startswith("video_dit.") else fresh[name]), name
    joint.run()
    finetune = make_trainer(at_stage(small_config, Stage.FINETUNE), tmp_path / "finetune", make_batch)
    load_initial_weights(finetune.method, resolve(tmp_path / "joint"), at_stage(small_config, Stage.FINETUNE))
    finetune.run()
    for part in ("video_dit", "bridge", "action_dit"):
        before, after = (load_file(newest(tmp_path / run) / f"{part}.safetensors") for run in ("joint", "finetune"))
        for name, value in after.items():
            assert torch.equal(value, before[name]) == (part == "video_dit"), name
    with pytest.raises(ValueError, match="a joint checkpoint does not start an adapt stage"):
        load_initial_weights(joint.method, resolve(tmp_path / "joint"), adapt)


def test_embodiments_keep_their_rows_between_stages(small_config, make_batch, tmp_path):
    def config(*names):
        return replace(small_config, data=replace(small_config.data, embodiments=names))

    make_trainer(config("robot", "human"), tmp_path / "joint", make_batch).run()
    method = make_trainer(config("human", "robot"), tmp_path / "other", make_batch).method
    with pytest.raises(
        ValueError, match=r"'human' is row 0 here and row 1 in .*; list the embodiments .*: robot human"
    ):
        load_initial_weights(method, tmp_path / "joint", config("human", "robot"))
    load_initial_weights(
        method, tmp_path / "joint", config("robot", "third")
    )  # a new robot starts from a row's weights


def test_projectors_of_other_layers_start_fresh(small_config, make_batch, tmp_path):
    """A study starts every aligned layer from one joint run, which has no projectors of other layers."""
    make_trainer(small_config, tmp_path / "joint", make_batch).run()
    method = small_config.method
    config = replace(small_config, method=replace(method, alignment=replace(method.alignment, layers=(1, 2))))
    method = make_trainer(config, tmp_path / "other", make_batch).method
    fresh = {name: value.clone() for name, value in method.projectors.state_dict().items()}
    load_initial_weights(method, tmp_path / "joint", config)
    trained = load_file(newest(tmp_path / "joint") / "projectors.safetensors")
    for name, value in method.projectors.state_dict().items():
        assert torch.equal(value, trained[f"projectors.{name}"] if name.startswith("1.") else fresh[name]), name


def test_other_settings_do_not_resume_silently(small_config, make_batch, tmp_path):
    make_trainer(small_config, tmp_path, make_batch).run()
    other = replace(small_config, stage=replace(small_config.stage, learning_rate=0.5))
    with pytest.raises(
        ValueError, match=r"made by another config \(stage.learning_rate is 0.0015 there and 0.5 here\)"
    ):
        make_trainer(other, tmp_path, make_batch).run()


def test_settings_that_change_no_weight_may_change(small_config, make_batch, tmp_path):
    first = replace(small_config, stage=replace(small_config.stage, validate_every=2, keep_best="min:probe/score"))
    trainer = make_trainer(
        first, tmp_path, make_batch, on_step=lambda s: s == 4 and os.kill(os.getpid(), signal.SIGTERM)
    )
    trainer.monitors = {"probe": lambda method: {"score": 0.0}}
    assert not trainer.run()
    assert best(tmp_path) is not None
    stage = replace(small_config.stage, log_every=2, validate_every=3, save_every=1, keep_checkpoints=5, keep_best="")
    data = replace(small_config.data, path="elsewhere", cache="elsewhere/cache")
    monitor = replace(small_config.monitor, predictions=2)
    second = replace(small_config, stage=stage, data=data, monitor=monitor, visual_reliance=None, action_noise="random")
    assert make_trainer(second, tmp_path, make_batch).run()
    assert best(tmp_path) is None, "the figures of two names cannot be compared"
    make_trainer(small_config, tmp_path / "whole", make_batch).run()
    _assert_same(_weights(tmp_path), _weights(tmp_path / "whole"))


def test_moved_data_must_be_the_same(small_config, make_batch, tmp_path):
    def resumed(statistics, **places):
        config = replace(small_config, data=replace(small_config.data, **places))
        trainer = make_trainer(config, tmp_path, make_batch)
        trainer.extra_files = {"norm_stats.json": lambda path: path.write_text(statistics)}
        return trainer.run()

    assert resumed("the data's", path="here")
    assert resumed("the data's", path="there")
    for places in ({"path": "there"}, {"path": "here", "cache": "there"}):
        with pytest.raises(ValueError, match=r"norm_stats\.json: differs from that of the data in .*; resume with"):
            resumed("others'", **places)


def test_a_loss_that_is_not_finite_stops_the_run(small_config, make_batch, tmp_path):
    def poisoned(config, seed):
        batch = make_batch(config, seed=seed)
        return replace(batch, actions=batch.actions * float("nan")) if seed == 3 else batch

    with pytest.raises(ValueError, match="step 3: the loss is nan"):
        make_trainer(small_config, tmp_path, poisoned, validation=False).run()
    verify(newest(tmp_path))
    assert newest(tmp_path).name == "step_000002"


def test_config_json_round_trip(small_config, tmp_path):
    assert RunConfig.from_json(small_config.to_json()) == small_config
    text = small_config.to_json().replace('"clip_norm"', '"clipnorm"')
    with pytest.raises(ValueError, match=r"here.json: .*clipnorm.*closest known key is 'clip_norm'"):
        RunConfig.from_json(text, "here.json")
    with pytest.raises(ValueError, match=r"here.json: not JSON"):
        RunConfig.from_json("{", "here.json")


def test_a_revision_that_contradicts_the_condition_level_is_refused(small_config, make_batch, tmp_path):
    method = make_trainer(small_config, tmp_path, make_batch).method
    with pytest.raises(ValueError, match=r"pre-trained needs method\.model\.condition_noise_level None, got 0\.0001"):
        load_initial_weights(method, "nvidia/Cosmos-Predict2.5-2B@diffusers/base/pre-trained", small_config)
    config = with_model(small_config, condition_noise_level=None)
    method = make_trainer(config, tmp_path, make_batch).method
    with pytest.raises(ValueError, match=r"post-trained needs method\.model\.condition_noise_level 0\.0001, got None"):
        load_initial_weights(method, "nvidia/Cosmos-Predict2.5-2B", config)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_names_its_module(small_config, make_batch, tmp_path, value):
    trainer = make_trainer(small_config, tmp_path, make_batch, validation=False)
    handle = trainer.method.wam.bridge.norm.weight.register_hook(lambda gradient: gradient * value)
    with pytest.raises(ValueError, match=r"step 0: the gradient of bridge is not finite \(one of row 0, row 1"):
        trainer.run()
    handle.remove()
    assert newest(tmp_path) is None


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_gives_torch_s_bits(max_norm):
    layers = [torch.nn.Linear(7, 5) for _ in range(2)]
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        layer(torch.linspace(-1, 1, 21).reshape(3, 7)).square().sum().backward()
    ours, theirs = (list(layer.parameters()) for layer in layers)
    norm = clip_gradients(ours, max_norm)
    assert norm == torch.nn.utils.clip_grad_norm_(theirs, max_norm).item()
    assert all(torch.equal(mine.grad, other.grad) for mine, other in zip(ours, theirs, strict=True))


def test_none_leaves_the_gradients_as_they_are():
    layer = torch.nn.Linear(7, 5)
    layer(torch.full((3, 7), 50.0)).square().sum().backward()
    before = [parameter.grad.clone() for parameter in layer.parameters()]
    assert clip_gradients(list(layer.parameters()), None) > 1
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip_norm": 0.0}, r"stage\.clip_norm: expected a number above 0, or None for no clipping, got 0\.0"),
        ({"clip_norm": -1.0}, r"stage\.clip_norm: .* got -1\.0"),
        ({"learning_rate": -1e-3}, r"stage\.learning_rate: expected at least 0, got -0\.001"),
        ({"learning_rate_by_part": {"bridge": -1.0}}, r"stage\.learning_rate_by_part\.bridge: expected at least 0"),
        ({"weight_decay": -1.0}, r"stage\.weight_decay: expected at least 0, got -1\.0"),
        ({"weight_decay": float("nan")}, r"stage\.weight_decay: expected at least 0, got nan"),
    ],
)
def test_settings_that_would_train_backwards_are_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        StageConfig(**changes)


def test_the_best_checkpoint_is_kept(small_config, make_batch, tmp_path):
    """Six steps, validated at 2, 4 and 6, keeping one checkpoint: the best figure comes at step 2."""
    figures = {2: 5.0, 4: 1.0, 6: 3.0}
    stage = replace(small_config.stage, validate_every=2, keep_checkpoints=1, keep_best="max:probe/score")
    config = replace(small_config, stage=stage)
    trainer = make_trainer(config, tmp_path, make_batch)
    trainer.monitors = {"probe": lambda method: {"score": figures[trainer.step]}}
    assert trainer.run()
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000002", "step_000006"]
    assert best(tmp_path) == (tmp_path / "step_000002", 5.0)
    assert resolve(tmp_path / "best") == tmp_path / "step_000002"
    assert artifact_dir(tmp_path / "best") == tmp_path
    assert resolve(tmp_path) == tmp_path / "step_000006"


def test_the_main_process_decides_what_is_best(small_config, make_batch, tmp_path, monkeypatch):
    """Where a figure of this process is better by rounding, it still saves with the others or not at all."""
    verdicts = []
    monkeypatch.setattr(DistributedContext, "gather", lambda self, value: verdicts.append(value) or ["worse", value])
    config = replace(small_config, stage=replace(small_config.stage, validate_every=2, keep_best="max:probe/score"))
    trainer = make_trainer(config, tmp_path, make_batch)
    trainer.monitors = {"probe": lambda method: {"score": 1.0}}
    assert trainer.run()
    assert verdicts[0] == "best"
    assert best(tmp_path) is None


def test_a_best_checkpoint_is_written_once(small_config, make_batch, tmp_path, monkeypatch):
    """Every second step is both saved and validated."""
    config = replace(small_config, stage=replace(small_config.stage, validate_every=2, keep_best="max:probe/score"))
    trainer, written = make_trainer(config, tmp_path, make_batch), []
    save = write.save
    monkeypatch.setattr(
        write, "save", lambda run, step, *rest, **kw: written.append(step) or save(run, step, *rest, **kw)
    )
    trainer.monitors = {"probe": lambda method: {"score": float(trainer.step)}}
    assert trainer.run()
    assert written == [2, 4, 6]


def test_a_stage_starts_from_the_best_checkpoint(small_config, make_batch, tmp_path):
    """RUN/best has no folder of its own. The origin names the checkpoint that was the best."""
    config = replace(small_config, stage=replace(small_config.stage, validate_every=2, keep_best="min:probe/score"))
    trainer = make_trainer(config, tmp_path / "run", make_batch)
    trainer.monitors = {"probe": lambda method: {"score": float(trainer.step)}}
    assert trainer.run()
    later = make_trainer(small_config, tmp_path / "later", make_batch)
    load_initial_weights(later.method, tmp_path / "run" / "best", small_config)
    weights = load_file(tmp_path / "run" / "step_000002" / "bridge.safetensors")
    for name, value in later.method.wam.bridge.state_dict().items():
        assert torch.equal(value, weights[f"bridge.{name}"]), name
    later.run()
    record_origin(tmp_path / "later", tmp_path / "run" / "best")
    assert json.loads((tmp_path / "later" / "origin.json").read_text()) == {"init": "../run/step_000002", "head": None}
    assert [stage.config for stage in lineage(tmp_path / "later")] == [config, small_config]
    with pytest.raises(FileNotFoundError, match="later/best: the run has no best checkpoint"):
        load_initial_weights(trainer.method, tmp_path / "later" / "best", small_config)


def test_min_keeps_the_least_value(small_config, make_batch, tmp_path):
    figures = {2: 5.0, 4: 1.0, 6: 3.0}
    config = replace(small_config, stage=replace(small_config.stage, validate_every=2, keep_best="min:probe/score"))
    trainer = make_trainer(config, tmp_path, make_batch)
    trainer.monitors = {"probe": lambda method: {"score": figures[trainer.step]}}
    assert trainer.run()
    assert best(tmp_path) == (tmp_path / "step_000004", 1.0)


def test_a_figure_that_is_not_logged_is_named(small_config, make_batch, tmp_path):
    config = replace(small_config, stage=replace(small_config.stage, keep_best="min:validation/score"))
    with pytest.raises(
        ValueError, match=r"no figure is logged as 'validation/score'; choose one of validation/action_loss"
    ):
        make_trainer(config, tmp_path, make_batch).run()
    assert newest(tmp_path).name == "step_000003", "the steps until then are not lost"
    with pytest.raises(ValueError, match="expected min:NAME or max:NAME"):
        replace(small_config.stage, keep_best="validation/loss")


def test_a_best_checkpoint_needs_a_validation(small_config, make_batch, tmp_path):
    config = replace(small_config, stage=replace(small_config.stage, keep_best="min:validation/action_loss"))
    with pytest.raises(ValueError, match=r"stage\.keep_best: .* neither held-out windows nor monitors"):
        make_trainer(config, tmp_path, make_batch, validation=False)


def test_a_figure_that_depends_on_the_micro_batches_chooses_no_checkpoint(small_config, make_batch, tmp_path):
    stage = replace(small_config.stage, keep_best="max:validation/alignment_cosine_gain")
    with pytest.raises(ValueError, match=r"depends on .* a micro-batch; choose min:validation/alignment_loss"):
        make_trainer(replace(small_config, stage=stage), tmp_path, make_batch)


def test_a_validation_may_leave_out_a_figure_that_an_earlier_one_had(small_config, make_batch, tmp_path):
    figures = {2: {"ratio": 2.0}, 4: {"other": 0.0}, 6: {"ratio": 1.0}}
    config = replace(small_config, stage=replace(small_config.stage, validate_every=2, keep_best="min:probe/ratio"))
    trainer = make_trainer(config, tmp_path, make_batch)
    trainer.monitors = {"probe": lambda method: figures[trainer.step]}
    assert trainer.run()
    assert best(tmp_path) == (tmp_path / "step_000006", 1.0)


def test_a_checkpoint_written_late_still_names_its_own_step(small_config, make_batch, tmp_path, monkeypatch):
    """With a mesh the files are written in the background, while training continues."""
    trainer, asked = make_trainer(small_config, tmp_path, make_batch), {}
    monkeypatch.setattr(
        "agra.training.trainer.distributed_checkpoint.save", lambda run, step, tensors, files, **_: asked.update(files)
    )
    trainer._saving, trainer.step = object(), 3
    trainer.save()
    trainer.step = 4
    asked["trainer.json"](tmp_path / "trainer.json")
    assert json.loads((tmp_path / "trainer.json").read_text()) == {"step": 3}


def test_an_average_starts_with_the_first_gradient():
    late = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([late], fused=True)
    trainer = SimpleNamespace(stage=StageConfig(ema_decay=0.5), optimizer=optimizer)
    Trainer._average(trainer, [late], 0)
    late.grad = torch.ones(3)
    optimizer.step()
    Trainer._average(trainer, [late], 1)
    assert torch.equal(optimizer.state[late]["ema"], late.detach())
