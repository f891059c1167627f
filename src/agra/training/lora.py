"""Low-rank adapters on chosen linear layers, put on from outside and added into the weights when training is over.

LoRA (Hu et al. 2021, arXiv 2106.09685), not in the paper: y = W x + scale * U D x with W frozen, D (rank, inputs) random and
U (outputs, rank) zero to begin with. The layers keep their names and weights, so checkpoints hold the base model as ever
and `<layer>.lora_down`, `<layer>.lora_up` beside it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DOWN, _UP = "lora_down", "lora_up"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get adapters, and of which rank. A part of the model that holds any trains those alone."""

    rank: int | None = None
    """None leaves adapters out, as the paper does."""
    scale: float = 1.0
    """Of what the adapters add: alpha / rank elsewhere."""
    layers: tuple[str, ...] = tuple(f"video_dit.*.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    """Names of linear layers in the WAM, * for anything. Cosmos's text projection, whose results are cached, is none."""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"stage.lora.rank: expected at least 1, or None, got {self.rank}")
        if not self.scale > 0:
            raise ValueError(f"stage.lora.scale: expected a positive number, got {self.scale}")
        if not self.layers:
            raise ValueError("stage.lora.layers: expected at least one name")


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; `attach` makes one of an nn.Linear in place."""

    scale: float
    lora_down: nn.Parameter
    lora_up: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        """The layer's own result and the adapter's."""
        return super().forward(input) + self.scale * F.linear(F.linear(input, self.lora_down), self.lora_up)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in (_DOWN, _UP)


def attach(wam: nn.Module, config: LoRAConfig, seed: int = 0) -> None:
    """Put adapters on the layers that `config` names; `seed` decides their first values. Nothing where its rank is None.

    Raises ValueError where a name matches no linear layer, or the rank is no lower than a layer's own.
    """
    if config.rank is None:
        return
    linear = {name: m for name, m in wam.named_modules() if type(m) is nn.Linear and "crossattn_proj" not in name}
    for pattern in config.layers:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ValueError(f"stage.lora.layers: no linear layer is called {pattern!r}; there are {', '.join(linear)}")
    generator = torch.Generator().manual_seed(seed)
    for name, layer in linear.items():
        if not any(fnmatchcase(name, pattern) for pattern in config.layers):
            continue
        if config.rank >= min(layer.in_features, layer.out_features):
            raise ValueError(
                f"stage.lora.rank: {config.rank} is not low for {name}, which takes {layer.in_features} numbers to "
                f"{layer.out_features}; expected less than the smaller one"
            )
        bound = layer.in_features**-0.5
        down = torch.empty(config.rank, layer.in_features, device="cpu").uniform_(-bound, bound, generator=generator)
        layer.__class__ = AdaptedLinear
        layer.scale = config.scale  # type: ignore[assignment]
        layer.register_parameter(_DOWN, nn.Parameter(down.to(layer.weight)))
        layer.register_parameter(_UP, nn.Parameter(layer.weight.new_zeros(layer.out_features, config.rank)))


@torch.no_grad()
def merge(wam: nn.Module) -> None:
    """Add every adapter into its layer's weight and take it off."""
    for layer in wam.modules():
        if isinstance(layer, AdaptedLinear):
            layer.weight.add_(layer.lora_up @ layer.lora_down, alpha=layer.scale)
            del layer.lora_down, layer.lora_up, layer.scale
            layer.__class__ = nn.Linear  # type: ignore[assignment]


@contextmanager
def merged(wam: nn.Module, config: LoRAConfig) -> Iterator[None]:
    """Within it `wam` has the adapters of a checkpoint that is read; afterwards its weights hold what they add."""
    attach(wam, config)
    yield
    merge(wam)
