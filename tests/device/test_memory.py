"""Planned memory against real steps under the rules of CUDA's autocast, and these rules against torch's own."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.profiler import ProfilerActivity, profile

from agra.recipes import agra_dino_l8, tiny
from agra.training.memory_estimate import CudaAutocastRules, fake_batch, fake_method, measure
from agra.training.optimization import parameter_groups
from agra.training.parallelize import ParallelConfig, apply
from agra.training.plan import CHECKPOINTED, Machines, lay_out

CALLS = {
    "torch.Tensor.add": lambda x: x + x,
    "torch.Tensor.sub": lambda x: x - x,
    "torch.Tensor.mul": lambda x: x * x,
    "torch.Tensor.div": lambda x: x / x,
    "torch.Tensor.neg": lambda x: -x,
    "torch.Tensor.pow": lambda x: x.pow(2),
    "torch.Tensor.square": lambda x: x.square(),
    "torch.Tensor.mean": lambda x: x.mean(-1, keepdim=True),
    "torch.Tensor.sum": lambda x: x.sum(-1),
    "torch.Tensor.norm": lambda x: x.norm(dim=-1),
    "torch.Tensor.clamp": lambda x: x.clamp(0, 1),
    "torch.Tensor.floor": lambda x: x.floor(),
    "torch.Tensor.cos": lambda x: x.cos(),
    "torch.Tensor.sin": lambda x: x.sin(),
    "torch.Tensor.__rsub__": lambda x: 1 - x,
    "torch.Tensor.__rpow__": lambda x: 2**x,
    "torch.Tensor.__rtruediv__": lambda x: 1 / x,
    "torch.cos": torch.cos,
    "torch.sin": torch.sin,
    "torch.exp": torch.exp,
    "torch.rsqrt": torch.rsqrt,
    "torch.sigmoid": torch.sigmoid,
    "torch.outer": lambda x: torch.outer(x.flatten(), x.flatten()),
    "torch.addcmul": lambda x: torch.addcmul(x, x, x),
    "torch.baddbmm": lambda x: torch.baddbmm(x @ x.mT, x, x.mT),
    "torch.nn.functional.linear": lambda x: F.linear(x, x.flatten(0, 1)),
    "torch.nn.functional.layer_norm": lambda x: F.layer_norm(x, (8,)),
    "torch.nn.functional.scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "torch.nn.functional.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "torch.nn.functional.silu": F.silu,
    "torch.nn.functional.relu": F.relu,
    "torch.nn.functional.dropout": lambda x: F.dropout(x, 0.5, training=True),
}
"""Every operation of a training step that may change a number's type, on a tensor (2, 4, 8)."""
MOVES = {
    "__getitem__", "__len__", "__setitem__", "chunk", "detach", "device.__get__", "dim", "dtype.__get__", "expand", "expand_as",
    "flatten", "float", "index_select", "ndim.__get__", "new_ones", "new_zeros", "permute", "repeat",
    "repeat_interleave", "reshape", "select", "shape.__get__", "to", "transpose", "type_as", "unflatten", "unsqueeze",
    "view", "view_as",
}  # fmt: skip
"""Methods of tensors that move numbers, or convert them to a type that they name."""


class Called(TorchFunctionMode):
    """The names of the operations on floating-point tensors."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args):
            self.names.add(resolve_name(func) or "")
        return func(*args, **(kwargs or {}))


def test_the_rules_are_those_of_cuda_s_autocast(small_config):
    """Every operation of a step returns the type of the same operation on a fake CUDA tensor under CUDA's autocast."""
    config = small_config.method
    method = fake_method(small_config)
    with Called() as called, torch.autocast("cpu", torch.bfloat16):
        method(fake_batch(config, 2 * config.batch_multiple))
    moves = {f"torch.Tensor.{name}" for name in MOVES} | {"torch.zeros_like", ""}
    assert called.names - moves <= CALLS.keys(), "new operations: say what they do"
    changed = {}
    for name, call in CALLS.items():
        for dtype in (torch.bfloat16, torch.float32):
            with CudaAutocastRules(), torch.autocast("cpu", torch.bfloat16):
                ours = call(torch.rand(2, 4, 8, dtype=dtype)).dtype
            with FakeTensorMode(), torch.no_grad(), fake_cuda_autocast():
                theirs = call(torch.rand(2, 4, 8, dtype=dtype, device="cuda")).dtype
            if ours is not theirs:
                changed[name, dtype] = (ours, theirs)
    # CUDA computes these in float32; our models call them on float32 numbers alone, or bring the result back at once.
    assert {name for name, _ in changed} <= FLOAT32_ONLY
    with CudaAutocastRules(), torch.autocast("cpu", torch.bfloat16), Halves(FLOAT32_ONLY) as halves:
        method(fake_batch(config, 2 * config.batch_multiple))
    assert not halves.seen


FLOAT32_ONLY = {
    "torch.Tensor.pow", "torch.Tensor.square", "torch.Tensor.sum", "torch.Tensor.norm", "torch.Tensor.__rpow__",
    "torch.Tensor.__rtruediv__", "torch.exp", "torch.rsqrt",
}  # fmt: skip


class Halves(TorchFunctionMode):
    """Calls of the named operations on bfloat16 tensors."""

    def __init__(self, names):
        super().__init__()
        self.names, self.seen = names, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = resolve_name(func)
        if name in self.names and any(isinstance(a, torch.Tensor) and a.dtype is torch.bfloat16 for a in args):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda_autocast():
    """torch.autocast("cuda", bfloat16) where torch would turn it off for want of a GPU."""
    torch.autocast_increment_nesting()
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


@pytest.mark.slow
@pytest.mark.parametrize("fraction", CHECKPOINTED)
def test_planned_memory_is_that_of_a_real_step(fraction):
    """torch's own count of allocations in a step and a validation of tiny in bfloat16, within 5 %."""
    config = replace(tiny(), stage=replace(tiny().stage, precision="bfloat16"))
    step_cost = measure(config, activation_checkpointing=fraction)
    method = fake_method(config)
    apply(method, ParallelConfig(activation_checkpointing=fraction))
    optimizer = torch.optim.AdamW(list(parameter_groups(method, config.stage)))
    batch = fake_batch(config.method, 16)

    def step():
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=not fraction):
            loss = method(batch).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=not fraction):
            method.eval()(batch)
        method.train()

    with CudaAutocastRules():
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = step_cost.states + sum(value.nbytes for value in batch.tensors.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    assert peak == pytest.approx(step_cost.peak(16), rel=0.05)


@pytest.mark.slow
def test_the_paper_s_layout_for_eight_gpus_of_80_gb_fits_with_its_validation():
    config = agra_dino_l8()
    machines = Machines(gpus=8, gpu_memory=80.0)
    step_cost = measure(config, activation_checkpointing=1.0)
    (layout,) = lay_out(config, machines, [step_cost]).layouts
    assert layout.gradient_accumulation_steps
    in_flight = config.stage.batch_size // machines.gpus // layout.gradient_accumulation_steps
    assert in_flight <= layout.samples
    gradients = step_cost.gradients / machines.gpus
    if layout.gradient_accumulation_steps > 1 and not layout.reduce_every_micro_batch:
        gradients = gradients.clip(min=4 * step_cost.trained)
    gathered = step_cost.weight_bytes * (2 * step_cost.root + 3 * step_cost.largest_block)
    whole = step_cost.states / machines.gpus + step_cost.fixed + in_flight * step_cost.per_sample + gradients + gathered
    assert whole.max() < 0.92 * 80e9
    # AdamW's buffers make the optimiser's moment that of the most gradients. The validation's moments follow.
    validation = step_cost.per_sample[step_cost.gradients.argmax() + 1 :]
    assert (validation > 0).any()
    assert 0 < (in_flight * validation).max() < whole.max()
