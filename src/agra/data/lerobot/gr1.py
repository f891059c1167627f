"""The GR1 tabletop sets as the paper's simulation experiments read them.                                B.1, C.2; docs/paper.md #29, #30

Source of the layout: NVIDIA/Isaac-GR00T `demo_data` and `FourierGr1ArmsWaistDataConfig`; of the task list and of the
few-shot split: xpeng-robotics/DIAL `examples/eval.sh`.
"""

from agra.data.config import EGO_VIEW, SourceConfig

EMBODIMENT = "gr1"
REPOSITORY = "nvidia/PhysicalAI-Robotics-GR00T-X-Embodiment-Sim"
"""The hub's dataset whose folders the tasks are."""
KEYS = ("left_arm", "right_arm", "left_hand", "right_hand", "waist")
"""29 of the 44 dimensions: 7 + 7 + 6 + 6 + 3. Legs and neck are dropped."""

CONTENT_ROWS = (43, 213)
"""The recorded 256 x 256 frame is a 720 x 480 picture between black bars."""

_ARTICULATED = ("Bottle", "Cabinet"), ("Can", "Drawer"), ("Cup", "Drawer"), ("Milk", "Microwave")
_ARTICULATED += ("Potato", "Microwave"), ("Wine", "Cabinet")
_NOVEL = {
    "Cuttingboard": ("Basket", "Cardboardbox", "Pan", "Pot", "Tieredbasket"),
    "Placemat": ("Basket", "Bowl", "Plate", "Tieredshelf"),
    "Plate": ("Bowl", "Cardboardbox", "Pan", "Plate"),
    "Tray": ("Cardboardbox", "Plate", "Pot", "Tieredbasket", "Tieredshelf"),
}
TASKS = (
    *(f"PnP{thing}To{place}Close" for thing, place in _ARTICULATED),
    *(f"PosttrainPnPNovelFrom{a}To{b}SplitA" for a, places in _NOVEL.items() for b in places),
)
"""The 24 tasks of training and in-distribution evaluation."""

FEW_SHOT = 100
"""Trajectories a task of the few-shot setting, 2,400 in all; the full setting has 1,000."""


def task_folder(task: str) -> str:
    """A task's folder in the repository."""
    return f"gr1_unified.{task}_GR1ArmsAndWaistFourierHands_1000"


def gr1_source(path: str, *, training_episodes: int | None = None) -> SourceConfig:
    """One task's set: sines and cosines of the joint angles as state (58 numbers), actions from min to max (29)."""
    return SourceConfig(
        path=path,
        embodiment=EMBODIMENT,
        camera=EGO_VIEW,
        crop_rows=CONTENT_ROWS,
        state=tuple(f"{key}:sin_cos" for key in KEYS),
        action=KEYS,
        normalization="min_max",
        instruction_key="human.coarse_action",
        strip_prefixes=("unlocked_waist: ", "locked_waist: "),
        training_episodes=training_episodes,
    )


def gr1_mixture(*, few_shot: bool = False) -> tuple[SourceConfig, ...]:
    """All 24 tasks with equal weight, as paths relative to the folder (or hub id) that holds them."""
    episodes = FEW_SHOT if few_shot else None
    return tuple(gr1_source(task_folder(task), training_episodes=episodes) for task in TASKS)
