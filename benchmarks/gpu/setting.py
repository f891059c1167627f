"""Sizes and random weights: the paper's on a GPU, tiny ones in a dry run on a CPU."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from agra.config import RunConfig
from agra.methods.method import Method
from agra.methods.wam import WAMMethodConfig
from agra.precision import allow_tensor_cores
from agra.recipes import agra_dino_l8, at_stage
from agra.stages import Stage
from agra.training.distributed import DistributedContext
from agra.wam.bridge import bridged_layers
from agra.wam.codec import WanCodec

AnyModule = TypeVar("AnyModule", bound=nn.Module)
MODULES = ["benchmarks.gpu.resume", "benchmarks.gpu.fsdp", "benchmarks.gpu.plan"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every section knows."""

    device: torch.device
    scratch: Path
    """A folder for checkpoints and messages between processes."""

    @property
    def dry(self) -> bool:
        """Whether the sizes are tiny."""
        return self.device.type == "cpu"

    def config(self, stage: Stage = Stage.JOINT) -> RunConfig:
        """The paper's recipe, or a small one of the same structure."""
        config = agra_dino_l8()
        config = replace(config, stage=replace(config.stage, precision="bfloat16"))
        return at_stage(small(config) if self.dry else config, stage)

    def pick(self, paper: Any, dry: Any) -> Any:
        """A number for the GPU, or the one for a dry run."""
        return dry if self.dry else paper

    def codec(self) -> WanCodec:
        """Wan's VAE, without trained weights."""
        # Imported here: it takes seconds, and most sections do not need it.
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

        shape: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1} if self.dry else {"z_dim": 16}
        shape |= {f"latents_{name}": [value] * shape["z_dim"] for name, value in (("mean", 0.0), ("std", 1.0))}
        torch.manual_seed(0)
        with self.device:
            return WanCodec(AutoencoderKLWan(**shape).bfloat16())

    def method(self, config: RunConfig, *, seed: int = 0) -> Method:
        """The method of a config with random weights, made on the device."""
        with torch.device("meta"):
            method = config.method.build()
        return self.materialise(method, seed=seed)

    def materialise(self, module: AnyModule, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> AnyModule:
        """Give a module of the meta device random weights on the device: see `fill`."""
        module = module.to(dtype).to_empty(device=self.device)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                fill(name, parameter)
        return module

    def context(self) -> DistributedContext:
        """This process alone on its device."""
        return DistributedContext(device=self.device)

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], *, rounds: int, warm: int = 2) -> list[float]:
        """Times of `rounds` calls after `warm` ones that do not count, each waited for."""
        times = []
        for _ in range(self.pick(warm, 1) + self.pick(rounds, 1)):
            self.wait()
            start = perf_counter()
            call()
            self.wait()
            times.append(perf_counter() - start)
        return times[self.pick(warm, 1) :]

    def reset_peak(self) -> None:
        """Begin to measure peak memory anew, without what nobody holds."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        """Bytes allocated at the fullest moment since `reset_peak`. None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    @property
    def memory(self) -> float:
        """Bytes of the GPU; as many as a small GPU has in a dry run."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 2e9

    def processes(self) -> Any:
        """The way to start processes. In a dry run they fork from one that has imported everything already."""
        if not self.dry:
            return get_context("spawn")
        context = get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        return context

    @contextmanager
    def compiler(self) -> Iterator[None]:
        """torch.compile; in a dry run its capture alone, which takes seconds."""
        allow_tensor_cores(self.device)
        original = torch.compile

        def capture(function: Any, **options: Any) -> Any:
            options.pop("mode", None)
            return original(function, backend="eager", **options)

        with patch.object(torch, "compile", capture if self.dry else original):
            yield


def wam_of(config: RunConfig) -> WAMMethodConfig:
    """The config of a WAM's method."""
    assert isinstance(config.method, WAMMethodConfig)
    return config.method


@torch.no_grad()
def fill(name: str, parameter: Tensor) -> None:
    """Random initial values of a parameter: matrices that keep the size of their inputs, norms of 1, biases of 0."""
    if parameter.ndim > 1 and not name.endswith("bias"):
        parameter.normal_(std=parameter.shape[1] ** -0.5)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def small(config: RunConfig) -> RunConfig:
    """The paper's recipe with every size made tiny."""
    method = wam_of(config)
    model = method.model
    model = replace(
        model,
        frame_size=(32, 48),
        num_frames=5,
        codec=replace(model.codec, channels=4),
        text=replace(model.text, length=160),
        video_dit=replace(
            model.video_dit, latent_channels=4, num_layers=3, num_heads=2, head_dim=24, adaln_lora_dim=16, text_dim=20,
            text_projection_dim=96,
        ),
        bridge=replace(model.bridge, layers=bridged_layers(3, 2), num_layers=1, num_heads=2, head_dim=24),
        action_dit=replace(
            model.action_dit, state_dim=4, action_dim=3, horizon=8, num_embodiments=2, num_blocks=2, num_heads=2,
            head_dim=8, guidance_dim=48, hidden_dim=16,
        ),
    )  # fmt: skip
    assert method.alignment is not None
    alignment = replace(method.alignment, layers=(1,), hidden_dim=16)
    return replace(config, method=replace(method, model=model, alignment=alignment))


def shallow(config: RunConfig) -> RunConfig:
    """The same widths, tokens and losses with two blocks in each network, so that a checkpoint takes 5 GB."""
    method = wam_of(config)
    model = method.model
    model = replace(
        model,
        video_dit=replace(model.video_dit, num_layers=2, text_projection_dim=None),
        bridge=replace(model.bridge, layers=(0, 1), num_layers=1),
        action_dit=replace(model.action_dit, num_blocks=2, num_embodiments=1),
    )
    assert method.alignment is not None
    alignment = replace(method.alignment, layers=(1,))
    return replace(config, method=replace(method, model=model, alignment=alignment))


def num_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules."""
    return sum(p.nbytes for module in modules for p in module.parameters())
