"""The throughput meter and the progress bar of a training run."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
