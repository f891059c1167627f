"""Memory and FLOPs of a training step, counted on fake tensors.

The step runs forward and backward on tensors that have shapes but no storage. Every allocation is recorded, which gives
the memory at every moment of the step, and the FLOPs of every product are added up. Two runs with different numbers of
samples separate the memory of a sample from the rest.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from agra.lora import attach
from agra.methods.method import Method, MethodConfig
from agra.precision import prepare_fake_tensors
from agra.training.optimization import freeze
from agra.training.parallelize import ParallelConfig, apply
from agra.wam.codec import CodecConfig, SDXLCodec, WanCodec, latent_shape
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
"""FLOPs by operation: torch's table, and the names of attention on the CPU, where the fake step runs. torch's own
FlopCounterMode would keep the tensors of checkpointed blocks alive."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepCost:
    """A training step of one process, in bytes and FLOPs."""

    checkpointed: float
    """Fraction of the blocks that run again in the backward pass."""
    parameters: dict[str, int]
    """Number of parameters of each part of the method."""
    trained: int
    """Number of parameters that this stage trains."""
    averages: bool
    """True where the optimiser's state holds an average of every trained parameter too (`stage.ema_decay`)."""
    largest_block: int
    """Parameters of the largest block. It is gathered whole while it runs."""
    root: int
    """Parameters outside the blocks. They are whole while a step runs."""
    gathered: int
    """Parameters that a process of FSDP2 receives for a micro-batch, its own shard included. Those of a block count for
    each run and again for its backward pass, those outside the blocks count once."""
    weight_bytes: int
    """Bytes of a gathered parameter: 4, or 2 where parameters are gathered in bfloat16."""
    flops_per_sample: float
    """FLOPs of forward and backward, with the recomputation of checkpointed blocks."""
    validation_flops_per_sample: float
    """FLOPs of the forward pass."""
    fixed: np.ndarray
    """(moments,) bytes that do not depend on the number of samples, without parameters, gradients and AdamW's state."""
    per_sample: np.ndarray
    """(moments,) bytes for each sample in flight."""
    gradients: np.ndarray
    """(moments,) bytes of gradients. The moment of the optimiser's step includes AdamW's buffers."""

    @property
    def states(self) -> int:
        """Bytes of parameters and of the optimiser's state: AdamW's two moments, and the averages."""
        return 4 * (sum(self.parameters.values()) + (2 + self.averages) * self.trained)

    def peak(self, samples: int) -> int:
        """Return the bytes of a single process with `samples` in flight, at the fullest moment of a step or a
        validation.
        """
        return self.states + int((self.fixed + samples * self.per_sample + self.gradients).max())


def measure(config: RunConfig, *, activation_checkpointing: float = 0.0, gather_bfloat16: bool = False) -> StepCost:
    """Count a step and a validation of a config's stage, as a GPU runs them.

    `activation_checkpointing` is the fraction of the blocks that run again in the backward pass. The moments of the
    arrays are those of the step, of the optimiser, and of a validation's forward pass.
    """
    with _fake_tensors(), CudaAutocastRules():
        with _default_dtype(torch.bfloat16 if gather_bfloat16 else torch.float32):
            method = fake_method(config)
        apply(method, ParallelConfig(activation_checkpointing=activation_checkpointing))
        # Not with one sample in a pass: torch then leaves out copies that more samples need.
        multiple, cache = config.method.batch_multiple, not activation_checkpointing
        two, three = (_step(method, config, n * multiple, cache=cache) for n in (2, 3))
        validation_two, validation_three = (_validation(method, config, n * multiple, cache=cache) for n in (2, 3))
        assert len(two.levels) == len(three.levels), "the number of samples changes the operations of a step"
        slope = (three.levels - two.levels) / multiple
        validation_slope = (validation_three.levels - validation_two.levels) / multiple
        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
        in_groups = {id(p) for module in (*method.blocks(), *method.always_frozen()) for p in module.parameters()}
        root = sum(p.numel() for p in method.parameters() if id(p) not in in_groups)
        return StepCost(
            checkpointed=activation_checkpointing,
            parameters={name: _count(part) for name, part in method.parts().items()},
            trained=trained,
            averages=config.stage.ema_decay is not None,
            largest_block=max((_count(block) for block in method.blocks()), default=0),
            root=root,
            gathered=two.gathered + root,
            weight_bytes=2 if gather_bfloat16 else 4,
            flops_per_sample=two.flops / (2 * multiple),
            validation_flops_per_sample=validation_two.flops / (2 * multiple),
            fixed=np.concatenate(
                [
                    two.levels - 2 * multiple * slope,
                    [0.0],
                    validation_two.levels - 2 * multiple * validation_slope,
                ]
            ),
            per_sample=np.concatenate([slope, [0.0], validation_slope]),
            gradients=np.concatenate([two.gradients, [4.0 * 2 * trained], np.zeros(len(validation_slope))]),
        )


def flops_per_sample(config: RunConfig) -> float:
    """Count the FLOPs of a step's forward and backward passes, the base of model FLOPs utilisation."""
    multiple = config.method.batch_multiple
    with _fake_tensors():
        return _step(fake_method(config), config, multiple).flops / multiple


def encoding_flops_per_sample(config: MethodConfig) -> dict[str, float]:
    """Count the FLOPs of encoding one window, by the frozen feature that a method needs."""
    needs, codec, teacher = config.needs(), config.codec, config.teacher
    flops: dict[str, float] = {}
    if codec is not None and needs.clip:
        flops["latents"] = _codec_flops(codec, config, needs.clip)
    if codec is not None and needs.frame_latents:
        flops["frame_latents"] = len(needs.frame_latents) * _codec_flops(codec, config, 1)
    for name, frames in (("features", needs.features), ("targets", needs.targets)):
        if teacher is not None and frames:
            flops[name] = len(frames) * teacher_shape(teacher).flops
    return flops


def cached_name(feature: str) -> str:
    """Return the name under which `data.cached` lists a feature of `encoding_flops_per_sample`.

    The teacher's features are one entry, as an input and as a target.
    """
    return "targets" if feature == "features" else feature


def _codec_flops(codec: CodecConfig, config: MethodConfig, num_frames: int) -> float:
    video = torch.zeros(1, 3, num_frames, *config.shapes.frame_size)
    with _fake_tensors(), torch.no_grad():
        if codec.kind == "wan":
            encode = WanCodec.untrained(codec.channels).vae.encode
        elif codec.kind == "sdxl":
            encode = SDXLCodec.untrained().encode
        else:
            encode = PatchPCACodec(codec.channels).encode
        return count_flops(lambda: encode(video))


def count_flops(call: Callable[[], object]) -> float:
    """Count the FLOPs of all products that a call computes."""
    with _Watch() as watch:
        call()
    return watch.flops


def feature_width(config: MethodConfig) -> int:
    """Return the width of the teacher's features, all depths together.

    Raises FileNotFoundError for an unknown teacher.
    """
    assert config.teacher is not None
    return teacher_shape(config.teacher).width * max(1, len(config.teacher.depths))


def fake_method(config: RunConfig) -> Method:
    """Make the method of a stage, with its adapters and frozen parts."""
    method = config.method.build()
    attach(method.parts(), config.stage.lora, leave_out=method.always_frozen())
    freeze(method, config.stage)
    return method


def fake_batch(config: MethodConfig, count: int) -> Batch:
    """Make `count` samples of noise in the shapes that a method reads."""
    shapes, needs = config.shapes, config.needs()
    fields: dict[str, Tensor] = {}
    if config.codec is not None and needs.clip:
        fields["latents"] = torch.randn(count, *latent_shape(config.codec, shapes.frame_size, needs.clip))
    if config.codec is not None and needs.frame_latents:
        channels, _, *grid = latent_shape(config.codec, shapes.frame_size, 1)
        fields["frame_latents"] = torch.randn(count, len(needs.frame_latents), channels, *grid)
    if needs.frames:
        fields["frames"] = torch.randint(0, 256, (count, len(needs.frames), *shapes.frame_size, 3), dtype=torch.uint8)
    if needs.states:
        fields["states"] = torch.randn(count, len(needs.states), shapes.state_dim)
    for name, frames in (("features", needs.features), ("targets", needs.targets)):
        if frames:
            fields[name] = torch.randn(count, len(frames), *shapes.feature_grid, feature_width(config))
    if needs.instruction:
        fields["instruction"] = torch.randn(count, *shapes.instruction)
    if masked := needs.frame_latents or needs.features:
        fields["frame_mask"] = torch.ones(count, len(masked), dtype=torch.bool)
    return Batch(
        state=torch.randn(count, shapes.state_dim),
        actions=torch.randn(count, shapes.horizon, shapes.action_dim),
        action_mask=torch.ones(count, shapes.horizon, shapes.action_dim, dtype=torch.bool),
        embodiment=torch.zeros(count, dtype=torch.long),
        **fields,
    )


@dataclass(frozen=True, kw_only=True)
class _Counted:
    levels: np.ndarray
    """Bytes after every operation, without gradients."""
    gradients: np.ndarray
    flops: float
    gathered: int
    """Parameters of the blocks, counted for each forward and backward run."""


def _fake_tensors() -> FakeTensorMode:
    prepare_fake_tensors()
    return FakeTensorMode(allow_non_fake_inputs=True)


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


def _step(method: Method, config: RunConfig, count: int, *, cache: bool = True) -> _Counted:
    gathered = 0

    def gather(block: nn.Module, _: Any) -> None:
        nonlocal gathered
        gathered += _count(block) * (1 + any(p.requires_grad for p in block.parameters()))

    hooks = [block.register_forward_pre_hook(gather) for block in method.blocks()]
    with _Watch() as watch:
        batch = fake_batch(config.method, count)
        with _autocast(config, cache=cache):
            loss = method(batch).total
        loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = np.zeros(len(watch.levels))
    for parameter in method.parameters():
        if parameter.grad is not None:
            born, size = watch.born[id(parameter.grad.untyped_storage())]
            gradients[born:] += size
    method.zero_grad(set_to_none=True)
    return _Counted(
        levels=np.array(watch.levels) - gradients, gradients=gradients, flops=watch.flops, gathered=gathered
    )


@torch.no_grad()
def _validation(method: Method, config: RunConfig, count: int, *, cache: bool) -> _Counted:
    """Run a forward pass of held-out samples, as the trainer validates."""
    method.eval()
    with _Watch() as watch, _autocast(config, cache=cache):
        method(fake_batch(config.method, count))
    method.train()
    levels = np.array(watch.levels, dtype=float)
    return _Counted(levels=levels, gradients=np.zeros(len(levels)), flops=watch.flops, gathered=0)


class CudaAutocastRules(TorchFunctionMode):
    """CUDA's autocast rules on the CPU: layer norms run in float32.

    Steps are counted on CPU tensors, since a CPU build of torch has no backward pass for fake CUDA tensors. The other
    operations of our models have the same types under both rules (`tests/device/test_memory.py` compares them).
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
    """Records the live bytes of new storages after every operation, and adds up FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0
        self.levels: list[int] = []
        self.born: dict[int, tuple[int, int]] = {}
        """Moment of birth and bytes of every live storage."""
        self._alive: dict[int, weakref.ref] = {}
        self._level = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._overloadpacket not in _FLOPS:
            with self:  # inference mode does not decompose composite operations such as `linear`
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        if (count := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), inputs)
        self.levels.append(self._level)
        return result

    def _note(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = id(storage)
        if key in inputs or key in self._alive:  # a view, or written in place
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.born[key] = len(self.levels), size
        self._level += size

    def _forget(self, key: int, size: int) -> None:
        del self._alive[key], self.born[key]
        self._level -= size


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
