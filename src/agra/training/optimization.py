"""Trained parameters of a stage, and their groups for AdamW."""

from collections.abc import Iterator

from torch import Tensor, nn

from agra.lora import is_adapter
from agra.methods.method import Method
from agra.stages import StageConfig


def named_parameters(method: Method) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by its name in a checkpoint, `<part>.<name>`."""
    for part, module in method.parts().items():
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter


def freeze(method: Method, stage: StageConfig) -> None:
    """Leave gradients on only where this stage trains: of a part with adapters, in those alone.

    Raises ValueError where adapters are on a part that the stage does not train.
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
    """Names of the parameters that train."""
    return {parameter: name for name, parameter in named_parameters(method) if parameter.requires_grad}


def parameter_groups(method: Method, stage: StageConfig) -> Iterator[dict]:
    """AdamW's groups: each part with its own learning rate, and no weight decay on biases and vectors.

    A bank of biases (n, out), one row per embodiment, counts as biases.
    """
    for part, module in method.parts().items():
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        for decays in (True, False):
            chosen = [p for name, p in trained if (p.ndim > 1 and not name.endswith("bias")) == decays]
            if chosen:
                yield {
                    "params": chosen,
                    "lr": stage.rate_of(part),
                    "base_lr": stage.rate_of(part),
                    "weight_decay": stage.weight_decay if decays else 0.0,
                }
