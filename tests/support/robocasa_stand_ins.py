"""RoboCasa GR1 without its download: a copy of the installed package in which every missing file has a stand-in.

    .venv-robocasa/bin/python tests/simulators/robocasa_stand_ins.py FOLDER
    PYTHONPATH=FOLDER .venv-robocasa/bin/python ...

The package brings code, robot, scenes and the MJCF of its fixtures; meshes, textures and all movable objects are a download.
Stand-ins are boxes and cylinders of a plausible size under the names that the package expects, so that its own code builds,
renders and judges a scene. They prove the way through robot, camera and keys, and nothing about success rates.
"""

import colorsys
import importlib.util
import re
import shutil
import sys
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

PACKAGE = "robocasa_gr1"
REGISTRIES = ("objaverse", "sketchfab", "lightwheel")
"""Those that the 88 tasks draw from."""
INSTANCES = 2
"""Of each category: split A takes the first half, split B the second."""

SMALL = (0.025, 0.025, 0.035)
HALF_SIZES = {
    **dict.fromkeys(("placemat", "tray", "cutting_board"), (0.15, 0.11, 0.006)),
    "plate": (0.1, 0.1, 0.008),
    **dict.fromkeys(("bowl", "pan", "pot"), (0.08, 0.08, 0.035)),
    **dict.fromkeys(("basket", "cardboard_box"), (0.1, 0.09, 0.05)),
    **dict.fromkeys(("tiered_shelf", "tiered_basket"), (0.13, 0.1, 0.11)),
}
"""Half sizes in metres, as they are to be after the package's own scaling; everything else is SMALL."""
HOLLOW = ("bowl", "pan", "pot", "basket", "cardboard_box")
TIERED = ("tiered_shelf", "tiered_basket")


def furnish(folder: Path) -> Path:
    """Write the furnished copy into `folder`, which must not hold one yet, and return `folder`."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    copy = folder / PACKAGE
    shutil.copytree(Path(spec.origin).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assets = copy / "models" / "assets"
    for source in [*copy.rglob("*.py"), *copy.rglob("*.yaml")]:
        for name in re.findall(r"textures/[\w/]+\.png", source.read_text(encoding="utf-8")):
            _picture(assets / name)
    for model in assets.rglob("*.xml"):
        _complete(model)
    sys.path.insert(0, str(folder))
    for category, registries in _categories(copy).items():
        for registry in REGISTRIES:
            if registry in registries:
                _objects(assets / "objects", category, registry, **registries[registry])
    return folder


def _categories(copy: Path) -> dict[str, dict]:
    """The package's table of categories as it is written, before the package turns it into its own classes."""
    spec = importlib.util.spec_from_file_location("categories", copy / "models" / "objects" / "kitchen_objects.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OBJ_CATEGORIES


def _complete(model: Path) -> None:
    """Every mesh and texture that a fixture's MJCF names and that is not there.

    A mesh becomes the boxes of the collision geoms beside it, so that what is seen is what is touched.
    """
    root = ElementTree.parse(model).getroot()
    for texture in root.iter("texture"):
        if texture.get("file"):
            _picture(model.parent / texture.attrib["file"])
    files = {mesh.get("name"): mesh for mesh in root.iter("mesh") if mesh.get("file")}
    for body in root.iter("body"):
        boxes = [
            (_numbers(geom.get("pos", "0 0 0")), _numbers(geom.attrib["size"]))
            for geom in body.findall("geom")
            if geom.get("type") == "box" and "size" in geom.attrib
        ]
        for geom in body.findall("geom"):
            mesh = files.pop(geom.get("mesh"), None)
            if mesh is not None:
                scale = _numbers(mesh.get("scale", "1 1 1"))
                _mesh(model.parent / mesh.attrib["file"], boxes or [(np.zeros(3), np.full(3, 0.01))], scale)
    for mesh in files.values():
        _mesh(model.parent / mesh.attrib["file"], [(np.zeros(3), np.full(3, 0.01))], np.ones(3))


def _mesh(path: Path, boxes: list[tuple[np.ndarray, np.ndarray]], scale: np.ndarray) -> None:
    if path.exists():
        return
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))
    lines = []
    for number, (centre, half) in enumerate(boxes):
        lines += [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in (centre + corners * half) / scale]
        lines += ["f " + " ".join(str(8 * number + corner + 1) for corner in quad) for quad in quads]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _picture(path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(int(255 * c) for c in _colour(path.name, 0.25, 0.8))).save(path)


def _objects(
    objects: Path, category: str, registry: str, model_folders: tuple = (), scale: object = 1.0, **_: object
) -> None:
    half = np.array(HALF_SIZES.get(category, SMALL)) / np.array(scale, float)
    for folder in model_folders or (f"{registry}/{category}",):
        for instance in range(INSTANCES):
            path = objects / folder / f"stand_in_{instance}" / "model.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_object(category, instance, half), encoding="utf-8")


def _object(category: str, instance: int, half: np.ndarray) -> str:
    """The MJCF of one object: what is touched (group 0), what is seen (group 1), and the sites that tell its size."""
    x, y, z = half
    wall = 0.1 * z if category in TIERED else min(0.1 * x, z)
    floor = ("box", (0, 0, wall - z), (x, y, wall))
    if category in HOLLOW:
        sides = [(sign * (x - wall), 0, 0, wall, y) for sign in (-1, 1)]
        sides += [(0, sign * (y - wall), 0, x, wall) for sign in (-1, 1)]
        parts = [floor, *(("box", (px, py, 0), (sx, sy, z)) for px, py, _, sx, sy in sides)]
    elif category in TIERED:
        posts = [("box", (sign * (x - wall), 0, 0), (wall, y, z)) for sign in (-1, 1)]
        parts = [floor, ("box", (0, 0, wall), (x, y, wall)), *posts]
    else:
        parts = [("box", (0, 0, 0), (x, y, z))] if category in HALF_SIZES else [("cylinder", (0, 0, 0), (x, z))]
    rgba = " ".join(f"{c:.3f}" for c in (*_colour(f"{category} {instance}", 0.7, 0.85), 1))
    geoms = []
    for kind, position, size in parts:
        where = f'type="{kind}" pos="{_text(position)}" size="{_text(size)}"'
        geoms.append(f'<geom {where} group="0" rgba="0.5 0 0 0.5"/>')
        geoms.append(f'<geom {where} group="1" rgba="{rgba}" contype="0" conaffinity="0" mass="0"/>')
    if category in TIERED:
        for level, bottom in enumerate((2 * wall - z, 2 * wall)):
            top = 0 if level == 0 else z
            where = f'pos="{_text((0, 0, (bottom + top) / 2))}" size="{_text((x, y, (top - bottom) / 2))}"'
            ghost = 'group="1" rgba="0 0 0 0" contype="0" conaffinity="0" mass="0"'
            geoms.append(f'<geom name="spawn_{level}" type="box" {where} {ghost}/>')
    sites = {"bottom_site": (0, 0, -z), "top_site": (0, 0, z), "horizontal_radius_site": (x, y, 0)}
    marks = "".join(
        f'<site name="{name}" pos="{_text(at)}" rgba="0 0 0 0" size="0.005"/>' for name, at in sites.items()
    )
    body = f'<body><body name="object">{"".join(geoms)}</body>{marks}</body>'
    return f'<mujoco model="{category}"><asset/><worldbody>{body}</worldbody></mujoco>\n'


def _colour(name: str, saturation: float, value: float) -> tuple[float, float, float]:
    return colorsys.hsv_to_rgb(zlib.crc32(name.encode()) % 360 / 360, saturation, value)


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), float)


def _text(values: tuple) -> str:
    return " ".join(f"{value:.6f}" for value in values)


if __name__ == "__main__":
    print(furnish(Path(sys.argv[1])))
