"""Time two ways of doing the same thing in turn and print their ratio."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def compare(
    name: str,
    ours: Callable[[], object],
    alternative: Callable[[], object],
    *,
    unit: str,
    rounds: int,
    warm: bool = False,
) -> dict[str, object]:
    """Alternate the two `rounds` times after a warm-up, unless they are `warm`; medians in `unit` (seconds a call), ratio alternative / ours.

    `spread` is the smallest and largest ratio of a round's own pair, which shows how noisy the machine was.
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
    ratios = [b / a for a, b in zip(times["ours"], times["alternative"], strict=True)]
    medians = {label: statistics.median(values) for label, values in times.items()}
    return {
        "name": name,
        "ratio": round(statistics.median(ratios), 3),
        "ours": round(medians["ours"], 5),
        "alternative": round(medians["alternative"], 5),
        "unit": unit,
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": rounds,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def peak_flops() -> float:
    """Of this machine in float32, products a second: the best of several large matrix products on torch's threads."""
    a, b = torch.randn(2, 1536, 1536)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return 2 * 1536**3 / min(times)


def finish(result: Mapping[str, object], folder: Path = Path("outputs/benchmarks")) -> None:
    """Print the one JSON line that every benchmark ends with, and write it to FOLDER/NAME.json."""
    line = json.dumps(result)
    print(line)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{result['name']}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(line + "\n")
    temporary.rename(file)
