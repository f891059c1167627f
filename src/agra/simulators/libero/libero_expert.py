"""A scripted policy for libero_object: it reads the true poses, grasps the object and drops it into the basket.

`read_scene` reads the simulator. `decide` is pure feedback without memory, so that it recovers from any disturbance.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.spatial.transform import Rotation

from agra.types import ActionChunk, Observation

if TYPE_CHECKING:
    from agra.simulators.libero.libero_env import Libero

STEP, TURN = 0.05, 0.5
"""Displacement and rotation of an action of 1, metres and radians (robosuite's OSC_POSE)."""
GAIN = 1.5
"""Commanded over intended displacement. The arm follows an eighth of a command within a control step."""
OPEN, CLOSED = -1.0, 1.0
WIDEST = 0.078
"""Distance between the open fingers, metres."""
REACH = 0.03
"""Depth of the grasp below the object's top, metres. A deeper grasp would touch the palm."""
TIP = 0.014
"""Height of the point between the finger pads above the finger tips, with a margin, metres."""
CLEARANCE = 0.02
"""Clearance of a moving hand or object, metres."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GraspScene:
    """The expert's inputs, in metres in the simulator's coordinates.

    `corners` are those of the object's collision boxes.
    """

    hand: np.ndarray  # (3,) the point between the finger pads
    rotation: (
        np.ndarray
    )  # (3, 3) of the hand: its first axis is the closing direction, its third the pointing direction
    opening: float  # between the fingers
    held: bool  # both fingers touch the object
    position: np.ndarray  # (3,) of the object: the point that has to be in the basket
    corners: np.ndarray  # (G, 8, 3)
    obstacles: float  # height of the tallest other object
    basket: np.ndarray  # (2,) its centre
    rim: float  # its height


class LiberoExpert:
    """An `agra.types.Policy` with chunks of one action.

    Raises ValueError for tasks other than an object into a container.
    """

    def __init__(self, simulator: "Libero") -> None:
        self.simulator = simulator

    def reset(self, seed: int) -> None:
        """Do nothing: the expert has no memory and no randomness."""

    def act(self, observation: Observation) -> ActionChunk:
        """One action (1, 7)."""
        return ActionChunk(actions=decide(read_scene(self.simulator))[None].astype(np.float32))


def read_scene(simulator: "Libero") -> GraspScene:
    """The running task's scene."""
    env = simulator.env.env
    goals = env.parsed_problem["goal_state"]
    if len(goals) != 1 or goals[0][0].lower() != "in":
        raise ValueError(
            f"{simulator.trial.name}: the expert puts one object into a container, but the goal is {goals}"
        )
    _, name, region = goals[0]
    basket = env.object_sites_dict[region].parent_name
    corners = {other: _corners(env, model) for other, model in env.objects_dict.items()}
    observation, gripper = env._get_observations(), env.robots[0].gripper
    fingers = [gripper.important_geoms[f"{side}_finger"] for side in ("left", "right")]
    site = env.sim.model.site_name2id(gripper.important_sites["grip_site"])
    return GraspScene(
        hand=observation["robot0_eef_pos"],
        rotation=env.sim.data.site_xmat[site].reshape(3, 3),
        opening=float(np.abs(observation["robot0_gripper_qpos"]).sum()),
        held=env._check_grasp(gripper=fingers, object_geoms=env.objects_dict[name]),
        position=env.sim.data.body_xpos[env.obj_body_id[name]].copy(),
        corners=corners[name],
        obstacles=max(float(boxes[..., 2].max()) for other, boxes in corners.items() if other not in (name, basket)),
        basket=env.sim.data.get_site_xpos(region)[:2].copy(),
        rim=float(corners[basket][..., 2].max()),
    )


def decide(scene: GraspScene) -> np.ndarray:
    """The next action (7,)."""
    # Release before the object counts as inside, which its centre decides: the release belongs to the task.
    sunk = scene.corners[..., 2].min() < scene.rim - 0.01
    if sunk and np.linalg.norm(scene.basket - scene.position[:2]) < 0.04:
        return _towards(scene, scene.hand, scene.rotation[:, 0], OPEN)
    return _carry(scene) if scene.held else _reach(scene)


def _reach(scene: GraspScene) -> np.ndarray:
    """Move above the object, descend with open fingers, close."""
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
    travel = passed + TIP + CLEARANCE
    blocked = scene.hand[2] < travel - 0.01 and aside > 0.02
    return _towards(scene, np.array([*(scene.hand if blocked else point)[:2], travel]), axis, OPEN)


def _carry(scene: GraspScene) -> np.ndarray:
    """Lift, move over the basket, descend."""
    ahead = scene.basket - scene.position[:2]
    clear = max(scene.rim, scene.obstacles) + CLEARANCE - scene.corners[..., 2].min()
    over, risen = np.linalg.norm(ahead) < 0.02, clear < 0.01
    there = scene.hand[:2] + (ahead if over or risen else 0)
    return _towards(scene, np.array([*there, scene.hand[2] + (-0.04 if over else clear)]), scene.rotation[:, 0], CLOSED)


def grasp(scene: GraspScene) -> tuple[np.ndarray, np.ndarray, float]:
    """The grasp: point (3,), closing direction of the fingers (3,), and width of the object there."""
    low, high = scene.corners[..., 2].min(), scene.corners[..., 2].max()
    height = max((low + high) / 2, high - REACH, low + TIP)
    between = (scene.corners[..., 2].min(1) <= height) & (scene.corners[..., 2].max(1) >= height)
    flat = (scene.corners[between] if between.any() else scene.corners)[..., :2].reshape(-1, 2)
    # The narrowest closing direction and, among similar ones, that of the smallest turn.
    angles = np.arctan2(scene.rotation[1, 0], scene.rotation[0, 0]) + np.deg2rad(np.arange(-90, 90, 5))
    axes = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    spread = flat @ axes.T
    widths = spread.max(0) - spread.min(0)
    best = int(np.argmin(widths + 0.006 * np.abs(np.deg2rad(np.arange(-90, 90, 5)))))
    middle = (flat.min(0) + flat.max(0)) / 2
    return np.array([*middle, height]), np.array([*axes[best], 0.0]), float(widths[best])


def _towards(scene: GraspScene, point: np.ndarray, axis: np.ndarray, gripper: float) -> np.ndarray:
    """A bounded step to `point` (3,) with the hand pointing down and closing along `axis` (3,)."""
    move = GAIN * (point - scene.hand) / STEP
    move /= max(1.0, float(np.abs(move).max()))
    closing = axis * np.array([1, 1, 0]) / np.linalg.norm(axis[:2])
    if closing @ scene.rotation[:, 0] < 0:
        closing = -closing
    down = np.array([0.0, 0.0, -1.0])
    target = np.stack([closing, np.cross(down, closing), down], axis=1)
    turn = GAIN * Rotation.from_matrix(target @ scene.rotation.T).as_rotvec() / TURN
    return np.array([*move, *np.clip(turn, -1, 1), gripper])


def _corners(env: Any, entity: Any) -> np.ndarray:
    """Corners (G, 8, 3) of the boxes around an object's collision geoms."""
    model, data = env.sim.model._model, env.sim.data._data
    geoms = np.array([env.sim.model.geom_name2id(name) for name in entity.contact_geoms])
    signs = np.stack(np.meshgrid(*[(-1, 1)] * 3), axis=-1).reshape(8, 3)
    boxes = model.geom_aabb[geoms]
    local = boxes[:, None, :3] + signs * boxes[:, None, 3:]
    rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
    return data.geom_xpos[geoms][:, None] + np.einsum("gij,gkj->gki", rotations, local)
