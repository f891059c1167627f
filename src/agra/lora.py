"""Low-rank adapters on selected linear layers, attached from outside and merged into the weights after training.

LoRA (Hu et al. 2021, arXiv 2106.09685), not in the paper: y = W x + scale * U D x, where W is frozen, D
(rank, inputs) is random and U (outputs, rank) is initially zero. The layers keep their names and weights. Checkpoints
therefore hold the base model unchanged, with `<layer>.lora_down` and `<layer>.lora_up` in addition.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DOWN, _UP = "lora_down", "lora_up"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Rank of the adapters and the layers that get them.

    A part of the method with adapters trains only the adapters.
    """

    rank: int | None = None
    """Rank of the adapters. None means no adapters, as in the paper."""
    scale: float = 1.0
    """Factor of the adapters' results, alpha / rank in other libraries."""
    layers: tuple[str, ...] = tuple(f"video_dit.*.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    """Name patterns of linear layers, `<part>.<name>`, where * matches anything. Layers that no stage trains never
    match."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"stage.lora.rank: expected at least 1 or None, got {self.rank}")
        if not self.scale > 0:
            raise ValueError(f"stage.lora.scale: expected a positive number, got {self.scale}")
        if not self.layers:
            raise ValueError("stage.lora.layers: expected at least one name pattern, got none")


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter.

    `attach` turns an nn.Linear into one in place, so that references to it stay valid.
    """

    scale: float
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """Add the adapter's result to that of the layer."""
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.lora_down), self.lora_up)


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in (_DOWN, _UP)


def attach(
    parts: Mapping[str, nn.Module], config: LoRAConfig, *, seed: int = 0, leave_out: Sequence[nn.Module] = ()
) -> None:
    """Attach adapters to the linear layers of a method's parts that `config` names. Without a rank do nothing.

    `seed` determines the initial values. Modules inside `leave_out` get no adapters. Raises ValueError if a pattern
    matches no linear layer, or if the rank is not lower than the smaller width of a layer.
    """
    if config.rank is None:
        return
    linear = _linear_layers(parts, leave_out)
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"stage.lora.layers: {pattern!r} matches no linear layer; there are {', '.join(linear)}")
    _adapt_matching(linear, config, seed)


def _linear_layers(parts: Mapping[str, nn.Module], leave_out: Sequence[nn.Module]) -> dict[str, nn.Linear]:
    excluded = {id(module) for root in leave_out for module in root.modules()}
    return {
        f"{part}.{name}": module
        for part, root in parts.items()
        for name, module in root.named_modules()
        if type(module) is nn.Linear and id(module) not in excluded
    }


def _adapt_matching(linear: Mapping[str, nn.Linear], config: LoRAConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, layer in linear.items():
        if any(fnmatchcase(name, pattern) for pattern in config.layers):
            _adapt(layer, name, config, generator)


def _adapt(layer: nn.Linear, name: str, config: LoRAConfig, generator: torch.Generator) -> None:
    assert config.rank is not None
    if config.rank >= min(layer.in_features, layer.out_features):
        raise ValueError(
            f"stage.lora.rank: expected less than {min(layer.in_features, layer.out_features)}, the smaller width of "
            f"{name}, got {config.rank}"
        )
    bound = layer.in_features**-0.5
    down = torch.empty(config.rank, layer.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
    layer.__class__ = AdaptedLinear
    layer.scale = config.scale  # type: ignore[assignment]
    layer.register_parameter(_DOWN, nn.Parameter(down.to(layer.weight)))
    layer.register_parameter(_UP, nn.Parameter(layer.weight.new_zeros(layer.out_features, config.rank)))


@torch.no_grad()
def merge(parts: Mapping[str, nn.Module]) -> None:
    """Add every adapter to its layer's weight and remove the adapter."""
    for layer in (module for root in parts.values() for module in root.modules()):
        if isinstance(layer, AdaptedLinear):
            layer.weight.add_(layer.lora_up @ layer.lora_down, alpha=layer.scale)
            del layer.lora_down, layer.lora_up, layer.scale
            layer.__class__ = nn.Linear  # type: ignore[assignment]


@contextmanager
def merged(
    parts: Mapping[str, nn.Module], config: LoRAConfig, *, leave_out: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Attach adapters for reading a checkpoint inside the block, and merge them into the weights at its end.

    Patterns may match nothing here, because a policy has fewer parts than its training.
    """
    if config.rank is not None:
        _adapt_matching(_linear_layers(parts, leave_out), config, seed=0)
    yield
    merge(parts)
