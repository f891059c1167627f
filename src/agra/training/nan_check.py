"""The origin of the first number that is not finite: the sample, or the module."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from agra.batch import Batch


def first_module(root: nn.Module, forward: Callable[[], object]) -> str | None:
    """Run `forward` and return the name of the first module of `root` whose output is not finite, or None."""
    names: list[str] = []

    def check(name: str, output: object) -> None:
        if not names and not finite(output):
            names.append(name)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: check(name, output))
        for name, module in root.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return (names[0] or "the losses") if names else None


def suspects(batch: Batch, samples: Sequence[str]) -> str:
    """Name the samples with inputs that are not finite, and their field.

    Names all samples where all inputs are finite.
    """
    for field, value in batch.tensors.items():
        if value.is_floating_point() and not finite(value):
            rows = [i for i, row in enumerate(value) if not finite(row)]
            return f"{field} of {', '.join(_names(samples, rows))}"
    return f"one of {', '.join(_names(samples, range(len(batch))))}"


def finite(value: object) -> bool:
    """Check that every number of every tensor inside `value` is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(value))


def _names(samples: Sequence[str], rows: Sequence[int]) -> list[str]:
    return [samples[row] if samples else f"row {row}" for row in rows]


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for child in value.values() for tensor in _tensors(child))
    elif isinstance(value, list | tuple):
        yield from (tensor for child in value for tensor in _tensors(child))
    elif is_dataclass(value):
        yield from (tensor for field in fields(value) for tensor in _tensors(getattr(value, field.name)))
