"""Groups of a benchmark's tasks, as data. Published averages of Meta-World are means of group means."""

from collections.abc import Mapping

TASK_GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "metaworld": {
        "easy": (
            "button-press-topdown-v3",
            "button-press-topdown-wall-v3",
            "button-press-v3",
            "button-press-wall-v3",
            "coffee-button-v3",
            "dial-turn-v3",
            "door-close-v3",
            "door-lock-v3",
            "door-open-v3",
            "door-unlock-v3",
            "drawer-close-v3",
            "drawer-open-v3",
            "faucet-close-v3",
            "faucet-open-v3",
            "handle-press-side-v3",
            "handle-press-v3",
            "handle-pull-side-v3",
            "handle-pull-v3",
            "lever-pull-v3",
            "peg-unplug-side-v3",
            "plate-slide-back-side-v3",
            "plate-slide-back-v3",
            "plate-slide-side-v3",
            "plate-slide-v3",
            "reach-v3",
            "reach-wall-v3",
            "window-close-v3",
            "window-open-v3",
        ),
        "medium": (
            "basketball-v3",
            "bin-picking-v3",
            "box-close-v3",
            "coffee-pull-v3",
            "coffee-push-v3",
            "hammer-v3",
            "peg-insert-side-v3",
            "push-wall-v3",
            "soccer-v3",
            "sweep-into-v3",
            "sweep-v3",
        ),
        "hard": (
            "assembly-v3",
            "hand-insert-v3",
            "pick-out-of-hole-v3",
            "pick-place-v3",
            "push-back-v3",
            "push-v3",
        ),
        "very hard": (
            "disassemble-v3",
            "pick-place-wall-v3",
            "shelf-place-v3",
            "stick-pull-v3",
            "stick-push-v3",
        ),
    },
}
"""Simulator -> group -> tasks. Meta-World's four difficulties are those of the SmolVLA paper's Table 2 (arXiv
2506.01844)."""


def task_groups(simulator: str) -> Mapping[str, str]:
    """Group of every task of a simulator. Empty for a simulator without groups."""
    return {task: group for group, tasks in TASK_GROUPS.get(simulator, {}).items() for task in tasks}
