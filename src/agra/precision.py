"""Where bfloat16 helps. A leaf, shared by training and the frozen networks."""

from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]
"""Of matrix products under autocast; `auto` is bfloat16 on devices with instructions for it, float32 elsewhere."""


def bfloat16_helps(device: torch.device) -> bool:
    """Whether `device` multiplies in bfloat16 natively. A CPU that doesn't emulates it, tens of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(device: torch.device, precision: Precision, *, cache: bool = True) -> torch.autocast:
    """The context in which networks run at `precision` on `device`; parameters and gradients stay as they are.

    Without `cache`, a weight is cast again at each use: that costs time, and saves a bfloat16 copy of the model.
    """
    half = precision == "bfloat16" or (precision == "auto" and bfloat16_helps(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=cache)
