"""Rules of a GPU without a GPU: on torch's meta device, operations that mix devices raise as on a GPU."""

import sys

import numpy as np
import pytest
import torch
import torch.utils._foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agra import api
from agra.evaluation.collect import collect
from tests.support import small_cosmos
from tests.support.point_world import demonstrator


@pytest.fixture(scope="session")
def recorded(tmp_path_factory):
    """A folder with demonstrations of the point world and tiny public models."""
    folder = tmp_path_factory.mktemp("device")
    collect("point", folder / "demonstrations", episodes=8, seed=0, demonstrator=demonstrator, progress=False)
    small_cosmos.save_public_models(folder)
    return folder


@pytest.fixture
def make_config(recorded, tmp_path):
    """The paper's recipe at a tiny size over those demonstrations, with a cache of its own."""

    def make(**data):
        return _config(recorded, tmp_path / "cache", **data)

    return make


def _config(recorded, cache, **data):
    settings = {"path": str(recorded / "demonstrations"), "cache": str(cache), "embodiments": ("dot",), **data}
    return small_cosmos.paper_config(recorded, **settings)


@pytest.fixture(scope="session")
def prepared(recorded):
    """That recipe with its features cached, for tests that only read the cache."""
    config = _config(recorded, recorded / "cache")
    api.prepare(config)
    return config


@pytest.fixture
def meta(monkeypatch):
    """Lets whole commands run on the meta device, which stands for a GPU: "meta".

    Meta tensors hold no values: values copied to the CPU, read as numbers or written to a file are made up. An operation on
    tensors of both devices raises as it would on a GPU.
    """

    def made_up(tensor):
        if tensor.is_floating_point():
            return torch.rand(tensor.shape).to(tensor.dtype)
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    def on_cpu(name):
        original = getattr(torch.Tensor, name)

        def call(self, *arguments, **options):
            return original(made_up(self) if self.is_meta else self, *arguments, **options)

        return call

    original_to = torch.Tensor.to

    def to(self, *arguments, **options):
        target = options.get("device", next((a for a in arguments if isinstance(a, str | torch.device)), None))
        leaves = self.is_meta and target is not None and torch.device(target).type == "cpu"
        return original_to(made_up(self) if leaves else self, *arguments, **options)

    for name in ("cpu", "item", "tolist", "numpy", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, on_cpu(name))
    monkeypatch.setattr(torch.Tensor, "to", to)
    supported = torch.utils._foreach_utils._get_fused_kernels_supported_devices
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"])
    with OneDevice():
        yield "meta"


class OneDevice(TorchDispatchMode):
    """Raises where an operation mixes devices, which meta kernels let pass.

    As on a GPU, copies between devices, numbers without axes and indices on the CPU are allowed.
    """

    ALLOWED = ("aten.copy_", "aten._to_copy", "aten.index.", "aten.index_put")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        if len({tensor.device.type for tensor in tensors}) > 1 and not str(func).startswith(self.ALLOWED):
            raise RuntimeError(f"{func}: tensors on device {' and '.join({str(t.device) for t in tensors})}")
        return func(*args, **kwargs)


@pytest.fixture
def observation():
    """A frame, state and instruction of the point world."""
    from agra.types import Observation

    frame = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return Observation(frame=frame, state=np.full(2, 0.5, np.float32), instruction="go 0", embodiment="dot")
