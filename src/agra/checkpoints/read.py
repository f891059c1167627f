"""Reads checkpoints, of one process or several, in the present layout or an earlier one."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from agra.checkpoints.folder import ADAPTERS, OPTIMIZER, REMEDY, read_object
from agra.checkpoints.migration import current_config, current_name
from agra.config import RunConfig
from agra.data.normalization.normalize import QUANTITIES, NormStats
from agra.weights import check_fit, read_into, stored_tensors

_NOT_PARTS = (ADAPTERS, OPTIMIZER, "codec.safetensors", "instructions.safetensors")


def read_config(checkpoint: Path) -> RunConfig:
    """Read the RunConfig of a checkpoint.

    Raises ValueError where it is missing or invalid, and where it describes a larger model than the weights beside it,
    before anything of that size is built.
    """
    path = checkpoint / "config.json"
    content = read_object(path)
    for section in ("method", "model"):
        _check_scale(section, content.get(section), checkpoint)
    return config_of(content, path)


def config_of(values: Mapping[str, Any], path: Path) -> RunConfig:
    """Make a RunConfig from the JSON values of `path`, in the present layout or an earlier one.

    Raises ValueError naming `path`.
    """
    try:
        current = current_config(values)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the config of a run ({type(error).__name__}: {error}); {REMEDY}") from error
    return RunConfig.from_values(current, path)


def load_parts(parts: Mapping[str, nn.Module], checkpoint: Path) -> None:
    """Load a checkpoint's weights into whole modules by part. Other parts of the checkpoint are not read.

    Layers with adapters in the checkpoint must have adapters attached. Raises ValueError where names or shapes do not
    fit.
    """
    targets = part_tensors(parts)
    if (checkpoint / "sharded").is_dir():
        read_shards(targets, checkpoint / "sharded")
    else:
        prefixes = tuple(f"{part}." for part in parts)
        read_into(targets, _part_files(checkpoint), what=str(checkpoint), name_of=_current_under(prefixes))


def load_averages(parts: Mapping[str, nn.Module], checkpoint: Path) -> None:
    """Replace the trained weights of a loaded checkpoint by their exponential averages (`stage.ema_decay`).

    Raises ValueError where the checkpoint holds no averages.
    """
    weights, prefix = part_tensors(parts), "ema/"
    targets = {f"{prefix}{name}": value for name, value in weights.items()}
    if (checkpoint / "sharded").is_dir():
        averaged = {name: targets[name] for name in stored_names(checkpoint / "sharded") if name in targets}
        read_shards(averaged, checkpoint / "sharded")
    else:
        path = checkpoint / OPTIMIZER
        with stored_tensors([path] if path.is_file() else [], str(path)) as stored, torch.no_grad():
            averaged = {name: value for key, value in stored.items() if (name := current_name(key)) in targets}
            for name, value in averaged.items():
                targets[name].copy_(value[...])
    if not averaged:
        raise ValueError(f"{checkpoint}: holds no averaged weights; train with --stage.ema-decay")


def part_tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return the tensors of a method's parts by their names in a checkpoint."""
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def stored_parts(checkpoint: Path) -> set[str]:
    """List the parts whose weights a checkpoint holds."""
    return {current_name(name).split(".")[0] for name in _stored_sizes(checkpoint) if "/" not in name}


def read_shards(targets: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Copy tensors of a folder's safetensors, whole or sharded, into whole tensors or shards of any other layout.

    Each process reads the values of its own shards alone. All processes of `group` must call this together.
    """
    try:
        reader = HuggingFaceStorageReader(str(folder))
        sizes = _sizes(reader)
        stored = {current_name(name): name for name in sizes}
        check_fit({name: sizes[stored[name]] for name in targets if name in stored}, targets, str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
            renamed = {stored[name]: value for name, value in targets.items()}
            load(renamed, storage_reader=reader, process_group=group, no_dist=group is None)
    except SafetensorError as error:
        raise ValueError(f"{folder}: not readable safetensors ({error})") from error


def stored_names(folder: Path) -> list[str]:
    """List the tensors of a folder's safetensors, whole or sharded, by their present names."""
    return [current_name(name) for name in _sizes(HuggingFaceStorageReader(str(folder)))]


def check_statistics(stats: Mapping[str, NormStats], config: RunConfig, checkpoint: Path) -> None:
    """Raise ValueError for statistics of an embodiment or a width that the checkpoint does not have."""
    shapes = config.method.shapes
    widths = {"state": shapes.state_dim, "action": shapes.action_dim}
    for name, statistics in stats.items():
        wide = [quantity for quantity in QUANTITIES if statistics.width(quantity) > widths[quantity]]
        if name not in config.data.embodiments or wide:
            reason = (
                f"its {wide[0]} is wider than the method's {widths[wide[0]]}"
                if wide
                else "the checkpoint does not know it"
            )
            raise ValueError(f"{checkpoint / 'norm_stats.json'}: embodiment {name!r}: {reason}; {REMEDY}")


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn errors of Python and torch about invalid content into one ValueError that names the checkpoint."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{checkpoint}: cannot be loaded ({type(error).__name__}: {reason}); it is damaged, or was written by "
            f"another version of agra: {REMEDY}"
        ) from error


def _part_files(checkpoint: Path) -> list[Path]:
    """List the safetensors files of the parts and of their adapters."""
    stored = [path for path in sorted(checkpoint.glob("*.safetensors")) if path.name not in _NOT_PARTS]
    return [*stored, *([checkpoint / ADAPTERS] if (checkpoint / ADAPTERS).is_file() else [])]


def _current_under(prefixes: tuple[str, ...]) -> Callable[[str], str | None]:
    def name_of(stored: str) -> str | None:
        name = current_name(stored)
        return name if name.startswith(prefixes) else None

    return name_of


def _check_scale(section: str, settings: Any, checkpoint: Path) -> None:
    """Check that a method's settings have no more layers than the weights, and no size above the number of weights."""
    sizes = _stored_sizes(checkpoint)
    if not sizes:
        return
    weights = sum(math.prod(size) for size in sizes.values())
    layers = 1 + max((int(part) for name in sizes for part in name.split(".") if part.isdecimal()), default=0)
    for name, value in _numbers(section, settings):
        largest = layers if name.endswith((".num_layers", ".num_blocks")) else weights
        if not 0 <= value <= largest:
            raise ValueError(
                f"{checkpoint / 'config.json'}: {name} is {value}, the weights beside it allow 0 to {largest}; {REMEDY}"
            )


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{name}.{key}", item)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(name, item)
    elif type(value) is int:
        yield name, value


def _stored_sizes(checkpoint: Path) -> dict[str, Sequence[int]]:
    """Read the shapes of a checkpoint's weights by stored name, from the headers alone."""
    sizes: dict[str, Sequence[int]] = {}
    try:
        if (checkpoint / "sharded").is_dir():
            return _sizes(HuggingFaceStorageReader(str(checkpoint / "sharded")))
        for path in _part_files(checkpoint):
            with safe_open(path, framework="pt") as stored:
                sizes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118, no mapping
    except SafetensorError as error:
        raise ValueError(f"{checkpoint}: not readable safetensors ({error}); {REMEDY}") from error
    return sizes


def _sizes(reader: HuggingFaceStorageReader) -> dict[str, Sequence[int]]:
    metadata: Any = reader.read_metadata()
    return {name: value.size for name, value in metadata.state_dict_metadata.items()}
