"""The GR1 tabletop datasets of the paper's simulation experiments (B.1, C.2; docs/paper.md #29, #30).

Sources: NVIDIA/Isaac-GR00T `demo_data` and `FourierGr1ArmsWaistDataConfig` for the layout, xpeng-robotics/DIAL
`examples/eval.sh` for the task list and the few-shot split.
"""

from agra.data.config import EGO_VIEW, SourceConfig

EMBODIMENT = "gr1"
REPOSITORY = "nvidia/PhysicalAI-Robotics-GR00T-X-Embodiment-Sim"
"""The dataset on the hub. Each task is a folder of it."""
KEYS = ("left_arm", "right_arm", "left_hand", "right_hand", "waist")
"""29 of the 44 dimensions: 7 + 7 + 6 + 6 + 3. Legs and neck are left out."""

CONTENT_ROWS = (43, 213)
"""Rows of the recorded 256 x 256 frame between its black bars. They hold a picture of 720 x 480, scaled."""

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
"""Trajectories for each task in the few-shot setting, 2,400 in all. The full setting has 1,000 for each."""


def task_folder(task: str) -> str:
    """Return the folder of a task in the repository."""
    return f"gr1_unified.{task}_GR1ArmsAndWaistFourierHands_1000"


def gr1_source(path: str, *, training_episodes: int | None = None) -> SourceConfig:
    """Return the source of one task.

    The state is sines and cosines of the joint angles (58), actions are min_max (29).
    """
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
    """Return the sources of all 24 tasks with equal weight.

    Their paths are relative to the dataset's folder or hub id.
    """
    episodes = FEW_SHOT if few_shot else None
    return tuple(gr1_source(task_folder(task), training_episodes=episodes) for task in TASKS)
