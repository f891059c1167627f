"""Devices and numerical precision, shared by training, inference and the frozen networks."""

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from threading import Event, Thread
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available

Precision = Literal["auto", "bfloat16", "float32"]
"""Precision of matrix products under autocast. `auto` is bfloat16 on GPUs with instructions for it and float32
otherwise, so that results do not depend on the model of the CPU."""


Result = TypeVar("Result")

_RECOMPILE_LIMIT = 64
"""Number of graphs of one function that Dynamo may hold."""


def local_device(name: str | torch.device) -> torch.device:
    """Return the device of this process. Under torchrun, "cuda" is the GPU of the local rank.

    Raises ValueError if torch finds no such GPU.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if not count:
        raise ValueError(f"device {device}: torch finds no GPU; check the driver and that torch is a CUDA build")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= count:
        raise ValueError(
            f"device cuda:{index}: there are {count} GPUs; start at most one process for each, and let every process see "
            "all GPUs of its machine (with Slurm --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", index)


def bfloat16_helps(device: torch.device) -> bool:
    """Return whether `device` is a GPU with bfloat16 instructions."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(device: torch.device, precision: Precision) -> torch.dtype:
    """Return the data type of matrix products at `precision` on `device`."""
    half = precision == "bfloat16" or (precision == "auto" and bfloat16_helps(device))
    return torch.bfloat16 if half else torch.float32


def autocast(device: torch.device, precision: Precision, *, cache: bool = True) -> AbstractContextManager:
    """Return the autocast context of `precision` on `device`. Parameters and gradients keep their data type.

    Without `cache` each use casts a weight again. This is slower but keeps no bfloat16 copy of the model.
    """
    if not is_autocast_available(device.type):
        return nullcontext()
    half = compute_dtype(device, precision) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=cache)


def autocast_to_weights(module: nn.Module) -> AbstractContextManager:
    """Return autocast where the weights of `module` are bfloat16, so that it accepts float32 inputs.

    With other weights an autocast that is active around it, as in training, stays as it is.
    """
    weight = next(module.parameters())
    if weight.dtype is not torch.bfloat16 or not is_autocast_available(weight.device.type):
        return nullcontext()
    return torch.autocast(weight.device.type, torch.bfloat16)


def without_autocast(module: Callable[[Tensor], Result], x: Tensor) -> Result:
    """Return `module(x)`, computed in the data type of `x`.

    CUDA's autocast runs layer norms in float32 and keeps a float32 copy of their inputs for the backward pass. The
    CPU's autocast does neither. Norms without weights always compute in float32 internally.
    """
    kind = x.device.type
    # Dynamo of torch 2.11 cannot trace `is_autocast_available`, and compiled code calls this function.
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return module(x)
    with torch.autocast(kind, enabled=False):
        return module(x)


def allow_tensor_cores(device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, in this process. Do nothing on other devices."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@cache
def prepare_fake_tensors() -> None:
    """Make fake tensors safe in threads that end. Call it before a process uses any, or compiles with Dynamo.

    At the first fake tensors of a process, a CUDA build of torch without a GPU registers a stand-in for CUDA's device
    guard. In torch 2.11 the stand-in belongs to the calling thread but stays registered after the end of that thread.
    The next fake tensors then crash the process. Here the first thread to use them lives as long as the process.
    """
    if torch.__version__ >= "2.12" or torch.version.cuda is None or torch.cuda.is_available():
        return
    # Imported here: it takes a second, and most processes do not need it.
    from torch._subclasses.fake_tensor import FakeTensorMode

    registered = Event()

    def register_and_stay() -> None:
        with FakeTensorMode():
            registered.set()
        Event().wait()

    Thread(target=register_and_stay, name="fake-tensors", daemon=True).start()
    registered.wait()


def prepare_compilation(device: torch.device) -> None:
    """Make fake tensors safe (`prepare_fake_tensors`), and let Dynamo hold many graphs of one function.

    Beyond its own limit of 8, Dynamo runs a function uncompiled. A network's blocks share a function, and so do the
    batch sizes of several policies in one process. Raises ValueError for a GPU on a machine without a C compiler.
    """
    if device.type == "cuda" and not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        raise ValueError(
            "compilation for a GPU needs a C compiler, which Triton calls: install gcc (on Debian gcc and libc6-dev), set "
            "CC, or run uncompiled (agra train --parallel.compile False, agra serve without --compiled)"
        )
    prepare_fake_tensors()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
