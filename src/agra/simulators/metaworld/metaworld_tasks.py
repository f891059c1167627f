"""The 50 tasks of Meta-World and their trials, as data. Imports no library of the suite.

The instructions are those of the public dataset lerobot/metaworld_mt50, so that policies trained on it receive the same
instructions in evaluation.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

from agra.types import Trial

INSTRUCTIONS = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "hand-insert-v3": "Insert the gripper into a hole",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "pick-place-v3": "Pick and place a puck to a goal",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "push-back-v3": "Push the puck to a goal",
    "push-v3": "Push the puck to a goal",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-v3": "Reach a goal position",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-close-v3": "Push and close a window",
    "window-open-v3": "Push and open a window",
}
"""Tasks of MT50 and their instructions."""

EPISODES = 50
"""Episodes of each task in the full list. Meta-World samples 50 goals per task."""


def trials() -> tuple[Trial, ...]:
    """The evaluation list: task after task, scene i of every task with seed i.

    The seed of the policy's noise comes from the trial's name, so that no two trials share their noise.
    """
    listed = (_trial("test", task, episode) for task in INSTRUCTIONS for episode in range(EPISODES))
    return tuple(replace(trial, seed=zlib.crc32(trial.name.encode())) for trial in listed)


def training_trials(count: int, seed: int) -> Sequence[Trial]:
    """Scenes for demonstrations, all tasks in turn, with seeds that no evaluation uses."""
    tasks = list(INSTRUCTIONS)
    first = 1_000_000 * (seed + 1)
    return [_trial("train", tasks[i % len(tasks)], first + i // len(tasks)) for i in range(count)]


def _trial(part: str, task: str, seed: int) -> Trial:
    return Trial(
        name=f"{part}/{task}/{seed:03d}",
        simulator="metaworld",
        regime="in_distribution",
        task=task,
        seed=seed,
        instruction=INSTRUCTIONS[task],
        scene={"seed": seed},
    )
