"""A scripted policy that reads the physics and acts by pure feedback, so that it recovers from any disturbance."""

from dataclasses import dataclass

import numpy as np

from agra.simulators.tabletop.goals import LIFTED, PickAndPlace, lid_aside
from agra.simulators.tabletop.models.steamer import LID, LID_KNOB, STEAMER
from agra.simulators.tabletop.scene import Scene
from agra.simulators.tabletop.tabletop_env import Tabletop
from agra.simulators.tabletop.tabletop_tasks import OPEN_STEAMER
from agra.types import ActionChunk, Observation

SPEED = 0.045
"""Largest commanded displacement, metres per control step."""
TURN = 0.4
"""Largest commanded rotation, radians per control step."""
SPARE = 0.032
"""Finger opening beyond an item's width before grasping, metres."""


@dataclass(frozen=True, kw_only=True)
class Grasp:
    """A grasp: finger tips at `point` (3,), fingers `width` apart when closed, closing direction `yaw`."""

    point: np.ndarray
    yaw: float
    width: float


class TabletopExpert:
    """An `agra.types.Policy` with chunks of one action. It has no memory: the physics alone decide every action."""

    def __init__(self, simulator: Tabletop) -> None:
        self.simulator = simulator

    def reset(self, seed: int) -> None:
        """Do nothing: the expert has no memory and no randomness."""

    def act(self, observation: Observation) -> ActionChunk:
        """One action (1, D)."""
        scene, goal = self.simulator.scene, self.simulator.goal
        action = scene.hands.rest.astype(np.float64)
        left, right = Hand(scene, "left"), Hand(scene, "right")
        if self.simulator.trial.task == OPEN_STEAMER:
            action[scene.hands.dims("left")] = _open(left)
            action[scene.hands.dims("right")] = _transfer(right, goal)
        else:
            action[scene.hands.dims("left")] = left.retreat()
            action[scene.hands.dims("right")] = right.carry(goal.target, goal.goal)
        return ActionChunk(actions=action[None].astype(np.float32))


def _open(hand: "Hand") -> np.ndarray:
    """The left hand of the steamer task: lift the lid, set it down to the left, retreat."""
    scene = hand.scene
    if lid_aside(scene):
        return hand.retreat()
    steamer = scene.position(STEAMER.name)
    spot = np.array([steamer[0] - 0.185, steamer[1] - 0.005])
    lid = scene.position(LID.name)
    put_down = np.linalg.norm(lid[:2] - spot) < 0.03 and scene.bottom(LID.name) < 0.012
    return hand.move(
        LID.name, _knob(scene), spot, floor=0.0, clear=STEAMER.rim + LIFTED + 0.012, arrived=bool(put_down)
    )


def _knob(scene: Scene) -> Grasp:
    point = scene.position(LID.name) + scene.rotation(LID.name)[:, 2] * (LID_KNOB - 0.010)
    return Grasp(point=point, yaw=0.0, width=0.026)


def _transfer(hand: "Hand", goal: PickAndPlace) -> np.ndarray:
    """The right hand of the steamer task: wait beside the closed steamer, then carry the bun."""
    scene = hand.scene
    apart = np.linalg.norm((scene.position(LID.name) - scene.position(STEAMER.name))[:2])
    if apart < 0.14:
        steamer = scene.position(STEAMER.name)
        return hand.towards(np.array([steamer[0] + 0.13, steamer[1] - 0.06, 0.11]), 0.0, hand.widest)
    return hand.carry(goal.target, goal.goal)


class Hand:
    """One hand in the scene, and its commands."""

    def __init__(self, scene: Scene, side: str) -> None:
        self.scene, self.side = scene, side
        self.dims = scene.hands.dims(side)
        state = scene.state()[self.dims].astype(np.float64)
        self.tips, self.yaw, self.opening = state[:3], float(state[3]), float(state[4:].sum())
        self.widest = scene.hands.widest

    # --- commands: each returns this hand's dimensions of the action ------------------------------

    def towards(self, point: np.ndarray, yaw: float, opening: float) -> np.ndarray:
        """A bounded step to `point` (3,)."""
        step = point - self.tips
        step *= min(1.0, SPEED / max(float(np.linalg.norm(step)), 1e-9))
        turn = float(np.clip(yaw - self.yaw, -TURN, TURN))
        return np.array([*(self.tips + step), self.yaw + turn, *self.scene.hands.grip(opening)])

    def retreat(self) -> np.ndarray:
        """Return to rest with open fingers, upwards first."""
        rest = self.scene.hands.rest[self.dims].astype(np.float64)
        near = [n for n in self.scene.items if np.linalg.norm(self.scene.position(n)[:2] - self.tips[:2]) < 0.075]
        need = max((self.scene.top(name) + 0.012 for name in near), default=0.0)
        if near and self.tips[2] < need:
            return self.towards(np.array([*self.tips[:2], need + 0.02]), self.yaw, self.widest)
        away = np.linalg.norm(rest[:2] - self.tips[:2])
        height = rest[2] if away < 0.04 else max(self.tips[2], rest[2])
        return self.towards(np.array([*rest[:2], height]), float(rest[3]), self.widest)

    def carry(self, name: str, goal: str) -> np.ndarray:
        """Carry an item to a container."""
        container = self.scene.containers[goal]
        spot = self.scene.position(goal)[:2]
        inside = self.scene.within(name, goal) and self.scene.bottom(name) < container.floor + 0.02
        tops = [self.scene.top(other) for other in self.scene.items if other not in (name, LID.name)]
        clear = max([container.rim + 0.012, *(top + 0.008 for top in tops), *self._walls()])
        return self.move(name, self.grasp(name), spot, floor=container.floor, clear=clear, arrived=inside)

    def move(
        self, name: str, grasp: Grasp, spot: np.ndarray, *, floor: float, clear: float, arrived: bool
    ) -> np.ndarray:
        """Grasp an item, carry it with its lowest point above `clear`, lower it to `floor` at `spot` (2,), release
        it.
        """
        if arrived:
            return self._release(name)
        if not self.scene.held(name, self.side):
            return self._reach(name, grasp)
        offset = self.scene.position(name)[:2] - self.tips[:2]
        bottom = self.scene.bottom(name)
        ahead = spot - offset - self.tips[:2]
        distance = float(np.linalg.norm(ahead))
        if distance > 0.012:
            low = bottom < clear - 0.006
            there = self.tips[:2] if low and distance > 0.02 else self.tips[:2] + ahead
            return self.towards(np.array([*there, self.tips[2] + clear + 0.006 - bottom]), self.yaw, 0.0)
        height = self.tips[2] + floor + 0.006 - bottom
        opened = self.widest if bottom < floor + 0.016 else 0.0
        return self.towards(np.array([*(self.tips[:2] + ahead), height]), self.yaw, opened)

    def _release(self, name: str) -> np.ndarray:
        """Open the fingers, then retreat."""
        if self.scene.touched_by_hand(name, self.side) and self.opening < self.widest - 0.003:
            return self.towards(self.tips, self.yaw, self.widest)
        return self.retreat()

    def _reach(self, name: str, grasp: Grasp) -> np.ndarray:
        """Move above the item, descend, close."""
        away = grasp.point[:2] - self.tips[:2]
        distance = float(np.linalg.norm(away))
        along = np.array([np.cos(self.yaw), np.sin(self.yaw)])
        aligned = abs(grasp.yaw - self.yaw) < 0.2
        ready = min(grasp.width + SPARE, self.widest)
        slack = max((max(self.opening, ready) - grasp.width) / 2 - 0.004, 0.006)
        centred = abs(away @ along) < slack and abs(away[0] * along[1] - away[1] * along[0]) < 0.014
        top = self.scene.top(name)
        if centred and aligned and self.tips[2] < grasp.point[2] + 0.009:
            return self.towards(np.array([*grasp.point[:2], grasp.point[2]]), grasp.yaw, 0.0)
        if centred and aligned and self.opening > ready - 0.012:
            return self.towards(grasp.point, grasp.yaw, ready)
        travel = max([top + 0.012, *self._walls()])
        if distance > 0.06:
            travel = max([travel, *(self.scene.top(other) + 0.012 for other in self.scene.items if other != LID.name)])
        blocked = self.tips[2] < travel - 0.012 and distance > 0.02
        there = self.tips[:2] if blocked else grasp.point[:2]
        return self.towards(np.array([*there, travel]), grasp.yaw, ready)

    # --- perception -------------------------------------------------------------------------------

    def grasp(self, name: str) -> Grasp:
        """The grasp across an item's narrow side, just below its centre."""
        item, rotation, centre = self.scene.items[name], self.scene.rotation(name), self.scene.position(name)
        low, high = item.bounds
        axes = rotation * (high - low) / 2
        upright = abs(rotation[2, 2]) > 0.9
        directions = [np.array([1.0, 0.0])]
        if upright and item.faces:
            directions = [rotation[:2, 0], rotation[:2, 1]]
        elif upright and item.across is not None:
            directions = [(rotation @ item.across)[:2]]
        elif not upright:
            directions = [np.linalg.eigh(axes[:2] @ axes[:2].T)[1][:, 0]]
        yaws = [np.arctan2(d[1], d[0]) + turn * np.pi for d in directions for turn in (-1, 0, 1)]
        yaw = min((y for y in yaws if abs(y) < 1.7), key=lambda y: abs(y - self.yaw))
        width = 2 * float(np.linalg.norm(np.array([np.cos(yaw), np.sin(yaw)]) @ axes[:2]))
        height = max(self.scene.bottom(name) + 0.007, centre[2] - 0.012)
        return Grasp(point=np.array([centre[0], centre[1], height]), yaw=float(yaw), width=width)

    def _walls(self) -> list[float]:
        """Lower bounds on the height of the tips: the rim of the steamer, if there is one."""
        if STEAMER.name not in self.scene.containers:
            return []
        return [STEAMER.rim + 0.012]
