"""The tasks of the RoboCasa GR1 tabletop benchmark and its three suites of unseen objects and pairs, as data."""

import zlib

from agra.types import Trial

ROBOT = "GR1ArmsAndWaistFourierHands"
EPISODES = 50
"""Episodes of each task."""

_PAIRS = {
    "Cuttingboard": ("Basket", "Cardboardbox", "Pan", "Pot", "Tieredbasket"),
    "Placemat": ("Basket", "Bowl", "Plate", "Tieredshelf"),
    "Plate": ("Bowl", "Cardboardbox", "Pan", "Plate"),
    "Tray": ("Cardboardbox", "Plate", "Pot", "Tieredbasket", "Tieredshelf"),
}
"""Source -> targets in training."""
_NOVEL_PAIRS = {
    "Cuttingboard": ("Bowl", "Plate", "Tieredshelf"),
    "Tray": ("Basket", "Pan", "Bowl"),
    "Plate": ("Basket", "Pot", "Tieredshelf", "Tieredbasket"),
    "Placemat": ("Pan", "Pot", "Tieredbasket", "Cardboardbox"),
}
_ARTICULATED = (
    "PnPBottleToCabinetClose",
    "PnPCanToDrawerClose",
    "PnPCupToDrawerClose",
    "PnPMilkToMicrowaveClose",
    "PnPPotatoToMicrowaveClose",
    "PnPWineToCabinetClose",
)
_TYPE_TARGETS = ("Basket", "Bowl", "Cardboardbox", "Pan", "Plate", "Pot", "Tieredbasket", "Tieredshelf")


def _named(pattern: str, pairs: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(pattern.format(start, end) for start, ends in pairs.items() for end in ends)


TASKS = {
    "in_distribution": _ARTICULATED + _named("PosttrainPnPNovelFrom{}To{}SplitA", _PAIRS),
    "unseen_appearance": _named("EvalPnPNovelFrom{}To{}SplitB", _PAIRS),
    "unseen_object_types": _named("PretrainPnPBaseFrom{}To{}SplitA", dict.fromkeys(_PAIRS, _TYPE_TARGETS)),
    "unseen_combinations": _named("PretrainPnPNovelFrom{}To{}SplitA", _NOVEL_PAIRS),
}
"""Regime -> task classes: the benchmark's 24, and the 18, 32 and 14 of DIAL's suites (the paper's Table 2)."""


def environment_id(task: str) -> str:
    """The package's id of a task with the benchmark's robot."""
    return f"gr1_unified/{task}_{ROBOT}_Env"


def trials(regime: str) -> tuple[Trial, ...]:
    """50 seeded scenes of each task of a regime. The seed of the policy's noise comes from the trial's name.

    The instruction comes from the environment: it names the sampled object.
    """
    if regime not in TASKS:
        raise ValueError(f"unknown regime {regime!r}; available: {', '.join(TASKS)}")
    return tuple(
        Trial(
            name=(name := f"{regime}/{task}/{episode:02d}"),
            simulator="robocasa_gr1",
            regime=regime,
            task=task,
            seed=zlib.crc32(name.encode()),
            instruction="",
            scene={"environment": environment_id(task), "seed": episode},
        )
        for task in TASKS[regime]
        for episode in range(EPISODES)
    )
