"""What a run writes down while it trains: metrics.jsonl, TensorBoard, the progress bar, and how fast it is."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from agra.training.checkpoint import write_text

Log = Callable[[dict[str, float]], None]
PREFIX = "meter/"
"""Of figures that, as samples_per_second, differ between two runs of the same config."""


@dataclass(kw_only=True)
class Meter:
    """Speed and memory between two readings of this process."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    flops_per_sample: float | None = None
    peak_flops: float | None = None
    """Of one device, a second. Where either is None, no model FLOPs utilisation is given."""

    def start(self, step: int) -> None:
        """Begin at `step`."""
        self._step, self._clock, self._waited = step, time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside counts as waiting for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start

    def read(self, step: int, batch_size: int, devices: int) -> dict[str, float]:
        """Figures since the last reading; `batch_size` counts all devices."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        rate = (step - self._step) * batch_size / seconds
        found = {
            "samples_per_second_per_device": rate / devices,
            "data_wait_share": self._waited / seconds,
            "peak_memory_bytes": float(self._peak_memory()),
        }
        if self.flops_per_sample is not None and self.peak_flops is not None:
            found["mfu"] = rate / devices * self.flops_per_sample / self.peak_flops
        self.start(step)
        return {"samples_per_second": rate} | {PREFIX + name: value for name, value in found.items()}

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # of the whole process


@contextmanager
def logbook(folder: Path, step: int, *, written: bool = True) -> Iterator[Log]:
    """metrics.jsonl and TensorBoard, both cut back to the step that the run resumes from; with `written`."""
    if not written:
        yield lambda row: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    kept = []
    if path.exists():
        rows = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
        kept = [row for row in rows if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(row: dict[str, float]) -> None:
        with path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                board.add_scalar(name, value, int(row["step"]))

    try:
        yield log
    finally:
        board.close()


@contextmanager
def progress(name: str, total: int, start: int, *, shown: bool = True) -> Iterator[Callable[[int, float], None]]:
    """A bar that is told the step and the loss."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=start, loss=float("nan"))
        yield lambda step, loss: bar.update(task, completed=step, loss=loss)
