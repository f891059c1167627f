"""Trained parameters of a stage, their groups for AdamW, and gradient clipping."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agra.lora import is_adapter
from agra.methods.method import Method
from agra.stages import StageConfig


def named_parameters(method: Method) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter with its name in a checkpoint, `<part>.<name>`."""
    for part, module in method.parts().items():
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter


def freeze(method: Method, stage: StageConfig) -> None:
    """Turn gradients off where this stage does not train. A part with adapters trains the adapters alone.

    Raises ValueError for adapters on a part that the stage keeps frozen.
    """
    for part, module in method.parts().items():
        module.requires_grad_(part not in stage.frozen)
    for module in method.always_frozen():
        module.requires_grad_(False)
    for part, module in method.parts().items():
        parameters = dict(module.named_parameters())
        if not any(map(is_adapter, parameters)):
            continue
        if part in stage.frozen:
            raise ValueError(f"stage.lora.layers: some are in {part}, which this stage keeps frozen")
        for name, parameter in parameters.items():
            parameter.requires_grad_(is_adapter(name))


def trained_names(method: Method) -> dict[Tensor, str]:
    """Return the trained parameters and their names."""
    return {parameter: name for name, parameter in named_parameters(method) if parameter.requires_grad}


def parameter_groups(method: Method, stage: StageConfig) -> Iterator[dict]:
    """Yield AdamW's groups. Each part has its own learning rate. Biases and vectors have no weight decay.

    A bank of biases (n, out), one row per embodiment, counts as biases.
    """
    for part, module in method.parts().items():
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for decays in (True, False):
            parameters = [p for name, p in trained if (p.ndim > 1 and not name.endswith("bias")) == decays]
            if parameters:
                yield {
                    "params": parameters,
                    "lr": stage.rate_of(part),
                    "base_lr": stage.rate_of(part),
                    "weight_decay": stage.weight_decay if decays else 0.0,
                }


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradients to a total norm of at most `max_norm`, over all processes. Returns the norm before.

    None, or a norm that is not finite, leaves the gradients as they are.
    """
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = _whole(total).item()
    if max_norm is not None and math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm


def total_norm(gradients: Sequence[Tensor]) -> float:
    """Return the norm of all gradients together, over all processes."""
    return _whole(torch.nn.utils.get_total_norm(gradients)).item()


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
