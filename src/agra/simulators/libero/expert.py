"""A scripted policy for libero_object: it reads the true poses, takes the thing and lets it fall into the basket.

`see` reads the simulator, `decide` is pure feedback on what was read: no memory, so that it recovers from any disturbance.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.transform import Rotation

from agra.types import ActionChunk, Observation

if TYPE_CHECKING:
    from agra.simulators.libero.environment import Libero

STEP, TURN = 0.05, 0.5
"""What an action of 1 commands, metres and radians (robosuite's OSC_POSE)."""
GAIN = 1.5
"""Commanded over wanted displacement: within a control step the arm follows an eighth of the command."""
OPEN, CLOSED = -1.0, 1.0
WIDEST = 0.078
"""Between the open fingers, metres."""
REACH = 0.03
"""How far below its top a thing is taken, metres: deeper, and the palm would touch it."""
TIP = 0.014
"""From the point between the finger pads down to the finger tips, and a little air, metres."""
AIR = 0.02
"""Between a moving hand or thing and what it passes over, metres."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What the expert needs to know, in metres in the world's frame. `corners` are of the thing's collision boxes."""

    hand: np.ndarray  # (3,) the point between the finger pads
    rotation: np.ndarray  # (3, 3) of the hand: the fingers close along its first axis, it points along its third
    opening: float  # between the fingers
    held: bool  # both fingers touch the thing
    thing: np.ndarray  # (3,) the point that has to be in the basket
    corners: np.ndarray  # (G, 8, 3)
    obstacles: float  # height of the tallest other thing
    basket: np.ndarray  # (2,) its middle
    rim: float  # its height


class ScriptedExpert:
    """An `agra.types.Policy` that answers one action at a time.

    Raises ValueError for a task that is not about a thing to be put in a container.
    """

    def __init__(self, simulator: "Libero") -> None:
        self.simulator = simulator

    def reset(self, seed: int) -> None:
        """Nothing to forget, and nothing random."""

    def act(self, observation: Observation) -> ActionChunk:
        """One action (1, 7)."""
        return ActionChunk(actions=decide(see(self.simulator))[None].astype(np.float32))


def see(simulator: "Libero") -> Scene:
    """The running task's scene."""
    world = simulator.world.env
    goals = world.parsed_problem["goal_state"]
    if len(goals) != 1 or goals[0][0].lower() != "in":
        raise ValueError(f"{simulator.trial.name}: the expert puts one thing in a container, the goal is {goals}")
    _, name, region = goals[0]
    basket = world.object_sites_dict[region].parent_name
    corners = {other: _corners(world, thing) for other, thing in world.objects_dict.items()}
    seen, gripper = world._get_observations(), world.robots[0].gripper
    fingers = [gripper.important_geoms[f"{side}_finger"] for side in ("left", "right")]
    site = world.sim.model.site_name2id(gripper.important_sites["grip_site"])
    return Scene(
        hand=seen["robot0_eef_pos"],
        rotation=world.sim.data.site_xmat[site].reshape(3, 3),
        opening=float(np.abs(seen["robot0_gripper_qpos"]).sum()),
        held=world._check_grasp(gripper=fingers, object_geoms=world.objects_dict[name]),
        thing=world.sim.data.body_xpos[world.obj_body_id[name]].copy(),
        corners=corners[name],
        obstacles=max(float(them[..., 2].max()) for other, them in corners.items() if other not in (name, basket)),
        basket=world.sim.data.get_site_xpos(region)[:2].copy(),
        rim=float(corners[basket][..., 2].max()),
    )


def decide(scene: Scene) -> np.ndarray:
    """The next action (7,)."""
    # Before the thing counts as being inside, which is judged by its middle: letting go belongs to the task.
    sunk = scene.corners[..., 2].min() < scene.rim - 0.01
    if sunk and np.linalg.norm(scene.basket - scene.thing[:2]) < 0.04:
        return _towards(scene, scene.hand, scene.rotation[:, 0], OPEN)
    return _carry(scene) if scene.held else _reach(scene)


def _reach(scene: Scene) -> np.ndarray:
    """Above the thing, down with open fingers, close."""
    point, axis, width = grasp(scene)
    away = point - scene.hand
    aside = float(np.linalg.norm(away[:2]))
    slack = max((WIDEST - width) / 2 - 0.002, 0.006)
    centred = abs(away @ axis) < slack and aside < 0.02
    aligned = centred and abs(axis @ scene.rotation[:, 0]) > np.cos(0.1)
    if aligned and away[2] > -0.008 and scene.opening > width - 0.015:
        return _towards(scene, point, axis, CLOSED)
    if aligned and scene.opening > min(width + 0.01, WIDEST - 0.008):
        return _towards(scene, point, axis, OPEN)
    passed = scene.corners[..., 2].max() if aside < 0.05 else max(scene.obstacles, scene.corners[..., 2].max())
    travel = passed + TIP + AIR
    blocked = scene.hand[2] < travel - 0.01 and aside > 0.02
    return _towards(scene, np.array([*(scene.hand if blocked else point)[:2], travel]), axis, OPEN)


def _carry(scene: Scene) -> np.ndarray:
    """Up, over the basket, down."""
    ahead = scene.basket - scene.thing[:2]
    clear = max(scene.rim, scene.obstacles) + AIR - scene.corners[..., 2].min()
    over, risen = np.linalg.norm(ahead) < 0.02, clear < 0.01
    there = scene.hand[:2] + (ahead if over or risen else 0)
    return _towards(scene, np.array([*there, scene.hand[2] + (-0.04 if over else clear)]), scene.rotation[:, 0], CLOSED)


def grasp(scene: Scene) -> tuple[np.ndarray, np.ndarray, float]:
    """Where to take the thing: point (3,), direction (3,) in which the fingers close, and its width there."""
    low, high = scene.corners[..., 2].min(), scene.corners[..., 2].max()
    height = max((low + high) / 2, high - REACH, low + TIP)
    between = (scene.corners[..., 2].min(1) <= height) & (scene.corners[..., 2].max(1) >= height)
    flat = (scene.corners[between] if between.any() else scene.corners)[..., :2].reshape(-1, 2)
    # Of all ways to close across it, the narrowest; among like ones that of the least turn.
    angles = np.arctan2(scene.rotation[1, 0], scene.rotation[0, 0]) + np.deg2rad(np.arange(-90, 90, 5))
    axes = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    spread = flat @ axes.T
    widths = spread.max(0) - spread.min(0)
    best = int(np.argmin(widths + 0.006 * np.abs(np.deg2rad(np.arange(-90, 90, 5)))))
    middle = (flat.min(0) + flat.max(0)) / 2
    return np.array([*middle, height]), np.array([*axes[best], 0.0]), float(widths[best])


def _towards(scene: Scene, point: np.ndarray, axis: np.ndarray, gripper: float) -> np.ndarray:
    """A bounded step to `point` (3,), the hand pointing down and closing along `axis` (3,)."""
    move = GAIN * (point - scene.hand) / STEP
    move /= max(1.0, float(np.abs(move).max()))
    closing = axis * np.array([1, 1, 0]) / np.linalg.norm(axis[:2])
    if closing @ scene.rotation[:, 0] < 0:
        closing = -closing
    down = np.array([0.0, 0.0, -1.0])
    wanted = np.stack([closing, np.cross(down, closing), down], axis=1)
    turn = GAIN * Rotation.from_matrix(wanted @ scene.rotation.T).as_rotvec() / TURN
    return np.array([*move, *np.clip(turn, -1, 1), gripper])


def _corners(world: Any, thing: Any) -> np.ndarray:
    """(G, 8, 3) corners of the boxes around a thing's collision geoms."""
    model, data = world.sim.model._model, world.sim.data._data
    geoms = np.array([world.sim.model.geom_name2id(name) for name in thing.contact_geoms])
    signs = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1).reshape(8, 3)
    boxes = model.geom_aabb[geoms]
    local = boxes[:, None, :3] + signs * boxes[:, None, 3:]
    rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
    return data.geom_xpos[geoms][:, None] + np.einsum("gij,gkj->gki", rotations, local)
