"""Objects moved by hand during an episode: points of the camera image on the table, and moves that the scene allows."""

# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from copy import copy

import mujoco
import numpy as np

from agra.simulators.tabletop.hands import HIGH, LOW
from agra.simulators.tabletop.models.steamer import STEAMER
from agra.simulators.tabletop.scene import Scene


def table_point(scene: Scene, column: float, row: float, frame_size: tuple[int, int]) -> np.ndarray:
    """The point (x, y) of the table at a pixel of the camera image. `frame_size` is its (height, width)."""
    height, width = frame_size
    slope = _slope(scene)
    ray = scene.data.cam_xmat[0].reshape(3, 3) @ np.array(
        [(2 * (column + 0.5) - width) / height * slope, (1 - 2 * (row + 0.5) / height) * slope, -1.0]
    )
    eye = scene.data.cam_xpos[0]
    return (eye - ray * eye[2] / ray[2])[:2]


def pixels(scene: Scene, points: np.ndarray, frame_size: tuple[int, int]) -> np.ndarray:
    """The pixels (N, 2), column and row, at which the camera sees the points (N, 3)."""
    height, width = frame_size
    x, y, z = ((points - scene.data.cam_xpos[0]) @ scene.data.cam_xmat[0].reshape(3, 3)).T
    scale = height / (2 * _slope(scene))
    return np.stack([width / 2 - x / z * scale, height / 2 + y / z * scale], axis=1) - 0.5


def moved(scene: Scene, name: str, position: Sequence[float] | np.ndarray) -> "mujoco.MjData":
    """The state of `scene` with an object put on the table at `position` (x, y), at rest. The scene does not change.

    The object keeps its yaw. Raises ValueError outside of the hands' workspace, where the object would touch another
    one or a hand, for a container that touches an item, and for the steamer.
    """
    x, y = (round(float(value), 5) for value in position)
    if name not in scene.items and name not in scene.containers:
        raise ValueError(f"unknown object {name!r}; on the table: {', '.join((*scene.items, *scene.containers))}")
    if name == STEAMER.name:
        raise ValueError("the steamer cannot be moved; move its lid or what is beside it")
    if not (LOW["x"] <= x <= HIGH["x"] and LOW["y"] <= y <= HIGH["y"]):
        raise ValueError(
            f"({x:.2f}, {y:.2f}) is out of the hands' reach: expected x in [{LOW['x']}, {HIGH['x']}] and y in"
            f" [{LOW['y']}, {HIGH['y']}] metres"
        )
    if name in scene.containers:
        held = sorted(scene.touching(name) & scene.items.keys())
        if held:
            raise ValueError(f"the {name} touches the {held[0]}; move the {held[0]} first")
    after = copy(scene)
    after.data = copy(scene.data)
    rotation = scene.rotation(name)
    yaw = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    if name in scene.items:
        after.place_item(name, (x, y), yaw, 0.0)
        after.data.joint(name).qvel[:] = 0
    else:
        after.place_container(name, (x, y), yaw)
    mujoco.mj_forward(after.model, after.data)
    near = _neighbours(after, name)
    if near:
        raise ValueError(f"no room for the {name} at ({x:.2f}, {y:.2f}): the {near[0].replace('_', ' ')} is there")
    return after.data


def _neighbours(scene: Scene, name: str) -> list[str]:
    """Objects and hands that an object touches. Two containers have no contacts, so their radii decide."""
    near = sorted(scene.touching(name) - {"world"})
    for other, container in scene.containers.items():
        away = np.linalg.norm((scene.position(name) - scene.position(other))[:2])
        if name in scene.containers and other != name and away < scene.containers[name].radius + container.radius:
            near.append(other)
    return near


def _slope(scene: Scene) -> float:
    return float(np.tan(np.radians(scene.model.cam_fovy[0]) / 2))
