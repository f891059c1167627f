"""The loggers themselves, offline: what they hold afterwards, also after a run was resumed."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agra.data.lerobot.decoding import decode_frames
from agra.recipes import tiny
from agra.training.loggers import check_loggers, open_loggers

PICTURE = np.zeros((8, 12, 3), np.uint8)
VIDEO = np.arange(5 * 16 * 24 * 3, dtype=np.uint32).reshape(5, 16, 24, 3).astype(np.uint8)


def log(names, folder, *, first, last):
    """Log the steps `first` to `last` of a run that resumes from the step before."""
    with open_loggers(names, folder, first - 1, tiny()) as write:
        for step in range(first, last + 1):
            write({"step": step, "loss": 1 / step})
        write({"step": last, "validation/loss": 0.5}, {"grounding/attention": PICTURE, "prediction/video": VIDEO})


def test_unknown_and_missing_loggers(monkeypatch):
    with pytest.raises(ValueError, match="--log: expected jsonl, tensorboard, wandb, trackio, got 'mlflow'"):
        check_loggers(["mlflow"])
    monkeypatch.setattr("agra.training.loggers.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"wandb is not installed; install it with: pip install '\.\[wandb\]' in a checkout"
    ):
        check_loggers(["wandb"])


def test_jsonl_alone_is_cut_back_to_the_step_of_the_checkpoint(tmp_path):
    log(("jsonl",), tmp_path, first=1, last=4)
    log(("jsonl",), tmp_path, first=3, last=3)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_holds_figures_and_pictures(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log(("tensorboard",), tmp_path, first=1, last=3)
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3]
    (image,) = board.Images("grounding/attention")
    assert (image.height, image.width) == PICTURE.shape[:2]
    (frames,) = board.Images("prediction/video")
    assert (frames.height, frames.width) == (5 * 16, 24)


def test_tensorboard_keeps_the_step_from_which_a_run_resumes(tmp_path):
    """With its validation, and forgets the steps after it, as metrics.jsonl does."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, last in ((1, 3), (4, 6), (5, 5)):
        log(("tensorboard",), tmp_path, first=first, last=last)
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [event.step for event in board.Scalars("validation/loss")] == [3, 5]


def in_a_process(names, folder, **environment):
    """Log a run, and its resumption, each in a process of its own, as training does."""
    for first, last in ((1, 3), (3, 4)):
        code = (
            f"import pathlib\nfrom tests.training.test_loggers import log\n"
            f"log({names!r}, pathlib.Path({str(folder)!r}), first={first}, last={last})"
        )
        root = Path(__file__).parent.parent.parent
        settings = os.environ | environment
        subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env=settings, capture_output=True)


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    in_a_process(("wandb",), tmp_path / "run", WANDB_MODE="offline", WANDB_SILENT="true")
    runs = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({path.name.rsplit("-", 1)[1] for path in runs}) == 1  # one run, resumed
    assert all(next(path.glob("run-*.wandb")).stat().st_size > 1_000 for path in runs)
    pictures = [picture for path in runs for picture in path.glob("files/media/images/grounding/*.png")]
    assert len(pictures) == 2
    videos = [video for path in runs for video in path.glob("files/media/videos/prediction/*.mp4")]
    assert len(videos) == 2


def test_trackio_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    in_a_process(("trackio",), tmp_path / "run", TRACKIO_DIR=str(tmp_path / "trackio"))
    (database,) = (tmp_path / "trackio").glob("agra*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"run"}
    losses = {step: json.loads(metrics)["loss"] for _, step, metrics in rows if "loss" in json.loads(metrics)}
    assert losses == {step: 1 / step for step in (1, 2, 3, 4)}
    (video,) = (tmp_path / "run" / "videos").glob("prediction-video-000004.mp4")
    assert decode_frames(video, np.arange(5) / 2, fps=2).shape == VIDEO.shape
    assert [*(tmp_path / "trackio").rglob("*.mp4")]
