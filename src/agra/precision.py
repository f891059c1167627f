"""Devices, and bfloat16 where it helps. A leaf, shared by training, inference and the frozen networks."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor
from torch.amp import is_autocast_available

Precision = Literal["auto", "bfloat16", "float32"]
"""Precision of matrix products under autocast. `auto` is bfloat16 on GPUs with instructions for it, else float32, so that a
CPU's figures do not depend on its model."""


def local_device(name: str | torch.device) -> torch.device:
    """The device of this process: under torchrun "cuda" is the GPU of the process's local rank.

    Raises ValueError where torch sees no such GPU.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    present = torch.cuda.device_count()
    if not present:
        raise ValueError(f"device {device}: torch sees no GPU; check the driver and that torch is a CUDA build")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= present:
        raise ValueError(f"device cuda:{index}: there are {present} GPUs; start at most one process for each")
    return torch.device("cuda", index)


def bfloat16_helps(device: torch.device) -> bool:
    """Whether `device` is a GPU that multiplies in bfloat16 natively."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """The type in which products are computed at `precision` on `device`."""
    half = precision == "bfloat16" or (precision == "auto" and bfloat16_helps(device))
    return torch.bfloat16 if half else torch.float32


def autocast(device: torch.device, precision: Precision, *, cache: bool = True) -> AbstractContextManager:
    """The context in which networks run at `precision` on `device`. Parameters and gradients keep their type.

    Without `cache`, a weight is cast again at each use: slower, but no bfloat16 copy of the model is kept.
    """
    if not is_autocast_available(device.type):
        return nullcontext()
    half = compute_dtype(device, precision) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=cache)


def without_autocast(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`module(x)` in the type of `x`.

    CUDA's autocast runs layer norms in float32 and keeps a float32 copy of their inputs for the backward pass, the CPU's
    leaves them alone. Norms without weights compute in float32 inside either way.
    """
    kind = x.device.type
    # Compiled code runs through here, and Dynamo of torch 2.11 cannot trace `is_autocast_available`.
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return module(x)
    with torch.autocast(kind, enabled=False):
        return module(x)


def allow_tensor_cores(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, in this process. Nothing on other devices."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
