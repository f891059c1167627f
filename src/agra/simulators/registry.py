"""Simulators by name. The libraries of a suite are imported when a simulator is made."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agra.simulators.libero.suites import MAX_STEPS
from agra.types import Policy, Simulator, Trial


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """Scenes for demonstrations. Trial i of `trials` (count, seed) depends on i and the seed alone."""

    trials: Callable[[int, int], Sequence[Trial]]
    tasks: Callable[[], Sequence[str]]  # all tasks of the scenes
    noise: Mapping[str, float] = field(default_factory=dict)  # default std of agra.evaluation.collect.ActionNoise


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A simulator's constructor, and its scripted expert and scenes for demonstrations if it has them."""

    make: Callable[..., Simulator]
    install: str  # the command that installs its libraries
    expert: Callable[[Any], Policy] | None = None
    demonstrations: Demonstrations | None = None


def _tabletop(hands: str) -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.tabletop.tabletop_env import Tabletop

        if not options.pop("render", True):
            raise ValueError("the tabletop has no option render: it always renders")
        return Tabletop(hands=hands, **options)

    def expert(simulator: Any) -> Policy:
        from agra.simulators.tabletop.tabletop_expert import TabletopExpert

        return TabletopExpert(simulator)

    def training(count: int, seed: int) -> Sequence[Trial]:
        from agra.simulators.tabletop.tabletop_tasks import training_trials

        return training_trials(count, seed, simulator=hands)

    def tasks() -> Sequence[str]:
        from agra.simulators.tabletop.tabletop_tasks import OPEN_STEAMER, PICK_AND_PLACE

        return PICK_AND_PLACE, OPEN_STEAMER

    demonstrations = Demonstrations(trials=training, tasks=tasks, noise={"*_x": 0.0075, "*_y": 0.0075})
    return Suite(
        make=make,
        install="pip install '.[tabletop]' in a checkout of agra",
        expert=expert,
        demonstrations=demonstrations,
    )


def _metaworld(**preset: Any) -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.metaworld.metaworld_env import Metaworld

        return Metaworld(**(preset | options))

    def expert(simulator: Any) -> Policy:
        from agra.simulators.metaworld.metaworld_env import MetaworldExpert

        return MetaworldExpert(simulator)

    def training(count: int, seed: int) -> Sequence[Trial]:
        from agra.simulators.metaworld.metaworld_tasks import training_trials

        return training_trials(count, seed)

    def tasks() -> Sequence[str]:
        from agra.simulators.metaworld.metaworld_tasks import INSTRUCTIONS

        return tuple(INSTRUCTIONS)

    demonstrations = Demonstrations(trials=training, tasks=tasks)
    return Suite(make=make, install="make env-metaworld", expert=expert, demonstrations=demonstrations)


def _libero(name: str) -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.libero.libero_env import Libero

        return Libero(name, **options)

    def expert(simulator: Any) -> Policy:
        from agra.simulators.libero.libero_expert import LiberoExpert

        return LiberoExpert(simulator)

    def training(count: int, seed: int) -> Sequence[Trial]:
        from agra.simulators.libero.libero_env import training_trials

        return training_trials(name, count, seed)

    def tasks() -> Sequence[str]:
        return [trial.task for trial in training(10, 0)]  # the ten tasks, in turn

    install = "make env-libero"
    if name != "libero_object":  # the expert moves one object into a container
        return Suite(make=make, install=install)
    return Suite(make=make, install=install, expert=expert, demonstrations=Demonstrations(trials=training, tasks=tasks))


def _robocasa() -> Suite:
    def make(**options: Any) -> Simulator:
        from agra.simulators.robocasa.robocasa_env import RobocasaGR1

        return RobocasaGR1(**options)

    return Suite(make=make, install="make env-robocasa")


SUITES: dict[str, Suite] = {
    "tabletop": _tabletop("tabletop"),
    "tabletop_human": _tabletop("tabletop_human"),
    "metaworld": _metaworld(),
    "metaworld_20hz": _metaworld(control_stride=4, frame_size=(320, 320), shadow_map=1024),
    **{name: _libero(name) for name in MAX_STEPS},
    "robocasa_gr1": _robocasa(),
}


def suite(name: str) -> Suite:
    """The suite of a registered simulator. Raises ValueError for an unknown name."""
    if name not in SUITES:
        close = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown simulator {name!r}; did you mean {close!r}? Available: {', '.join(SUITES)}")
    return SUITES[name]


def make(name: str, **options: Any) -> Simulator:
    """Make the simulator `name` with its suite's `options` (for the tabletop: frame_size).

    Raises ValueError for an unknown name, ImportError if the suite or OpenGL is not installed.
    """
    entry = suite(name)
    try:
        return entry.make(**options)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name}: {error}; install it with: {entry.install}") from error


def expert(simulator: Simulator) -> Policy:
    """The scripted expert of a simulator. Raises ValueError for a simulator without one."""
    make_expert = suite(simulator.name).expert
    if make_expert is None:
        raise ValueError(f"{simulator.name}: this simulator has no scripted expert")
    return make_expert(simulator)
