"""Loggers of a training run: metrics.jsonl, and TensorBoard, Weights & Biases or Trackio where they are chosen."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from agra.config import RunConfig, flat
from agra.files import naming, write_text

FILE = "metrics.jsonl"
LOGGERS = ("jsonl", "tensorboard", "wandb", "trackio")
PROJECT = "agra"
"""Project of Weights & Biases and Trackio. Their own environment variables choose another."""
Pictures = Mapping[str, np.ndarray]
"""Pictures (H, W, 3) and videos (F, H, W, 3) uint8 by name."""
VIDEO_FPS = 2
"""Frames per second of a logged video. A predicted video has few frames."""
_NONE: Pictures = MappingProxyType({})


class Log(Protocol):
    """Writes a row of figures, with its step under "step", and pictures and videos where the logger shows them."""

    def __call__(self, row: Mapping[str, float], pictures: Pictures = _NONE) -> None:
        """Write the row, the pictures and the videos."""
        ...


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown logger, ImportError for one that is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ValueError(f"--log: expected {', '.join(LOGGERS)}, got {name!r}")
        if name != "jsonl" and find_spec(name) is None:
            raise ImportError(
                f"--log {name}: {name} is not installed; install it with: pip install '.[{name}]' in a checkout of agra"
            )


@contextmanager
def open_loggers(
    names: Sequence[str] | None, folder: Path, step: int, config: RunConfig, *, enabled: bool = True
) -> Iterator[Log]:
    """Yield a function that writes into metrics.jsonl, which is always written, and into the other loggers.

    None chooses TensorBoard where it is installed. The logs are cut back to `step`, from which the run resumes. Weights
    & Biases and Trackio cannot forget rows, so a resumed run repeats those after the checkpoint. Without `enabled`
    nothing is written.
    """
    if not enabled:
        yield lambda row, pictures=_NONE: None
        return
    if names is None:
        names = ("tensorboard",) if find_spec("tensorboard") is not None else ()
    check_loggers(names)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        logs: list[Log] = [_jsonl(folder, step)]
        if "tensorboard" in names:
            logs.append(stack.enter_context(_tensorboard(folder, step)))
        logs += [stack.enter_context(_tracker(n, folder, config)) for n in ("wandb", "trackio") if n in names]

        def log(row: Mapping[str, float], pictures: Pictures = _NONE) -> None:
            for write in logs:
                write(row, pictures)

        yield log


def _jsonl(folder: Path, step: int) -> Log:
    path, earlier = folder / FILE, []
    if path.exists():
        rows = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
        earlier = [row for row in rows if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in earlier))

    def log(row: Mapping[str, float], pictures: Pictures = _NONE) -> None:
        with naming(path), path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")

    return log


@contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[Log]:
    # Imported here: training does not need TensorBoard.
    from torch.utils.tensorboard import SummaryWriter

    # The board forgets rows from `purge_step` on. Those of `step` stay, as in metrics.jsonl.
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(row: Mapping[str, float], pictures: Pictures = _NONE) -> None:
        for name, value in row.items():
            if name != "step":
                board.add_scalar(name, value, int(row["step"]))
        for name, picture in pictures.items():
            # TensorBoard's own videos need another library. The frames of a video stand below each other.
            board.add_image(name, picture.reshape(-1, *picture.shape[-2:]), int(row["step"]), dataformats="HWC")

    try:
        yield log
    finally:
        board.close()


def _write_video(folder: Path, name: str, step: int, video: np.ndarray) -> str:
    """Write videos/NAME-STEP.mp4 into the folder of the run. Return its path."""
    # Imported here: it needs PyAV.
    from agra.data.lerobot.video import write_video

    path = folder / "videos" / f"{name.replace('/', '-')}-{step:06d}.mp4"
    path.parent.mkdir(exist_ok=True)
    write_video(path, video, fps=VIDEO_FPS)
    return str(path)


@contextmanager
def _tracker(name: str, folder: Path, config: RunConfig) -> Iterator[Log]:
    """Log into Weights & Biases or Trackio, whose interfaces nearly agree. A resumed run continues under its name."""
    module = import_module(name)
    settings: dict[str, Any] = {
        "project": os.environ.get(f"{name.upper()}_PROJECT", PROJECT),
        "name": folder.name,
        "config": flat(json.loads(config.to_json())),
        "resume": "allow",
    }
    if name == "wandb":
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        settings |= {"dir": str(folder), "id": identity}
    try:
        run = module.init(**settings)
    except getattr(module, "Error", OSError) as error:
        raise OSError(f"--log {name}: {error}; log in first, or work offline with WANDB_MODE=offline") from error
    if name == "wandb":  # a resumed run repeats steps, which wandb's own step counter forbids
        run.define_metric("*", step_metric="step")

    def log(row: Mapping[str, float], pictures: Pictures = _NONE) -> None:
        content = dict(row)
        for key, picture in pictures.items():
            if picture.ndim == 3:
                content[key] = module.Image(picture)
            else:
                content[key] = module.Video(_write_video(folder, key, int(row["step"]), picture), format="mp4")
        step = {} if name == "wandb" else {"step": int(content.pop("step"))}
        run.log(content, **step)

    try:
        yield log
    finally:
        run.finish()
