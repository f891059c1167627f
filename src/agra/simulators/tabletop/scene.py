"""The physics of a trial's scene: compiled from its description, stepped, and queried for poses and contacts.

Every scene is compiled anew with its own objects alone, so that no trace of an earlier episode remains.
"""

# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from agra.simulators.tabletop.hands import SIDES, HandModel, add_hand, add_part
from agra.simulators.tabletop.models.catalogue import FURNITURE, ITEMS
from agra.simulators.tabletop.models.colours import TABLECLOTHS
from agra.simulators.tabletop.models.parts import Container, Item
from agra.simulators.tabletop.models.steamer import LID, STEAMER

TIMESTEP = 0.004
SUBSTEPS = 25
"""Physics steps per control step, for 10 Hz."""
SHADOW_OFFSET = np.array([0.004, 0.006])
"""Offset of the shadows, metres: the light comes from the front left."""
SETTLE_STEPS = 60
"""Physics steps before an episode, in which items come to rest."""


class Scene:
    """The physics of one trial. Positions are metres: x to the right, y away from the camera, z up from the table."""

    def __init__(self, description: Mapping[str, Any], hands: HandModel, frame_size: tuple[int, int]) -> None:
        self.hands = hands
        self.items = {p["name"]: _named(ITEMS, p["name"]) for p in (description["target"], *description["distractors"])}
        self.containers = {p["name"]: _named(FURNITURE, p["name"]) for p in description["containers"]}
        spec = _empty_spec(description["tablecloth"], frame_size)
        for placed in description["containers"]:
            _add_container(spec, self.containers[placed["name"]])
        if "steamer" in description:
            _add_container(spec, STEAMER)
            self.containers[STEAMER.name] = STEAMER
            self.items[LID.name] = LID
        for item in self.items.values():
            _add_item(spec, item)
        for side in SIDES:
            add_hand(spec, hands, side)
        self.model = spec.compile()
        self.data = mujoco.MjData(self.model)
        self._index()
        self._place(description)

    # --- acting ----------------------------------------------------------------------------------

    def step(self, action: np.ndarray) -> None:
        """One control period towards the targets `action` (D,), clipped to the workspace."""
        low, high = self.hands.limits
        self.data.ctrl[:] = np.clip(action, low, high)[self._action_of_actuator] * self._share_of_actuator
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)

    # --- observing -------------------------------------------------------------------------------

    def state(self) -> np.ndarray:
        """Position, yaw and finger openings of both hands, (D,) float32."""
        return (self._state_of_joints @ self.data.qpos[self._hand_qpos]).astype(np.float32)

    def position(self, name: str) -> np.ndarray:
        """An object's origin, (3,)."""
        return self.data.body(name).xpos.copy()

    def rotation(self, name: str) -> np.ndarray:
        """An object's local axes as columns, (3, 3)."""
        return self.data.body(name).xmat.reshape(3, 3).copy()

    def speed(self, name: str) -> float:
        """Speed of an item's origin, m/s."""
        return float(np.linalg.norm(self.data.joint(name).qvel[:3]))

    def bottom(self, name: str) -> float:
        """Height of the lowest solid point of an item, from its parts' bounds."""
        rotation, position = self.rotation(name), self.position(name)
        return min(
            float(position[2] + rotation[2] @ np.array(p.at) - _drop(p, rotation))
            for p in self.items[name].parts
            if p.solid
        )

    def top(self, name: str) -> float:
        """Height of the highest solid point of an item."""
        rotation, position = self.rotation(name), self.position(name)
        return max(
            float(position[2] + rotation[2] @ np.array(p.at) + _drop(p, rotation))
            for p in self.items[name].parts
            if p.solid
        )

    def touching(self, name: str) -> frozenset[str]:
        """Bodies in contact with an item. The table is `world`."""
        contact = self.data.contact
        if not len(contact.dist):
            return frozenset()
        bodies = self.model.geom_bodyid[contact.geom[contact.dist <= 0]]
        body = self.model.body(name).id
        others = np.concatenate([bodies[bodies[:, 0] == body, 1], bodies[bodies[:, 1] == body, 0]])
        return frozenset(self.model.body(int(other)).name for other in np.unique(others))

    def touched_by_hand(self, name: str, side: str | None = None) -> bool:
        """Whether a hand (of `side`, if given) touches an item."""
        sides = SIDES if side is None else (side,)
        return any(body.startswith(f"{s}_") for body in self.touching(name) for s in sides)

    def held(self, name: str, side: str) -> bool:
        """Whether opposing fingers of a hand touch an item."""
        touching = self.touching(name)
        return {f.sign for f in self.hands.fingers if f"{side}_{f.name}" in touching} == {-1, 1}

    def within(self, name: str, container: str) -> bool:
        """Whether an item's origin is above a container's inside."""
        description = self.containers[container]
        offset = (self.rotation(container).T @ (self.position(name) - self.position(container)))[
            :2
        ] / description.inside
        return bool(np.linalg.norm(offset) <= 1) if description.round else bool(np.abs(offset).max() <= 1)

    def shadows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Discs of shadow: centres (x, y) and half sizes (x, y)."""
        discs = []
        for name, item in self.items.items():
            low, high = item.bounds
            half = np.abs(self.rotation(name)) @ ((high - low) / 2)
            discs.append((self.position(name)[:2] + SHADOW_OFFSET, half[:2] * 1.08))
        for side in SIDES:
            x, y, _, yaw = self.state()[self.hands.dims(side)][:4]
            half = np.array([0.045 * abs(np.cos(yaw)) + 0.014, 0.045 * abs(np.sin(yaw)) + 0.014])
            discs.append((np.array([x, y]), half))
        return discs

    def geoms_of(self, *bodies: str) -> np.ndarray:
        """(ngeom,) bool: geoms of these bodies, and of the fingers of these hands."""
        ids = [i for i in range(self.model.nbody) if self.model.body(i).name in bodies]
        return np.isin(self.model.geom_bodyid, ids) | np.isin(self.model.body_parentid[self.model.geom_bodyid], ids)

    # --- setting up ------------------------------------------------------------------------------

    def _index(self) -> None:
        """Index the joint of every state dimension and the action of every actuator."""
        names = list(self.hands.dimensions)
        self._hand_qpos = np.array([self.model.jnt_qposadr[j] for j in self.model.actuator_trnid[:, 0]])
        self._action_of_actuator = np.zeros(self.model.nu, int)
        self._share_of_actuator = np.ones(self.model.nu)
        grip = {f"{s}_{f.name}": (f"{s}_{f.grip}", f.share) for s in SIDES for f in self.hands.fingers}
        for index in range(self.model.nu):
            name = self.model.actuator(index).name
            dimension, share = grip.get(name, (name, 1.0))
            self._action_of_actuator[index] = names.index(dimension)
            self._share_of_actuator[index] = share
        followers = (self._action_of_actuator[None] == np.arange(len(names))[:, None]) / self._share_of_actuator
        self._state_of_joints = followers / np.maximum((followers > 0).sum(1, keepdims=True), 1)

    def _place(self, description: Mapping[str, Any]) -> None:
        """Place all objects as described and let them come to rest."""
        for placed in description["containers"]:
            self.place_container(placed["name"], placed["position"], placed.get("yaw", 0.0))
        floor = 0.0
        if "steamer" in description:
            x, y = description["steamer"]["position"]
            self.place_container(STEAMER.name, (x, y), 0.0)
            self.place_item(LID.name, (x, y), 0.0, STEAMER.rim)
            floor = STEAMER.floor
        self.place_item(**_pose(description["target"]), floor=floor)
        for placed in description["distractors"]:
            self.place_item(**_pose(placed), floor=0.0)
        # Damping stops the rotation of items, as felt, crumbs and air would.
        for name in self.items:
            start = self.model.joint(name).dofadr[0]
            self.model.dof_damping[start + 3 : start + 6] = 3e-5
        rest = self.hands.rest
        self.data.ctrl[:] = rest[self._action_of_actuator] * self._share_of_actuator
        self.data.qpos[self._hand_qpos] = self.data.ctrl
        mujoco.mj_step(self.model, self.data, nstep=SETTLE_STEPS)
        mujoco.mj_forward(self.model, self.data)

    def place_container(self, name: str, position: Any, yaw: float) -> None:
        """Put a container at (x, y) on the table."""
        mocap = self.model.body(name).mocapid[0]
        self.data.mocap_pos[mocap] = [position[0], position[1], 0.0]
        self.data.mocap_quat[mocap] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    def place_item(self, name: str, position: Any, yaw: float, floor: float) -> None:
        """Put an item upright at (x, y), on a surface of height `floor`."""
        height = floor - self.items[name].bounds[0][2] + 0.0005
        self.data.joint(name).qpos[:] = [position[0], position[1], height, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]


def _pose(placed: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": placed["name"], "position": placed["position"], "yaw": placed.get("yaw", 0.0)}


def _named(things: Mapping[str, Any], name: str) -> Any:
    if name not in things:
        raise ValueError(f"scene: unknown object {name!r}; available: {', '.join(things)}")
    return things[name]


def _drop(part: Any, rotation: np.ndarray) -> float:
    """Vertical half extent of a part of an object with this rotation."""
    turned = np.abs(rotation[2] @ part.rotation)
    if part.shape == "sphere":
        return part.size[0]
    if part.shape == "box":
        return float(turned @ np.array(part.size))
    if part.shape == "ellipsoid":
        return float(np.linalg.norm(turned * part.size))
    radius, half = part.size
    return float(half * turned[2] + (radius if part.shape == "capsule" else radius * np.hypot(turned[0], turned[1])))


def _add_container(spec: "mujoco.MjSpec", container: Container) -> None:
    body = spec.worldbody.add_body(name=container.name, mocap=True)
    for part in container.parts:
        add_part(body, part, density=0, friction="item")


def _add_item(spec: "mujoco.MjSpec", item: Item) -> None:
    body = spec.worldbody.add_body(name=item.name)
    body.add_freejoint(name=item.name)
    for part in item.parts:
        add_part(body, part, density=item.density, friction="item")


def _empty_spec(tablecloth: str, frame_size: tuple[int, int]) -> "mujoco.MjSpec":
    """Options, camera, light, and the table with its cloth."""
    _named(TABLECLOTHS, tablecloth)
    spec = mujoco.MjSpec()
    spec.option.timestep = TIMESTEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.impratio = 5
    spec.visual.global_.offheight, spec.visual.global_.offwidth = frame_size
    # Software rendering pays for every vertex and sample; frames are reduced before use anyway.
    spec.visual.quality.offsamples, spec.visual.quality.shadowsize = 0, 0
    spec.visual.quality.numslices, spec.visual.quality.numstacks, spec.visual.quality.numquads = 16, 8, 2
    spec.visual.headlight.ambient = [0.38] * 3
    spec.visual.headlight.diffuse = [0.30] * 3
    spec.visual.headlight.specular = [0.05] * 3
    spec.visual.map.znear, spec.visual.map.zfar = 0.05, 5.0
    spec.stat.extent, spec.stat.center = 1.0, [0, 0, 0]
    # Every model has all cloths, in this order, so that one rendering context serves all of them.
    for name, (warp, weft) in TABLECLOTHS.items():
        spec.add_texture(
            name=name,
            type=mujoco.mjtTexture.mjTEXTURE_2D,
            builtin=mujoco.mjtBuiltin.mjBUILTIN_CHECKER,
            rgb1=warp,
            rgb2=weft,
            width=64,
            height=64,
        )
        material = spec.add_material(name=name, texrepeat=[24, 24], texuniform=True, specular=0.05, reflectance=0.0)
        material.textures[mujoco.mjtTextureRole.mjTEXROLE_RGB] = name
    world = spec.worldbody
    world.add_geom(
        type=mujoco.mjtGeom.mjGEOM_PLANE,
        size=[1.5, 1.5, 0.1],
        material=tablecloth,
        friction=[1, 0.005, 0.0003],
        condim=4,
    )
    world.add_light(
        type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL,
        pos=[-0.3, -0.4, 1.2],
        dir=[0.28, 0.30, -1.0],
        diffuse=[0.55] * 3,
        specular=[0.15] * 3,
        castshadow=False,
    )
    eye, aim = np.array([0.0, -0.46, 0.56]), np.array([0.0, 0.012, 0.0])
    back = (eye - aim) / np.linalg.norm(eye - aim)
    right = np.cross([0, 0, 1], back)
    up = np.cross(back, right)
    quat = np.empty(4)
    mujoco.mju_mat2Quat(
        quat, np.column_stack([right / np.linalg.norm(right), up / np.linalg.norm(right), back]).flatten()
    )
    world.add_camera(name="egocentric", pos=eye, quat=quat, fovy=25.0)
    return spec
