"""Figures as they are measured: a JSON file for each section, rewritten after each figure, and the Markdown table."""

import json
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from agra.files import write_text

Figures = dict[str, Any]
"""Measured numbers. `seconds` is the time; `flops` and `bytes` give its floor; the others are shown as they are."""


@dataclass(kw_only=True)
class Report:
    """All sections of a run."""

    output: Path
    budget: float
    """Seconds for everything."""
    machine: Figures
    sections: "list[Section]" = field(default_factory=list)
    peak_flops: float | None = None
    """Measured, FLOPs per second."""
    bandwidth: float | None = None
    """Measured, bytes per second."""

    def __post_init__(self) -> None:
        self._end = monotonic() + self.budget

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - monotonic()

    def section(self, number: int, name: str) -> "Section":
        """Begin a section."""
        self.sections.append(Section(self, number, name))
        return self.sections[-1]

    def floor(self, figures: Figures) -> float | None:
        """Seconds that the figures' FLOPs and bytes take at the measured rates, the longer of the two."""
        terms = [
            figures[key] / rate
            for key, rate in (("flops", self.peak_flops), ("bytes", self.bandwidth))
            if figures.get(key) and rate
        ]
        return max(terms, default=None)

    @property
    def failures(self) -> list[str]:
        """Figures that raised an error."""
        return [f"{s.name}: {name}" for s in self.sections for name, f in s.figures.items() if "failed" in f]

    def table(self) -> str:
        """The Markdown table."""
        lines = [
            f"{self.machine['device']}, torch {self.machine['torch']}, Python {self.machine['python']}.",
            "",
            "| section | figure | time | floor | floor / time | more |",
            "| --- | --- | ---: | ---: | ---: | --- |",
        ]
        for section in self.sections:
            lines += [
                f"| {section.number} {section.name} | {name} | {_row(figures)} |"
                for name, figures in section.figures.items()
            ]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """The table as it is now."""
        write_text(self.output / "table.md", self.table())


class Section:
    """A section's figures by name."""

    def __init__(self, report: Report, number: int, name: str) -> None:
        self.report, self.number, self.name = report, number, name
        self.figures: dict[str, Figures] = {}

    def measure(self, name: str, call: Callable[[], Mapping[str, Any]], *, needs: float) -> Figures:
        """Record the figures that `call` returns, if its `needs` seconds are left.

        A missing package skips the figure. An error is recorded and the run goes on, since the machine may be there for this
        run only. `Report.failures` names it.
        """
        left = self.report.left
        if left < needs:
            return self.skip(name, f"{needs:.0f} s needed, {max(left, 0):.0f} s left")
        started = monotonic()
        try:
            figures: Figures = dict(call())
        except ModuleNotFoundError as error:
            return self.skip(name, f"the package {error.name} is missing")
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            text = f"{type(error).__name__}: {error}"
            figures = {"failed": text[:2000], "traceback": traceback.format_exc()[-4000:]}
        floor = self.report.floor(figures)
        if floor is not None:
            figures["floor_seconds"] = floor
        return self._record(name, figures | {"took_seconds": round(monotonic() - started, 2)})

    def skip(self, name: str, reason: str) -> Figures:
        """Record that a figure was not measured."""
        return self._record(name, {"skipped": reason})

    def _record(self, name: str, figures: Figures) -> Figures:
        self.figures[name] = figures
        content = {"section": self.name, "machine": self.report.machine, "figures": self.figures}
        write_text(self.report.output / f"{self.number}_{self.name}.json", json.dumps(content, indent=1) + "\n")
        self.report.write()
        print(f"{self.number} {self.name}: {name}: {_row(figures).replace(' | ', ', ')}", flush=True)
        return figures


def machine(device: torch.device) -> Figures:
    """The device and the versions that decide its speed."""
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    figures: Figures = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{torch.cuda.device_count()} x {properties.name}"
        figures |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return {"device": name, **figures}


_HIDDEN = ("seconds", "floor_seconds", "took_seconds", "flops", "bytes", "traceback", "times")


def _row(figures: Figures) -> str:
    """The cells of a figure after its name."""
    if "skipped" in figures:
        return f"- | - | - | skipped: {figures['skipped']}"
    if "failed" in figures:
        return f"- | - | - | failed: {figures['failed'].splitlines()[0][:120].replace('|', '/')}"
    seconds, floor = figures.get("seconds"), figures.get("floor_seconds")
    cells = [_time(seconds), _time(floor), f"{floor / seconds:.0%}" if seconds and floor else "-"]
    more = ", ".join(
        f"{k.replace('_', ' ')} {_number(v)}" for k, v in figures.items() if k not in _HIDDEN and v is not None
    )
    return " | ".join([*cells, more or "-"])


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_number(v)}" for k, v in value.items()) + ")"
    return str(value)
