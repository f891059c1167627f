"""`python -m benchmarks.gpu` (see the package's docstring)."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks import gpu
from benchmarks.gpu import answer, frozen, fsdp, peak, plan, resume, step, tiny, video_dit
from benchmarks.gpu.report import Report, machine
from benchmarks.gpu.setting import Setting

_SHORTEST_STEP = 25.0
"""Seconds that section 4 needs for its first figure."""
SECTIONS: dict[int, tuple[str, Callable[..., None]]] = {
    1: ("peak", peak.run),
    2: ("video_dit", video_dit.run),
    3: ("answer", answer.run),
    4: ("step", step.run),
    5: ("frozen", frozen.run),
    6: ("resume", resume.run),
    7: ("tiny", tiny.run),
    8: ("fsdp", fsdp.run),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the script."""

    output: Path = Path("outputs/gpu")
    """Folder of the JSON files and the table."""
    sections: tuple[int, ...] = tuple(SECTIONS)
    """Sections to run, by number. Section 1 always runs, since it gives the floors."""
    budget: float = 480.0
    """Seconds for the whole run. Sections and figures that do not fit are skipped by name."""
    dry_run: bool = False
    """Run every section at tiny sizes on the CPU. Its times mean nothing."""
    scratch: Path | None = None
    """Folder for checkpoints, up to 20 GB. By default a temporary one."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.sections) - SECTIONS.keys())
        if unknown:
            raise ValueError(f"--sections: expected numbers of {min(SECTIONS)} to {max(SECTIONS)}, got {unknown[0]}")
        if self.budget <= 0:
            raise ValueError(f"--budget: expected seconds above 0, got {self.budget}")


def main(arguments: list[str] | None = None) -> int:
    """Run the sections. Returns 1 where a figure failed, and 2 where there is no GPU."""
    options = tyro.cli(Options, args=arguments, description=gpu.__doc__)
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU; --dry-run runs every section at tiny sizes on the CPU")
        return 2
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", 0)
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(output=options.output, budget=options.budget, machine=machine(device))
    with ExitStack() as stack:
        scratch = options.scratch or Path(tempfile.mkdtemp(prefix="agra-gpu-"))
        scratch.mkdir(parents=True, exist_ok=True)
        if options.scratch is None:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        setting = Setting(device=device, scratch=scratch)
        stack.enter_context(setting.compiler())
        _run(options, setting, report)
    print(f"\n{report.table()}")
    for failure in report.failures:
        print(f"failed: {failure}")
    return 1 if report.failures else 0


def _run(options: Options, setting: Setting, report: Report) -> None:
    counting = plan.start(setting) if 4 in options.sections and report.left > _SHORTEST_STEP else None
    for number, (name, run) in SECTIONS.items():
        if number not in options.sections and number != 1:
            continue
        section = report.section(number, name)
        if report.left <= 0:
            section.skip("all", "the budget is spent")
            continue
        if number != 4:
            run(setting, section)
        elif counting is None:
            section.skip("all", f"{_SHORTEST_STEP:.0f} s needed, {report.left:.0f} s left")
        else:
            step.run(setting, section, counting)
        setting.reset_peak()
    if counting is not None:
        counting.kill()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
