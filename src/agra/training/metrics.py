"""Logs of a training run: metrics.jsonl, TensorBoard, the progress bar, and the throughput meter."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agra.files import naming, write_text

Log = Callable[[dict[str, float]], None]
PREFIX = "meter/"
"""Prefix of figures that differ between two runs of the same config, as `samples_per_second` does."""


@dataclass(kw_only=True)
class ThroughputMeter:
    """Speed and memory of this process between two readings."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    flops_per_sample: float | None = None
    peak_flops: float | None = None
    """FLOPs per second of one device. Model FLOPs utilisation is measured where both numbers are set."""

    def start(self, step: int) -> None:
        """Start measuring at `step`."""
        self._step, self._clock, self._waited = step, time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside this context as time spent waiting for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start

    def read(self, step: int, batch_size: int, devices: int) -> dict[str, float]:
        """Return the figures since the last reading. `batch_size` is that of all devices together."""
        seconds = max(time.monotonic() - self._clock, 1e-9)
        rate = (step - self._step) * batch_size / seconds
        figures = {
            "samples_per_second_per_device": rate / devices,
            "data_wait_fraction": self._waited / seconds,
            "peak_memory_bytes": float(self._peak_memory()),
        }
        if self.flops_per_sample is not None and self.peak_flops is not None:
            figures["mfu"] = rate / devices * self.flops_per_sample / self.peak_flops
        self.start(step)
        return {"samples_per_second": rate} | {PREFIX + name: value for name, value in figures.items()}

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # of the whole process


@contextmanager
def metrics_log(folder: Path, step: int, *, enabled: bool = True) -> Iterator[Log]:
    """Yield a function that writes rows into metrics.jsonl, and into TensorBoard where it is installed.

    Both logs are cut back to `step`, from which the run resumes. Without `enabled` the function writes nothing.
    """
    if not enabled:
        yield lambda row: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    earlier = []
    if path.exists():
        rows = (json.loads(line) for line in path.read_text().splitlines() if line.endswith("}"))
        earlier = [row for row in rows if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in earlier))
    with _tensorboard(folder, step) as board:

        def log(row: dict[str, float]) -> None:
            with naming(path), path.open("a") as handle:
                handle.write(json.dumps(row) + "\n")
            board(row)

        yield log


@contextmanager
def _tensorboard(folder: Path, step: int) -> Iterator[Log]:
    if find_spec("tensorboard") is None:
        yield lambda row: None
        return
    # Imported here: training does not need TensorBoard.
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                board.add_scalar(name, value, int(row["step"]))

    try:
        yield log
    finally:
        board.close()


@contextmanager
def progress(name: str, total: int, start: int, *, shown: bool = True) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar. Yields the function that sets its step and loss."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task(name, total=total, completed=start, loss="")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"loss {loss:.4f}")
