"""What a training step of a recipe holds and computes, counted and not guessed.

The step runs forward and backward on fake tensors, which have shapes but no storage. Every storage that comes and goes is
noted, so memory is known at every moment of the step, and the FLOPs of every product are added up. Two runs with
different numbers of samples tell what grows with them and what does not.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from agra.alignment.teacher import teacher_shape
from agra.batch import Batch
from agra.config import RunConfig
from agra.training.lora import attach
from agra.training.objective import Objective
from agra.training.sharding import ParallelConfig, apply, blocks
from agra.training.stages import freeze, modules
from agra.wam.model import WAM
from agra.wam.patch_pca import PatchPCACodec

_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
    ),
}
"""FLOPs of an operation. torch knows the GPU's kernels of attention; on the CPU, where the fake step runs, it has another
name. (torch's own FlopCounterMode would keep the tensors of checkpointed blocks alive.)"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Footprint:
    """A training step of one process, in bytes and FLOPs."""

    checkpointed: float
    """Share of the blocks that run again in the backward pass."""
    parameters: dict[str, int]
    """Number of parameters of each part of the model."""
    trained: int
    """Number of parameters that this stage trains."""
    largest_block: int
    """Parameters of the block that is gathered whole while it runs."""
    root: int
    """Parameters outside the blocks, whole while a step runs."""
    gathered: int
    """Parameters that a process of FSDP2 receives for a micro-batch, its own share included: those of a block for each
    time that it runs and again before its backward pass, those outside the blocks once."""
    weight_bytes: int
    """Bytes of a gathered parameter: 4, or 2 where parameters are gathered in bfloat16."""
    flops_per_sample: float
    """Forward and backward; with checkpointing, what runs again included."""
    validation_flops_per_sample: float
    """Forward alone."""
    fixed: np.ndarray
    """(moments,) bytes beside parameters, gradients and AdamW's moments that do not depend on the number of samples."""
    per_sample: np.ndarray
    """(moments,) bytes for each sample in flight."""
    gradients: np.ndarray
    """(moments,) bytes of gradients; in the optimiser's moment, AdamW's buffers besides."""

    @property
    def states(self) -> int:
        """Bytes of parameters and AdamW's moments."""
        return 4 * (sum(self.parameters.values()) + 2 * self.trained)

    def peak(self, samples: int) -> int:
        """Bytes of a process alone, with `samples` in flight, at the fullest moment of a step or of validation."""
        return self.states + int((self.fixed + samples * self.per_sample + self.gradients).max())


def measure(config: RunConfig, *, checkpoint_activations: float = 0.0, gather_bfloat16: bool = False) -> Footprint:
    """Count a step of a recipe's stage and its validation, as a GPU runs them.

    `checkpoint_activations` is the share of the blocks that run again in the backward pass. The moments of the arrays are
    those of the step, of the optimiser, and of a validation forward without gradients.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), CudaAutocastRules():
        with _default_dtype(torch.bfloat16 if gather_bfloat16 else torch.float32):
            objective, width, least = fake_objective(config)
        apply(objective, ParallelConfig(checkpoint_activations=checkpoint_activations))
        parameters = {name: _count(part) for name, part in modules(objective).items()}
        # One sample of a pass would let torch leave out copies that more samples need.
        cache = not checkpoint_activations
        two, three = (_step(objective, config, width, n * least, cache=cache) for n in (2, 3))
        held_two, held_three = (_validation(objective, config, width, n * least, cache=cache) for n in (2, 3))
        assert len(two.levels) == len(three.levels), "the number of samples changes what a step does"
        slope = (three.levels - two.levels) / least
        held_slope = (held_three.levels - held_two.levels) / least
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        inside = {id(p) for block in blocks(objective) for p in block.parameters()}
        projection = config.model.video_dit.text_projection_dim is not None
        idle = _count(objective.wam.video_dit.transformer.crossattn_proj) if projection else 0
        root = sum(p.numel() for p in objective.parameters() if id(p) not in inside) - idle
        return Footprint(
            checkpointed=checkpoint_activations,
            parameters=parameters,
            trained=trained,
            largest_block=max(_count(block) for block in blocks(objective)),
            root=root,
            gathered=two.gathered + root,
            weight_bytes=2 if gather_bfloat16 else 4,
            flops_per_sample=two.flops / (2 * least),
            validation_flops_per_sample=held_two.flops / (2 * least),
            fixed=np.concatenate([two.levels - 2 * least * slope, [0.0], held_two.levels - 2 * least * held_slope]),
            per_sample=np.concatenate([slope, [0.0], held_slope]),
            gradients=np.concatenate([two.gradients, [4.0 * 2 * trained], np.zeros(len(held_slope))]),
        )


def flops_per_sample(config: RunConfig, width: int | None = None) -> float:
    """FLOPs of a step's forward and backward passes, the base of model FLOPs utilisation.

    `width` is that of the teacher's targets, where it is known; by default `teacher_width` finds it.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective, width, least = fake_objective(config, width)
        return _step(objective, config, width, least).flops / least


def encoding_flops_per_sample(config: RunConfig) -> dict[str, float]:
    """FLOPs of encoding one window, by feature: its latents, and the targets where the stage aligns."""
    model = config.model
    video = torch.zeros(1, 3, model.num_frames, *model.frame_size)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        if model.codec.kind == "wan":
            # Imported here: it takes seconds, and the patch PCA does not need it.
            from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

            encode = AutoencoderKLWan(z_dim=model.codec.channels).encode
        else:
            encode = PatchPCACodec(model.codec.channels).encode
        flops = {"latents": count_flops(lambda: encode(video))}
    if config.aligns:
        assert config.alignment is not None
        flops["targets"] = model.latent_shape[1] * teacher_shape(config.alignment.teacher).flops
    return flops


def count_flops(call: Callable[[], object]) -> float:
    """FLOPs of all products that a call computes."""
    with _Watch() as watch:
        call()
    return watch.flops


def teacher_width(config: RunConfig) -> int | None:
    """Width of the alignment's targets, from the teacher's own config; None without alignment."""
    if not config.aligns:
        return None
    assert config.alignment is not None
    teacher = config.alignment.teacher
    return teacher_shape(teacher).width * max(1, len(teacher.depths))


def fake_objective(config: RunConfig, width: int | None = None) -> tuple[Objective, int | None, int]:
    """The model of a stage, the width of its targets, and the fewest samples that divide into its two passes."""
    width = teacher_width(config) if width is None else width
    objective = Objective(WAM(config.model), config.stage.objective, config.alignment if config.aligns else None, width)
    attach(objective.wam, config.stage.lora)
    freeze(objective, config.stage)
    return objective, width, round(1 / config.stage.objective.video_share)


def fake_batch(config: RunConfig, width: int | None, count: int) -> Batch:
    """`count` samples of noise in the shapes that a recipe's stage reads."""
    model, head = config.model, config.model.action_dit
    ones = partial(torch.ones, dtype=torch.bool)
    return Batch(
        latents=torch.randn(count, *model.latent_shape),
        instruction=torch.randn(count, model.text.length, model.video_dit.text_dim),
        state=torch.randn(count, head.state_dim),
        actions=torch.randn(count, head.horizon, head.action_dim),
        action_mask=ones(count, head.horizon, head.action_dim),
        embodiment=torch.zeros(count, dtype=torch.long),
        targets=None if width is None else torch.randn(count, *model.token_grid, width),
    )


@dataclass(frozen=True, kw_only=True)
class _Counted:
    levels: np.ndarray
    """Bytes after every operation, gradients left out."""
    gradients: np.ndarray
    flops: float
    gathered: int
    """Parameters of the blocks, as often as they are run forward or backward."""


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _autocast(config: RunConfig, *, cache: bool) -> torch.autocast:
    half = config.stage.precision != "float32"  # on a GPU `auto` is bfloat16
    return torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=cache)


def _step(objective: Objective, config: RunConfig, width: int | None, count: int, *, cache: bool = True) -> _Counted:
    gathered = 0

    def gather(block: nn.Module, _: Any) -> None:
        nonlocal gathered
        gathered += _count(block) * (1 + any(p.requires_grad for p in block.parameters()))

    hooks = [block.register_forward_pre_hook(gather) for block in blocks(objective)]
    with _Watch() as watch:
        batch = fake_batch(config, width, count)
        with _autocast(config, cache=cache):
            loss = objective(batch).total
        loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = np.zeros(len(watch.levels))
    for parameter in objective.parameters():
        if parameter.grad is not None:
            born, size = watch.born[id(parameter.grad.untyped_storage())]
            gradients[born:] += size
    objective.zero_grad(set_to_none=True)
    return _Counted(
        levels=np.array(watch.levels) - gradients, gradients=gradients, flops=watch.flops, gathered=gathered
    )


@torch.no_grad()
def _validation(objective: Objective, config: RunConfig, width: int | None, count: int, *, cache: bool) -> _Counted:
    """A forward of held-out samples, as the trainer validates."""
    objective.eval()
    with _Watch() as watch, _autocast(config, cache=cache):
        objective(fake_batch(config, width, count))
    objective.train()
    levels = np.array(watch.levels, dtype=float)
    return _Counted(levels=levels, gradients=np.zeros(len(levels)), flops=watch.flops, gathered=0)


class CudaAutocastRules(TorchFunctionMode):
    """Applies the rule of CUDA's autocast that the CPU's lacks: layer norms run in float32.

    Steps are counted on CPU tensors, since a CPU build of torch has no backward pass for fake CUDA tensors. The other
    operations of our models have the same types under both (`tests/device/test_memory.py` compares them).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.layer_norm, torch.layer_norm) and torch.is_autocast_enabled("cpu"):
            args = tuple(_float32(value) for value in args)
            kwargs = {name: _float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Watch(TorchDispatchMode):
    """Notes the bytes that are alive after every operation, of storages that came since it began, and adds up FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.levels: list[int] = []
        self.born: dict[int, tuple[int, int]] = {}
        """Moment and bytes of every storage that is alive."""
        self._known: dict[int, weakref.ref] = {}
        self._level = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in _FLOPS:
            with self:  # nobody else takes `linear` and its like apart there
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        if (count := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), given)
        self.levels.append(self._level)
        return result

    def _note(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._known:  # a view, or written in place
            return
        size = storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.born[key] = len(self.levels), size
        self._level += size

    def _forget(self, key: int, size: int) -> None:
        del self._known[key], self.born[key]
        self._level -= size


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
