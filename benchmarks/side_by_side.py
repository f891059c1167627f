"""Alternating timing of two implementations of one task, and the JSON line at the end of every benchmark."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from agra.files import write_text


def compare(
    name: str,
    ours: Callable[[], object],
    alternative: Callable[[], object],
    *,
    unit: str,
    rounds: int,
    warm: bool = False,
) -> dict[str, object]:
    """Time the two in `rounds` alternating rounds. Return the medians in seconds per call and the ratio alternative / ours.

    Each runs once before the timing, unless both are `warm`. `spread` is the smallest and largest ratio within a round,
    which shows the noise of the machine.
    """
    for function in () if warm else (ours, alternative):
        function()
    times: dict[str, list[float]] = {"ours": [], "alternative": []}
    for index in range(rounds):
        pair = (("ours", ours), ("alternative", alternative))
        for label, function in pair if index % 2 == 0 else pair[::-1]:
            start = time.perf_counter()
            function()
            times[label].append(time.perf_counter() - start)
    return ratio_of(name, times["ours"], times["alternative"], unit=unit)


def ratio_of(name: str, ours: list[float], alternative: list[float], *, unit: str) -> dict[str, object]:
    """Compute the fields of the JSON line from the seconds of each round."""
    ratios = [b / a for a, b in zip(ours, alternative, strict=True)]
    return {
        "name": name,
        "ratio": round(statistics.median(ratios), 3),
        "ours": round(statistics.median(ours), 5),
        "alternative": round(statistics.median(alternative), 5),
        "unit": unit,
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(ratios),
        "machine": machine(),
    }


def machine() -> str:
    """Describe the processor, the number of threads and the torch version."""
    processor = platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peak_flops() -> float:
    """Measure this machine's float32 FLOP/s on torch's threads: the best of several large matrix products."""
    a, b = torch.randn(2, 1536, 1536)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 1536**3 / min(times)


def finish(result: Mapping[str, object], folder: Path = Path("outputs/benchmarks")) -> None:
    """Print the JSON line that ends every benchmark, and write it to FOLDER/NAME.json."""
    line = json.dumps(result)
    print(line)
    write_text(folder / f"{result['name']}.json", line + "\n")
