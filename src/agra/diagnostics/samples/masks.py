"""Interaction masks of real frames (4.2.1), read from COCO, CVAT and labelme files.

The mask of a picture is the union of its annotations, or of those with certain labels. Pictures are matched by file
name (`ProbeSample.image_names`). The report's mask editor saves COCO.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from agra.diagnostics.samples.probe_sample import ProbeSample

MAX_SIDE = 16384
MAX_PIXELS = 2**31
"""Limits of an annotated picture's height and width, and of the pixels of a file in total. Sizes are checked before
memory is allocated."""


def read_masks(path: Path, labels: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Picture name to mask (H, W) bool: a COCO or labelme .json, a CVAT 1.1 .xml, or a folder of labelme files.

    Raises FileNotFoundError for a missing path, ValueError with the file's name for any other content.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise FileNotFoundError(f"{path}: no labelme .json files in this folder")
        return {name: mask for file in files for name, mask in _read(file, labels, labelme=True).items()}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a COCO or labelme .json, a CVAT .xml or a folder")
    return _read(path, labels)


def _read(path: Path, labels: Sequence[str] | None, *, labelme: bool = False) -> dict[str, np.ndarray]:
    """The masks of one file. Errors of malformed content become a ValueError with the file's name."""
    try:
        if path.suffix == ".xml":
            return _cvat(path, labels)
        content = _json(path)
        if labelme or "shapes" in content:
            return dict([_labelme(content, labels, path)])
        return _coco(content, labels, path)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{path}: not annotations in the format of COCO, CVAT or labelme ({error!r})") from error


def _blanks(sizes: Iterable[tuple[Any, Any]]) -> list[np.ndarray]:
    """Empty masks of (height, width). Raises ValueError for impossible sizes before any memory is allocated."""
    shapes = [tuple(int(side) if str(side).isdecimal() else 0 for side in size) for size in sizes]
    for size in shapes:
        if not all(1 <= side <= MAX_SIDE for side in size):
            raise ValueError(f"expected heights and widths of 1 to {MAX_SIDE}, got {size[0]} and {size[1]}")
    if sum(height * width for height, width in shapes) > MAX_PIXELS:
        raise ValueError(f"expected pictures of at most {MAX_PIXELS} pixels in total")
    return [np.zeros(size, bool) for size in shapes]


def with_masks(samples: Sequence[ProbeSample], masks: Mapping[str, np.ndarray]) -> list[ProbeSample]:
    """The samples with the masks of annotated frames replaced.

    Raises ValueError if no annotation belongs to a frame, or a mask has another size than its frame.
    """
    annotated, count = [], 0
    for sample in samples:
        frame_masks = sample.masks.copy()
        for frame, name in enumerate(sample.image_names()):
            mask = masks.get(name)
            if mask is None:
                continue
            if mask.shape != frame_masks.shape[1:]:
                raise ValueError(f"mask of {name}: expected {frame_masks.shape[1:]} pixels, got {mask.shape}")
            frame_masks[frame], count = mask, count + 1
        annotated.append(replace(sample, masks=frame_masks))
    if not count:
        raise ValueError(
            f"masks: none of the {len(masks)} annotated pictures belongs to a sample; expected names such as "
            f"{samples[0].image_names()[0]}, got {sorted(masks)[:3]}"
        )
    return annotated


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a COCO or labelme object, got a {type(content).__name__}")
    return content


def _coco(content: dict[str, Any], labels: Sequence[str] | None, path: Path) -> dict[str, np.ndarray]:
    """Read COCO: polygons, run lengths (plain or compressed), and boxes of annotations without a segmentation."""
    missing = {"images", "annotations", "categories"} - content.keys()
    if missing:
        raise ValueError(f"{path}: neither COCO nor labelme: no {', '.join(sorted(missing))}")
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {image["id"]: image for image in content["images"]}
    blanks = _blanks((image["height"], image["width"]) for image in images.values())
    masks = dict(zip(images, blanks, strict=True))
    for annotation in content["annotations"]:
        if labels is not None and names.get(annotation["category_id"]) not in labels:
            continue
        if annotation["image_id"] not in masks:
            raise ValueError(
                f"{path}: annotation {annotation.get('id')} refers to image {annotation['image_id']!r}, which is not "
                "listed"
            )
        mask = masks[annotation["image_id"]]
        mask |= _coco_shape(annotation, mask.shape)
    return {PurePath(image["file_name"]).name: masks[i] for i, image in images.items()}


def _coco_shape(annotation: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    segmentation = annotation.get("segmentation")
    if not segmentation:
        x, y, width, height = annotation["bbox"]
        return _filled("rectangle", [(x, y), (x + width, y + height)], shape)
    if isinstance(segmentation, dict):
        return _coco_runs(segmentation, shape)
    return np.any([_filled("polygon", list(zip(p[::2], p[1::2], strict=True)), shape) for p in segmentation], axis=0)


def _coco_runs(runs: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Read run lengths, which go down the columns.

    Their size is checked against the picture's before they are expanded.
    """
    if list(runs["size"]) != list(shape):
        raise ValueError(f"expected run lengths of an image of {list(shape)}, got {runs['size']}")
    counts = runs["counts"]
    if isinstance(counts, str):
        counts = _unpacked_runs(counts)
    if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != shape[0] * shape[1]:
        raise ValueError(f"expected run lengths that cover the {shape[0] * shape[1]} pixels of their image")
    return _from_runs(counts).reshape(shape[1], shape[0]).T


def _from_runs(runs: Sequence[int]) -> np.ndarray:
    """A flat mask from alternating runs of False and True, False first."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _unpacked_runs(text: str) -> list[int]:
    """Decode COCO's compressed run lengths: five bits a character, lowest first, each a difference to the run two
    before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"compressed run lengths: invalid character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        value -= (1 << shift) if bits & 16 else 0
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _cvat(path: Path, labels: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Read CVAT for images 1.1: polygons, boxes, ellipses and masks."""
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML ({error})") from error
    images = root.findall("image")
    if root.tag != "annotations" or not images:
        raise ValueError(f"{path}: expected CVAT for images 1.1, <annotations> with <image>s, got <{root.tag}>")
    masks = {}
    blanks = _blanks((image.attrib["height"], image.attrib["width"]) for image in images)
    for image, mask in zip(images, blanks, strict=True):
        for shape in image:
            if labels is None or shape.attrib.get("label") in labels:
                mask |= _cvat_shape(shape, mask.shape, path)
        masks[PurePath(image.attrib["name"]).name] = mask
    return masks


def _cvat_shape(shape: ElementTree.Element, size: tuple[int, ...], path: Path) -> np.ndarray:
    attributes = shape.attrib
    if shape.tag == "polygon":
        points = [tuple(map(float, point.split(","))) for point in attributes["points"].split(";")]
        return _filled("polygon", points, size)
    if shape.tag == "box":
        corners = [
            (float(attributes["xtl"]), float(attributes["ytl"])),
            (float(attributes["xbr"]), float(attributes["ybr"])),
        ]
        return _filled("rectangle", corners, size)
    if shape.tag == "ellipse":
        cx, cy, rx, ry = (float(attributes[name]) for name in ("cx", "cy", "rx", "ry"))
        return _filled("ellipse", [(cx - rx, cy - ry), (cx + rx, cy + ry)], size)
    if shape.tag == "mask":  # runs along the rows of its box, starting outside the mask
        left, top, width, height = (int(attributes[name]) for name in ("left", "top", "width", "height"))
        if not (left >= 0 and top >= 0 and 0 < width <= size[1] - left and 0 < height <= size[0] - top):
            raise ValueError(f"{path}: the box of a mask, {width} x {height} at {left}, {top}, lies outside its image")
        runs = [int(run) for run in attributes["rle"].split(",")]
        if min(runs) < 0 or sum(runs) != width * height:
            raise ValueError(f"{path}: the runs of a mask cover {sum(runs)} pixels, but its box has {width * height}")
        mask = np.zeros(size, bool)
        mask[top : top + height, left : left + width] = _from_runs(runs).reshape(height, width)
        return mask
    return np.zeros(size, bool)  # points, lines and tags cover nothing


def _labelme(content: dict[str, Any], labels: Sequence[str] | None, path: Path) -> tuple[str, np.ndarray]:
    """Read labelme: polygons, rectangles and circles of one picture."""
    missing = {"shapes", "imagePath", "imageHeight", "imageWidth"} - content.keys()
    if missing:
        raise ValueError(f"{path}: not a labelme file: no {', '.join(sorted(missing))}")
    (mask,) = _blanks([(content["imageHeight"], content["imageWidth"])])
    for shape in content["shapes"]:
        if labels is not None and shape["label"] not in labels:
            continue
        points, kind = [tuple(point) for point in shape["points"]], shape.get("shape_type", "polygon")
        if kind == "circle":
            (cx, cy), (x, y) = points
            radius = float(np.hypot(x - cx, y - cy))
            kind, points = "ellipse", [(cx - radius, cy - radius), (cx + radius, cy + radius)]
        if kind in ("polygon", "rectangle", "ellipse"):
            mask |= _filled(kind, points, mask.shape)
        elif kind == "mask":
            raise ValueError(f"{path}: raster masks of labelme are not supported; convert them to polygons or to COCO")
    return PurePath(content["imagePath"].replace("\\", "/")).name, mask


def _filled(kind: str, points: Iterable[tuple[float, ...]], shape: tuple[int, ...]) -> np.ndarray:
    """(H, W) bool: the pixels whose centre lies inside. The corners of a box may be in any order."""
    places = [(float(x) - 0.5, float(y) - 0.5) for x, y in points]
    if not all(abs(number) < 1e6 for place in places for number in place):
        raise ValueError(f"a {kind} has corners far outside any picture")
    if kind != "polygon":
        xs, ys = zip(*places, strict=True)
        low, high = (min(xs), min(ys)), (max(xs), max(ys))
        if kind == "rectangle":
            rows, columns = (np.arange(n) for n in shape)
            return ((rows >= low[1]) & (rows <= high[1]))[:, None] & ((columns >= low[0]) & (columns <= high[0]))
        places = [low, high]
    picture = Image.new("1", (shape[1], shape[0]))
    draw = ImageDraw.Draw(picture)
    (draw.polygon if kind == "polygon" else draw.ellipse)(places, fill=1)
    return np.array(picture)
