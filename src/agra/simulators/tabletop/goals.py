"""When a task counts as done, and how far it has come: read from the physics after every control step.

`success` holds at the instant at which it is asked: the thing rests where it should and no hand touches it. The flags
of `progress` stay once they have been reached.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from agra.simulators.tabletop.scene import Scene
from agra.simulators.tabletop.steamer import LID, STEAMER
from agra.simulators.tabletop.tabletop_tasks import OPEN_STEAMER, PICK_AND_PLACE

NEAR = 0.05
"""Metres, seen from above, between a hand's finger tips and a thing's origin that count as having approached it, once
the tips are lower than its top: passing over it does not count."""
LIFTED = 0.025
"""Metres above where it lay that count as lifted."""
AT_REST = 0.05
"""m/s below which a thing counts as resting."""
SET_ASIDE = 0.13
"""Metres between the steamer's middle and the lid's that count as set aside."""


def resting(scene: Scene, name: str, container: str) -> bool:
    """Whether a thing lies in or on a container, touching it, slow, and in no hand."""
    touching = scene.touching(name)
    free = not any(body.startswith(("left_", "right_")) for body in touching)
    return free and container in touching and scene.within(name, container) and scene.speed(name) < AT_REST


class PickAndPlace:
    """The right hand puts the target into or onto the goal. Progress: approached, grasped, placed.

    `approached`: of all loose things, the target was the first that the right hand reached for. `grasped`: the target
    was lifted while the right hand touched it. `placed`: success at some instant.
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
        """The side whose turn it is."""
        return "right"

    @property
    def acting_target(self) -> str:
        """What that hand is to move."""
        return self.target

    def update(self) -> bool:
        """Look at the scene: keep the progress, return success."""
        self._look("right", {name for name in self.scene.items if name != LID.name}, self.target)
        self.progress["grasped"] |= self._lifted(self.target, "right")
        success = resting(self.scene, self.target, self.goal)
        self.progress["placed"] |= success
        return success

    def _look(self, side: str, candidates: set[str], meant: str) -> None:
        """Notes the first thing that the hand comes near."""
        if self._first is None:
            tips = self.scene.state()[self.scene.hands.dims(side)][:3]
            away = {name: np.linalg.norm((self.scene.position(name) - tips)[:2]) for name in sorted(candidates)}
            nearest = min(away, key=lambda name: away[name])
            if away[nearest] < NEAR and tips[2] < self.scene.top(nearest):
                self._first = nearest
        self.progress["approached"] |= self._first == meant

    def _lifted(self, name: str, side: str) -> bool:
        risen = self.scene.position(name)[2] - self._height[name] > LIFTED
        return bool(risen) and self.scene.touched_by_hand(name, side)


class OpenSteamer(PickAndPlace):
    """The left hand sets the lid aside, the right hand moves the bun from the steamer to the plate.

    Progress: approached (the left hand came near the lid's knob), lid_lifted, lid_set_aside, grasped, placed (the
    bun). Success: the bun rests on the plate and the lid on the table, clear of the steamer, neither touched.
    """

    flags = ("approached", "lid_lifted", "lid_set_aside", "grasped", "placed")

    @property
    def acting_hand(self) -> str:
        """Left until the lid has been set aside, then right."""
        return "right" if self.progress["lid_set_aside"] else "left"

    @property
    def acting_target(self) -> str:
        """The lid, then the bun."""
        return self.target if self.progress["lid_set_aside"] else LID.name

    def update(self) -> bool:
        """Look at the scene: keep the progress, return success."""
        self._look("left", {LID.name}, LID.name)
        aside = lid_aside(self.scene)
        placed = resting(self.scene, self.target, self.goal)
        self.progress["lid_lifted"] |= self._lifted(LID.name, "left")
        self.progress["lid_set_aside"] |= aside
        self.progress["grasped"] |= self._lifted(self.target, "right")
        self.progress["placed"] |= placed
        return aside and placed


def lid_aside(scene: Scene) -> bool:
    """Whether the lid lies on the table alone, clear of the steamer and of both hands."""
    touching = scene.touching(LID.name)
    apart = np.linalg.norm((scene.position(LID.name) - scene.position(STEAMER.name))[:2]) > SET_ASIDE
    return touching == {"world"} and bool(apart) and scene.speed(LID.name) < AT_REST


GOALS = {PICK_AND_PLACE: PickAndPlace, OPEN_STEAMER: OpenSteamer}
