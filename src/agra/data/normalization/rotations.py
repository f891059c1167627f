"""Conversion of rotations to six numbers and back: the first two columns of the matrix (Zhou et al. 2019).

GR00T's `rotation_type` names the stored representation. Angles are radians, quaternions begin with their real part, and
`euler_angles_rpy` multiplies the matrices about x, y and z in the order of its letters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

WIDTHS = {"axis_angle": 3, "quaternion": 4, "matrix": 9, "rotation_6d": 6, "euler_angles": 3}
"""Number of dimensions of each type. Euler angles have their axes in the name, as in euler_angles_rpy."""


@dataclass(frozen=True)
class _Type:
    to_matrix: Callable[[np.ndarray], np.ndarray]
    from_matrix: Callable[[np.ndarray], np.ndarray]


def check_type(name: str) -> str:
    """Return `name`. Raises ValueError where it is not a rotation type."""
    base, axes = _parse(name)
    if base not in WIDTHS or (base == "euler_angles" and (len(axes) != 3 or not set(axes) <= set("XYZ"))):
        raise ValueError(f"rotation type: expected one of {', '.join(WIDTHS)}_rpy, got {name!r}")
    return name


def width(name: str) -> int:
    """Return the number of dimensions of a rotation type."""
    return WIDTHS[_parse(name)[0]]


def identity(name: str) -> np.ndarray:
    """Return the rotation by 0 as (width,) float32."""
    numbers = {"quaternion": [1, 0, 0, 0], "matrix": np.eye(3).ravel(), "rotation_6d": [1, 0, 0, 0, 1, 0]}
    return np.asarray(numbers.get(_parse(name)[0], [0, 0, 0]), dtype=np.float32)


def to_six(values: np.ndarray, name: str) -> np.ndarray:
    """Convert (..., width) of a rotation type to (..., 6). A rotation_6d is returned unchanged."""
    if name == "rotation_6d":
        return values
    flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
    columns = _type(name).to_matrix(flat)[:, :, :2]
    return columns.transpose(0, 2, 1).reshape(*values.shape[:-1], 6)


def from_six(values: np.ndarray, name: str) -> np.ndarray:
    """Invert `to_six`. Six numbers that are not a rotation are orthonormalised by Gram-Schmidt.

    Quaternions have a real part of at least 0, axis-angles an angle of at most pi.
    """
    if name == "rotation_6d":
        return values
    first, second = np.split(values.reshape(-1, 6).astype(np.float64), 2, axis=1)
    x = first / np.maximum(np.linalg.norm(first, axis=1, keepdims=True), 1e-12)
    second = second - (x * second).sum(1, keepdims=True) * x
    y = second / np.maximum(np.linalg.norm(second, axis=1, keepdims=True), 1e-12)
    matrices = np.stack([x, y, np.cross(x, y)], axis=2)
    return _type(name).from_matrix(matrices).reshape(*values.shape[:-1], width(name))


def _parse(name: str) -> tuple[str, str]:
    if name.startswith("euler_angles_"):
        letters = name.removeprefix("euler_angles_")
        return "euler_angles", letters.translate(str.maketrans("rpy", "XYZ"))
    return name, ""


def _type(name: str) -> _Type:
    base, axes = _parse(name)
    if base == "matrix":
        return _Type(lambda v: v.reshape(-1, 3, 3), lambda m: m.reshape(-1, 9))
    # Imported here: a policy without rotations to convert needs no scipy.
    from scipy.spatial.transform import Rotation

    if base == "axis_angle":
        return _Type(lambda v: Rotation.from_rotvec(v).as_matrix(), lambda m: Rotation.from_matrix(m).as_rotvec())
    if base == "quaternion":
        return _Type(
            lambda v: Rotation.from_quat(v, scalar_first=True).as_matrix(),
            lambda m: Rotation.from_matrix(m).as_quat(canonical=True, scalar_first=True),
        )
    return _Type(
        lambda v: Rotation.from_euler(axes, v).as_matrix(),
        lambda m: Rotation.from_matrix(m).as_euler(axes),
    )
