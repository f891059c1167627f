"""Success and progress of the tasks, from the physics after every control step.

Success is instantaneous: the item rests at its goal and no hand touches it. The flags of `progress` are permanent.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from agra.simulators.tabletop.models.steamer import LID, STEAMER
from agra.simulators.tabletop.scene import Scene
from agra.simulators.tabletop.tabletop_tasks import OPEN_STEAMER, PICK_AND_PLACE

NEAR = 0.05
"""Largest horizontal distance of a hand's finger tips from an item's origin that counts as an approach, metres. The
tips must be below the item's top: passing over it does not count."""
LIFTED = 0.025
"""Height above its initial position from which an item counts as lifted, metres."""
AT_REST = 0.05
"""Largest speed of an item at rest, m/s."""
SET_ASIDE = 0.13
"""Distance of the lid from the steamer from which it counts as set aside, metres."""


def resting(scene: Scene, name: str, container: str) -> bool:
    """Whether an item rests in or on a container, touching it, slow, and touched by no hand."""
    touching = scene.touching(name)
    free = not any(body.startswith(("left_", "right_")) for body in touching)
    return free and container in touching and scene.within(name, container) and scene.speed(name) < AT_REST


class PickAndPlace:
    """The right hand puts the target into or onto the goal. Progress: approached, grasped, placed.

    `approached`: the target was the first item that the right hand came near. `grasped`: the target was lifted while
    the right hand touched it. `placed`: success at some instant.
    """

    flags: tuple[str, ...] = ("approached", "grasped", "placed")

    def __init__(self, scene: Scene, description: Mapping[str, Any]) -> None:
        self.scene = scene
        self.target: str = description["target"]["name"]
        self.goal: str = description["goal"]
        self.progress = dict.fromkeys(self.flags, False)
        self._first: str | None = None
        self._height = {name: scene.position(name)[2] for name in scene.items}

    @property
    def acting_hand(self) -> str:
        """The side of the acting hand."""
        return "right"

    @property
    def acting_target(self) -> str:
        """The object of the acting hand."""
        return self.target

    def update(self) -> bool:
        """Update the progress and return success."""
        self._note_approach("right", {name for name in self.scene.items if name != LID.name}, self.target)
        self.progress["grasped"] |= self._lifted(self.target, "right")
        success = resting(self.scene, self.target, self.goal)
        self.progress["placed"] |= success
        return success

    def _note_approach(self, side: str, candidates: set[str], target: str) -> None:
        """Record the first item that the hand comes near."""
        if self._first is None:
            tips = self.scene.state()[self.scene.hands.dims(side)][:3]
            away = {name: np.linalg.norm((self.scene.position(name) - tips)[:2]) for name in sorted(candidates)}
            nearest = min(away, key=lambda name: away[name])
            if away[nearest] < NEAR and tips[2] < self.scene.top(nearest):
                self._first = nearest
        self.progress["approached"] |= self._first == target

    def _lifted(self, name: str, side: str) -> bool:
        lifted = self.scene.position(name)[2] - self._height[name] > LIFTED
        return bool(lifted) and self.scene.touched_by_hand(name, side)


class OpenSteamer(PickAndPlace):
    """The left hand sets the lid aside, the right hand moves the bun from the steamer to the plate.

    Progress: approached (the left hand came near the lid's knob), lid_lifted, lid_set_aside, grasped, placed (the
    bun). Success: the bun rests on the plate and the lid on the table, clear of the steamer, neither touched.
    """

    flags = ("approached", "lid_lifted", "lid_set_aside", "grasped", "placed")

    @property
    def acting_hand(self) -> str:
        """Left until the lid is set aside, then right."""
        return "right" if self.progress["lid_set_aside"] else "left"

    @property
    def acting_target(self) -> str:
        """The lid, then the bun."""
        return self.target if self.progress["lid_set_aside"] else LID.name

    def update(self) -> bool:
        """Update the progress and return success."""
        self._note_approach("left", {LID.name}, LID.name)
        aside = lid_aside(self.scene)
        placed = resting(self.scene, self.target, self.goal)
        self.progress["lid_lifted"] |= self._lifted(LID.name, "left")
        self.progress["lid_set_aside"] |= aside
        self.progress["grasped"] |= self._lifted(self.target, "right")
        self.progress["placed"] |= placed
        return aside and placed


def lid_aside(scene: Scene) -> bool:
    """Whether the lid rests on the table alone, clear of the steamer and of both hands."""
    touching = scene.touching(LID.name)
    distance = np.linalg.norm((scene.position(LID.name) - scene.position(STEAMER.name))[:2])
    return touching == {"world"} and bool(distance > SET_ASIDE) and scene.speed(LID.name) < AT_REST


GOALS = {PICK_AND_PLACE: PickAndPlace, OPEN_STEAMER: OpenSteamer}
