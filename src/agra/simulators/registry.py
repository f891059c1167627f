"""Simulators by name. A suite's libraries are imported when one is made, not before."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agra.simulators.libero.suites import MAX_STEPS
from agra.types import Policy, Simulator, Trial


@dataclass(frozen=True, kw_only=True)
class Suite:
    """How a simulator is made, and what of scripted demonstrations it has."""

    make: Callable[..., Simulator]
    install: str  # the command that brings its libraries
    expert: Callable[[Any], Policy] | None = None
    training_trials: Callable[[int, int], Sequence[Trial]] | None = None  # (count, seed)
    noise: Mapping[str, float] = field(default_factory=dict)  # of demonstrations, see agra.collect.ActionNoise


def _tabletop(hands: str) -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.tabletop.environment import Tabletop

        if options.pop("blind", False):
            raise ValueError("the tabletop has no blind form: its expert is quick enough beside the renderer")
        return Tabletop(hands=hands, **options)

    def expert(simulator: Any) -> Policy:
        from agra.simulators.tabletop.expert import ScriptedExpert

        return ScriptedExpert(simulator)

    def training(count: int, seed: int) -> Sequence[Trial]:
        from agra.simulators.tabletop.tasks import training_trials

        return training_trials(count, seed, simulator=hands)

    install = "pip install 'agra[tabletop]'"
    return Suite(
        make=make, install=install, expert=expert, training_trials=training, noise={"*_x": 0.0075, "*_y": 0.0075}
    )


def _metaworld() -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.metaworld.environment import Metaworld

        return Metaworld(**options)

    def expert(simulator: Any) -> Policy:
        from agra.simulators.metaworld.environment import ScriptedExpert

        return ScriptedExpert(simulator)

    def training(count: int, seed: int) -> Sequence[Trial]:
        from agra.simulators.metaworld.tasks import training_trials

        return training_trials(count, seed)

    return Suite(make=make, install="make env-metaworld", expert=expert, training_trials=training)


def _libero(name: str) -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.libero.environment import Libero

        return Libero(name, **options)

    def expert(simulator: Any) -> Policy:
        from agra.simulators.libero.expert import ScriptedExpert

        return ScriptedExpert(simulator)

    def training(count: int, seed: int) -> Sequence[Trial]:
        from agra.simulators.libero.environment import training_trials

        return training_trials(name, count, seed)

    install = "make env-libero"
    if name != "libero_object":  # the expert picks and places one thing
        return Suite(make=make, install=install)
    return Suite(make=make, install=install, expert=expert, training_trials=training)


def _robocasa() -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.robocasa.environment import RobocasaGR1

        return RobocasaGR1(**options)

    return Suite(make=make, install="make env-robocasa")


SUITES: dict[str, Suite] = {
    "tabletop": _tabletop("tabletop"),
    "tabletop_human": _tabletop("tabletop_human"),
    "metaworld": _metaworld(),
    **{name: _libero(name) for name in MAX_STEPS},
    "robocasa_gr1": _robocasa(),
}


def suite(name: str) -> Suite:
    """The suite of a registered simulator. Raises ValueError for an unknown name."""
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown simulator {name!r}; did you mean {close!r}? There are {', '.join(SUITES)}")
    return SUITES[name]


def make(name: str, **options: Any) -> Simulator:
    """The simulator `name`, made with its suite's own `options` (for the tabletop: frame_size).

    Raises ValueError for an unknown name, ImportError where the suite or OpenGL is not installed.
    """
    found = suite(name)
    try:
        return found.make(**options)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: {error}; install it with: {found.install}") from error


def expert(simulator: Simulator) -> Policy:
    """The scripted expert of a simulator. Raises ValueError for one without."""
    scripted = suite(simulator.name).expert
    if scripted is None:
        raise ValueError(f"{simulator.name}: this simulator has no scripted expert")
    return scripted(simulator)
