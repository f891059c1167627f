"""The two embodiments: floating hands, position-controlled in x, y, z, yaw and fingers. They hold by friction alone.

The origin of a hand is between its finger tips. Fingers close along its local x axis.
"""

# MuJoCo's compiled module has no type stubs.
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass
from functools import cached_property

import mujoco
import numpy as np

from agra.simulators.tabletop.models.parts import Colour, Part, ball, blob, block, disc, rod
from agra.types import Embodiment

SIDES = ("left", "right")
ARM_JOINTS = ("x", "y", "z", "yaw")
LOW = {"x": -0.26, "y": -0.15, "z": 0.006, "yaw": -1.75}
HIGH = {"x": 0.26, "y": 0.19, "z": 0.24, "yaw": 1.75}
REST = {"left": (-0.170, -0.135, 0.045, 0.0), "right": (0.170, -0.135, 0.045, 0.0)}
"""x, y, z in metres and yaw in radians: limits of the workspace, and the initial pose."""


@dataclass(frozen=True, kw_only=True)
class Finger:
    """A finger that slides along `sign` times local x, by the fraction `share` of the value of the action `grip`."""

    name: str
    grip: str
    share: float
    sign: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True)
class HandModel:
    """A kind of hand. `fingers` and `palm` are those of the right hand. The left hand is its mirror image."""

    name: str
    grips: dict[str, float]  # action -> widest opening in metres, closed at 0
    palm: tuple[Part, ...]
    fingers: tuple[Finger, ...]
    tints: dict[str, Colour]  # side -> colour of its marked parts

    @cached_property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the state dimensions. Actions are targets of the same quantities."""
        return tuple(f"{side}_{joint}" for side in SIDES for joint in (*ARM_JOINTS, *self.grips))

    @cached_property
    def embodiment(self) -> Embodiment:
        """The hand as an `agra.types.Embodiment`."""
        return Embodiment(name=self.name, state_names=self.dimensions, action_names=self.dimensions)

    @cached_property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest action, (D,) float32 each."""
        low = [LOW[j] for j in ARM_JOINTS] + [0.0] * len(self.grips)
        high = [HIGH[j] for j in ARM_JOINTS] + list(self.grips.values())
        return np.array(low * 2, np.float32), np.array(high * 2, np.float32)

    @cached_property
    def rest(self) -> np.ndarray:
        """The action that keeps both hands in their initial pose, (D,) float32."""
        return np.array([v for side in SIDES for v in (*REST[side], *self.grips.values())], np.float32)

    def grip(self, opening: float) -> tuple[float, ...]:
        """The grip actions that open the fingers to `opening` metres, around the hand's origin."""
        share = min(max(opening, 0.0) / self.widest, 1.0)
        return tuple(share * widest for widest in self.grips.values())

    @cached_property
    def widest(self) -> float:
        """Largest distance between opposing fingers, metres."""
        return sum(self.grips.values())

    def dims(self, side: str) -> slice:
        """A side's dimensions in state and action."""
        width = len(ARM_JOINTS) + len(self.grips)
        return slice(0, width) if side == "left" else slice(width, 2 * width)


_STEEL, _DARK, _PAD = (0.83, 0.84, 0.87), (0.14, 0.14, 0.17), (0.05, 0.05, 0.06)


def _jaw(sign: int) -> tuple[Part, ...]:
    return (
        block((0.0045, 0.010, 0.030), _STEEL, (sign * 0.0045, 0, 0.030)),
        block((0.0046, 0.0102, 0.007), _PAD, (sign * 0.0045, 0, 0.007), solid=False),
    )


GRIPPER = HandModel(
    name="tabletop",
    grips={"opening": 0.088},
    palm=(
        block((0.050, 0.0125, 0.011), _DARK, (0, 0, 0.072)),
        block((0.024, 0.0130, 0.006), (1.0, 0.0, 1.0), (0, 0, 0.075), solid=False),
        disc(0.018, 0.016, _DARK, (0, 0, 0.098)),
        disc(0.0185, 0.005, (1.0, 0.0, 1.0), (0, 0, 0.104), solid=False),
    ),
    fingers=(
        Finger(name="outer", grip="opening", share=0.5, sign=1, parts=_jaw(1)),
        Finger(name="inner", grip="opening", share=0.5, sign=-1, parts=_jaw(-1)),
    ),
    tints={"left": (0.10, 0.62, 0.66), "right": (0.90, 0.35, 0.10)},
)

_SKIN, _KNUCKLE, _NAIL = (0.91, 0.68, 0.54), (0.85, 0.60, 0.46), (0.97, 0.83, 0.76)
_MARK = (1.0, 0.0, 1.0)
"""Placeholder of a side's tint."""


def _digit(sign: int, y: float, radius: float) -> tuple[Part, ...]:
    x = sign * radius
    return (
        rod((x, y, radius), (x, y, 0.040), radius, _SKIN),
        rod((x, y, 0.040), (x + sign * 0.002, y * 0.8, 0.062), radius * 1.05, _KNUCKLE),
        blob((0.003, 0.005, 0.007), _NAIL, (x + sign * (radius - 0.0015), y, 0.009), solid=False),
    )


HUMAN_HAND = HandModel(
    name="tabletop_human",
    grips={"thumb": 0.046, "fingers": 0.046},
    palm=(
        blob((0.052, 0.026, 0.014), _SKIN, (0, 0, 0.076)),
        ball(0.019, _SKIN, (-0.036, 0, 0.072)),
        rod((0, -0.004, 0.084), (0, -0.010, 0.112), 0.018, _SKIN),
        disc(0.0215, 0.008, _MARK, (0, -0.0105, 0.112), axis=(0, -0.2, 1), solid=False),
    ),
    fingers=(
        Finger(name="thumb", grip="thumb", share=1.0, sign=-1, parts=_digit(-1, 0.0, 0.0085)),
        Finger(name="index", grip="fingers", share=1.0, sign=1, parts=_digit(1, 0.0095, 0.0072)),
        Finger(name="middle", grip="fingers", share=1.0, sign=1, parts=_digit(1, -0.0095, 0.0072)),
    ),
    tints={"left": (0.15, 0.30, 0.62), "right": (0.62, 0.12, 0.20)},
)
HAND_MODELS = {model.name: model for model in (GRIPPER, HUMAN_HAND)}
STIFF = (0.008, 1.0)
"""MuJoCo's solref, seconds and damping ratio. At its default, fingers would sink centimetres into light items."""
FRICTION = {"finger": (1.6, 0.02, 0.0005), "item": (1.0, 0.005, 0.0003)}


def add_part(
    body: "mujoco.MjsBody", part: Part, *, density: float, friction: str, mirror: int = 1, tint: Colour | None = None
) -> None:
    """Add a primitive to a body. `mirror` -1 reflects it in x."""
    flip = np.array([mirror, 1, 1])
    rotation = part.rotation if mirror == 1 else np.diag(flip) @ part.rotation @ np.diag(flip)
    quat = np.empty(4)
    mujoco.mju_mat2Quat(quat, rotation.flatten())
    colour = tint if tint is not None and part.colour == _MARK else part.colour
    geom = body.add_geom(
        type=getattr(mujoco.mjtGeom, f"mjGEOM_{part.shape.upper()}"),
        size=[*part.size, 0.0, 0.0][:3],
        pos=flip * np.array(part.at),
        quat=quat,
        rgba=[*colour, 1.0],
        friction=FRICTION[friction],
        condim=4,
        solref=STIFF,
    )
    if part.solid:
        geom.density = density
    else:
        geom.mass, geom.contype, geom.conaffinity = 0.0, 0, 0


def add_hand(spec: "mujoco.MjSpec", model: HandModel, side: str) -> None:
    """Add a hand with its joints and actuators, named like the state dimensions or the fingers."""
    mirror = 1 if side == "right" else -1
    palm = spec.worldbody.add_body(name=f"{side}_hand", gravcomp=1)
    axes = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1))
    for joint, axis in zip(ARM_JOINTS, axes, strict=True):
        kind = mujoco.mjtJoint.mjJNT_HINGE if joint == "yaw" else mujoco.mjtJoint.mjJNT_SLIDE
        palm.add_joint(name=f"{side}_{joint}", type=kind, axis=axis, armature=0.002 if joint == "yaw" else 0.1)
        stiffness, damping, force = (10.0, 0.35, 5.0) if joint == "yaw" else (800.0, 46.0, 80.0)
        _servo(spec, f"{side}_{joint}", stiffness, damping, force)
    for part in model.palm:
        add_part(palm, part, density=2000, friction="item", mirror=mirror, tint=model.tints[side])
    for finger in model.fingers:
        name = f"{side}_{finger.name}"
        body = palm.add_body(name=name, gravcomp=1)
        widest = model.grips[finger.grip] * finger.share
        body.add_joint(
            name=name,
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=(mirror * finger.sign, 0, 0),
            armature=0.05,
            range=(0.0, widest),
            limited=1,
        )
        for part in finger.parts:
            add_part(body, part, density=2000, friction="finger", mirror=mirror)
        _servo(
            spec, name, 500.0, 14.0, 10.0 * finger.share / sum(f.share for f in model.fingers if f.sign == finger.sign)
        )


def _servo(spec: "mujoco.MjSpec", joint: str, stiffness: float, damping: float, force: float) -> None:
    """A position actuator: force = stiffness (target - position) - damping velocity, limited to `force`."""
    gain, bias = np.zeros(10), np.zeros(10)
    gain[0], bias[1], bias[2] = stiffness, -stiffness, -damping
    spec.add_actuator(
        name=joint,
        target=joint,
        trntype=mujoco.mjtTrn.mjTRN_JOINT,
        gainprm=gain,
        biastype=mujoco.mjtBias.mjBIAS_AFFINE,
        biasprm=bias,
        forcerange=(-force, force),
        forcelimited=1,
    )
