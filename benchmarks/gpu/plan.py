"""The planner's figures of the training steps, counted on the CPU in a process of its own while the GPU works."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import sleep

from agra.files import write_text
from agra.stages import Stage
from agra.training.memory_estimate import flops_per_sample, measure
from benchmarks.gpu.setting import Setting

MOST = 256
"""Samples up to which peaks are kept."""
LAYOUTS = ((Stage.JOINT, 1.0), (Stage.JOINT, 0.0), (Stage.ADAPT, 1.0), (Stage.FINETUNE, 0.0), (Stage.JOINT, 0.5))
"""Stage and fraction of activation checkpointing, in the order in which they are needed."""
DRY_LAYOUTS = LAYOUTS[:1] + LAYOUTS[3:4]
_FILLED = 0.92
"""Fraction of a GPU's memory that a plan fills."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The planner's word on a step."""

    peaks: Sequence[int]
    """Bytes at the fullest moment with 1, 2, ... samples in flight."""
    flops_per_sample: float
    """Without what activation checkpointing computes twice."""
    trained: int

    def most(self, memory: float) -> int:
        """Samples in flight that fit."""
        return sum(peak <= _FILLED * memory for peak in self.peaks)


def count(setting: Setting) -> None:
    """Write every layout's figures as soon as they are counted."""
    flops: dict[Stage, float] = {}
    for stage, fraction in setting.pick(LAYOUTS, DRY_LAYOUTS):
        if stage not in flops:
            flops[stage] = flops_per_sample(setting.config(stage))
        cost = measure(setting.config(stage), activation_checkpointing=fraction)
        planned = Planned(
            peaks=[cost.peak(samples) for samples in range(1, MOST + 1)],
            flops_per_sample=flops[stage],
            trained=cost.trained,
        )
        write_text(_file(setting.scratch, stage, fraction), json.dumps(asdict(planned)))


def start(setting: Setting) -> BaseProcess:
    """Begin to count."""
    process = setting.processes().Process(target=count, args=(setting,), daemon=True)
    process.start()
    return process


def planned(process: BaseProcess, scratch: Path, stage: Stage, fraction: float) -> Planned:
    """The figures of a layout, waited for. Raises RuntimeError where the counting process has failed."""
    path = _file(scratch, stage, fraction)
    while not path.is_file():
        if not process.is_alive() and not path.is_file():
            raise RuntimeError(f"counting the steps failed with exit code {process.exitcode}")
        sleep(0.1)
    return Planned(**json.loads(path.read_text()))


def _file(scratch: Path, stage: Stage, fraction: float) -> Path:
    return scratch / f"plan_{stage}_{fraction:g}.json"
