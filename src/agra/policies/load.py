"""Loads policies from checkpoints."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from agra.alignment.teacher import load_teacher
from agra.checkpoints.folder import OPTIMIZER, keeps_optimizer, resolve, verify
from agra.checkpoints.read import check_statistics, load_averages, load_parts, read_config, reading
from agra.checkpoints.recorded_sizes import FILE as RECORDED_SIZES
from agra.checkpoints.recorded_sizes import read_recorded_sizes
from agra.config import RunConfig
from agra.data.normalization.normalize import NormStats
from agra.lora import merged
from agra.methods.method import Method
from agra.policies.instructions import FILE as INSTRUCTIONS
from agra.policies.instructions import Instructions, StoredInstructions
from agra.policies.policy import MethodPolicy
from agra.precision import local_device
from agra.stages import Stage
from agra.wam.codec import load_codec
from agra.wam.text import TextEncoder, load_text_encoder


def load_policy(
    path: str | Path,
    *,
    name: str | None = None,
    device: torch.device | str = "cpu",
    known_instructions: bool = False,
    **options: Any,
) -> MethodPolicy:
    """Load a policy from a checkpoint folder, from a run's folder (its newest checkpoint), or by a bundled policy's
    name.

    A method that acts on averaged weights (`MethodConfig.acts_on_average`) gets them where its run has them. The text
    encoder is loaded at the first instruction that the checkpoint does not know. With `known_instructions` it is never
    loaded, and other instructions are refused. `options` are those of `MethodPolicy`.

    Raises FileNotFoundError where there is no checkpoint. Raises ValueError for a damaged file, and for a checkpoint of
    the adapt stage, whose action head is untrained.
    """
    folder, target = resolve(path), local_device(device)
    with reading(folder):
        verify(folder, without=(OPTIMIZER,))
        config = read_config(folder)
        if averaged := acts_on_average(folder, config):
            verify(folder, only=(OPTIMIZER,))
        if config.stage.name is Stage.ADAPT:
            raise ValueError(f"{folder}: a checkpoint of the adapt stage cannot act; take one of joint or finetune")
        method = load_method(folder, config, averaged=averaged)
        codec_file, settings = folder / "codec.safetensors", config.method.codec
        codec = None if settings is None else load_codec(settings, codec_file if codec_file.is_file() else None)
        stats = NormStats.load_all(folder / "norm_stats.json")
        check_statistics(stats, config, folder)
        recorded_sizes = read_recorded_sizes(folder / RECORDED_SIZES, config.data)
        instructions = _instructions(folder, config, method, target, known_instructions=known_instructions)
    teacher = config.method.teacher if config.method.needs_to_act().features else None
    return MethodPolicy(
        name=name or Path(path).name,
        config=config,
        method=method,
        codec=None if codec is None else codec.to(target),
        instructions=instructions,
        stats=stats,
        recorded_sizes=recorded_sizes,
        teacher=None if teacher is None else load_teacher(teacher).to(target),
        device=device,
        **options,
    )


def acts_on_average(folder: Path, config: RunConfig) -> bool:
    """Check whether a checkpoint's policy acts on averaged weights that lie beside the trained ones."""
    averaged = config.stage.ema_decay is not None and keeps_optimizer(folder)
    return averaged and config.method.acts_on_average


def load_method(folder: Path, config: RunConfig, *, averaged: bool = False) -> Method:
    """Load a checkpoint's method on the CPU, without the parts that only training needs. Adapters are merged.

    With `averaged` the averages replace the trained weights. Raises ValueError where the checkpoint holds no averages.
    """
    with torch.device("meta"):
        method = config.method.to_act().build()
    assert not [*method.buffers()], "to_empty would leave a buffer undefined"
    method.to_empty(device="cpu")
    with merged(method.parts(), config.stage.lora, leave_out=method.always_frozen()):
        load_parts(method.parts(), folder)
        if averaged:
            load_averages(method.parts(), folder)
    return method


def _instructions(
    folder: Path, config: RunConfig, method: Method, device: torch.device, *, known_instructions: bool
) -> Instructions | None:
    """Combine the checkpoint's tokens and the text encoder. Returns None for a method without instructions."""
    text = config.method.text
    if text is None or not config.method.needs_to_act().instruction:
        return None
    file = folder / INSTRUCTIONS
    known = StoredInstructions(file) if file.is_file() else None
    if known_instructions and not known:
        raise ValueError(f"{file}: missing, so no instruction is known; leave out known_instructions")
    projection = deepcopy(method.text_projection())  # in float32, as for training's tokens

    def load_encoder() -> TextEncoder:
        return load_text_encoder(text, projection).to(device)

    return Instructions(None if known_instructions else load_encoder, known, projection=projection)
