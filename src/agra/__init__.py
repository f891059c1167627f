"""World Action Models: training, evaluation, diagnosis and serving.

The names of `__all__` are the public interface. They are imported at their first use, so that `import agra` is quick
and works without torch.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "RunConfig": "agra.config",
    "read_config": "agra.checkpoints.read",
    "prepare": "agra.api",
    "train": "agra.api",
    "load_policy": "agra.policies.load",
    "evaluate": "agra.simulation",
    "diagnose": "agra.api",
    "report": "agra.api",
    "export": "agra.policies.export",
    "make_simulator": "agra.simulation",
    "make_demo": "agra.api",
    "PolicyClient": "agra.serving.client",
    "Observation": "agra.types",
    "ActionChunk": "agra.types",
    "Policy": "agra.types",
    "Simulator": "agra.types",
}
"""Public names and their modules."""

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'agra' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
