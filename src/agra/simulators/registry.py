"""Simulators by name. A suite's libraries are imported when one is made, not before."""

import difflib
from collections.abc import Callable
from typing import Any

from agra.types import Policy, Simulator


def _tabletop(**options: Any) -> Simulator:
    from agra.simulators.tabletop.environment import Tabletop

    return Tabletop(hands="tabletop", **options)


def _tabletop_human(**options: Any) -> Simulator:
    from agra.simulators.tabletop.environment import Tabletop

    return Tabletop(hands="tabletop_human", **options)


_MAKERS: dict[str, Callable[..., Simulator]] = {"tabletop": _tabletop, "tabletop_human": _tabletop_human}


def names() -> tuple[str, ...]:
    """Every registered simulator."""
    return tuple(_MAKERS)


def make(name: str, **options: Any) -> Simulator:
    """The simulator `name`, made with its suite's own `options` (for the tabletop: frame_size).

    Raises ValueError for an unknown name, ImportError where the suite or OpenGL is not installed.
    """
    if name not in _MAKERS:
        close = difflib.get_close_matches(name, _MAKERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown simulator {name!r}; did you mean {close!r}? There are {', '.join(_MAKERS)}")
    return _MAKERS[name](**options)


def expert(simulator: Simulator) -> Policy:
    """The scripted expert of a simulator. Raises ValueError for one without."""
    from agra.simulators.tabletop.environment import Tabletop
    from agra.simulators.tabletop.expert import ScriptedExpert

    if not isinstance(simulator, Tabletop):
        raise ValueError(f"{simulator.embodiment.name}: this simulator has no scripted expert")
    return ScriptedExpert(simulator)
