"""Section 1: the rates that give every other figure its floor."""

from statistics import median

import torch

from benchmarks.gpu.report import Figures, Section
from benchmarks.gpu.setting import Setting


def run(setting: Setting, section: Section) -> None:
    """A bfloat16 product of two 8,192 x 8,192 matrices, and a copy of 4 GiB."""
    report = section.report
    product = section.measure("bf16 product", lambda: _product(setting), needs=0)
    report.peak_flops = product.get("flops_per_second")
    copy = section.measure("copy", lambda: _copy(setting), needs=0)
    report.bandwidth = copy.get("bytes_per_second")


def _product(setting: Setting) -> Figures:
    size, count = setting.pick(8192, 512), setting.pick(10, 2)
    a, b = torch.randn(2, size, size, device=setting.device, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(count):
            torch.mm(a, b)

    seconds = median(setting.seconds(products, rounds=10)) / count
    return {"seconds": seconds, "flops_per_second": 2 * size**3 / seconds}


def _copy(setting: Setting) -> Figures:
    source = torch.randn(setting.pick(2**30, 2**20), device=setting.device)
    target = torch.empty_like(source)
    seconds = median(setting.seconds(lambda: target.copy_(source), rounds=10))
    return {"seconds": seconds, "bytes_per_second": 2 * source.nbytes / seconds}
