import json
import tracemalloc

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from agra.diagnostics.samples.masks import read_masks, with_masks

HEIGHT, WIDTH = 16, 20
BOX = np.zeros((HEIGHT, WIDTH), bool)
BOX[4:10, 3:9] = True
CORNERS = [(3, 4), (9, 4), (9, 10), (3, 10)]


def coco(**annotation):
    return {
        "images": [{"id": 7, "file_name": "some/folder/a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "hand"}, {"id": 2, "name": "box"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, **annotation}],
    }


def agree(mask, expected, pixels=0):
    """Outlines through the middle of pixels may be drawn with their border."""
    assert (mask != expected).sum() <= pixels


def compressed():
    packed = coco_mask.encode(np.asfortranarray(BOX.astype(np.uint8)))
    return {"size": packed["size"], "counts": packed["counts"].decode()}


def plain():
    flat = BOX.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(np.concatenate([[0], edges])).tolist()}


@pytest.mark.parametrize(
    ("annotation", "pixels"),
    [
        ({"segmentation": compressed()}, 0),
        ({"segmentation": plain(), "iscrowd": 1}, 0),
        ({"segmentation": [[x for corner in CORNERS for x in corner]]}, 13),
        ({"bbox": [3, 4, 6, 6]}, 0),
    ],
    ids=["compressed", "plain", "polygon", "box"],
)
def test_coco(tmp_path, annotation, pixels):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco(**annotation)))
    agree(read_masks(path)["a.png"], BOX, pixels)
    assert not read_masks(path, labels=["box"])["a.png"].any()


def test_cvat(tmp_path):
    path = tmp_path / "cvat.xml"
    runs = "1,2,1,0,4"  # of a box of 4 x 2: .XX.|....
    shapes = {
        "polygon": '<polygon label="hand" points="' + ";".join(f"{x},{y}" for x, y in CORNERS) + '"/>',
        "box": '<box label="hand" xtl="3" ytl="4" xbr="9" ybr="10"/>',
        "mask": f'<mask label="hand" rle="{runs}" left="5" top="6" width="4" height="2"/>',
    }
    for kind, shape in shapes.items():
        head = f'<image id="0" name="a.png" width="{WIDTH}" height="{HEIGHT}">'
        path.write_text(f"<annotations><version>1.1</version>{head}{shape}</image></annotations>")
        mask = read_masks(path)["a.png"]
        if kind == "mask":
            assert np.argwhere(mask).tolist() == [[6, 6], [6, 7]]
        else:
            agree(mask, BOX, 13 if kind == "polygon" else 0)
        assert not read_masks(path, labels=["lid"])["a.png"].any()


def test_labelme(tmp_path):
    for name, kind, points in (("a", "polygon", CORNERS), ("b", "rectangle", [(9, 10), (3, 4)])):
        content = {
            "imagePath": f"..\\pictures\\{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH,
            "shapes": [{"label": "hand", "points": points, "shape_type": kind}],
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    masks = read_masks(tmp_path)
    assert set(masks) == {"a.png", "b.png"}
    agree(masks["a.png"], BOX, 13)
    agree(masks["b.png"], BOX)
    assert set(read_masks(tmp_path / "a.json")) == {"a.png"}


def test_masks_find_their_frames(make_sample):
    sample = make_sample(trial="kitchen/3", step=12, masked=False)
    assert sample.image_names()[1] == "kitchen-3-step00012-frame1.png"
    (annotated,) = with_masks([sample], {sample.image_names()[1]: BOX})
    assert annotated.masks.any(axis=(1, 2)).tolist() == [False, True, False]
    np.testing.assert_array_equal(annotated.masks[1], BOX)
    with pytest.raises(ValueError, match=r"expected names such as kitchen-3-step00012-frame0\.png, got \['x\.png'\]"):
        with_masks([sample], {"x.png": BOX})
    with pytest.raises(ValueError, match=r"expected \(16, 20\) pixels, got \(8, 20\)"):
        with_masks([sample], {sample.image_names()[0]: BOX[:8]})


def test_what_is_not_an_annotation_is_named(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_masks(path)
    for text, message in (("{", "not JSON"), ("[]", "got a list"), ('{"images": []}', "no annotations, categories")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_masks(path)
    (tmp_path / "x.xml").write_text("<kml/>")
    with pytest.raises(ValueError, match="got <kml>"):
        read_masks(tmp_path / "x.xml")


def image(**changes):
    one = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH} | changes
    return {name: value for name, value in one.items() if value is not None}


def runs(counts, size=(HEIGHT, WIDTH)):
    return {"segmentation": {"size": list(size), "counts": counts}}


ODD = {
    "no height": {"images": [image(height=None)]},
    "images as a number": {"images": 5},
    "images of texts": {"images": ["a"]},
    "a height of 10^9": {"images": [image(height=10**9)]},
    "many large images": {"images": [image(id=i, height=16384, width=16384) for i in range(9)]},
    "a negative height": {"images": [image(height=-1)]},
    "box of texts": {"annotations": [{"bbox": ["a", "b", "c", "d"]}]},
    "box of infinity": {"annotations": [{"bbox": [0, 0, 1e400, 1]}]},
    "runs of 10^12": {"annotations": [runs([0, 10**12])]},
    "negative runs": {"annotations": [runs([-5, HEIGHT * WIDTH + 5])]},
    "runs of another size": {"annotations": [runs([0, 10**9], size=(10**5, 10**4))]},
    "packed runs of nonsense": {"annotations": [runs("\x7f\x7f")]},
    "runs as a number": {"annotations": [runs(7)]},
    "odd polygon": {"annotations": [{"segmentation": [[1, 2, 3]]}]},
    "polygon beyond": {"annotations": [{"segmentation": [[1, 2, 3, 4, 1e30, 5]]}]},
    "annotations null": {"annotations": None},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_coco_files_are_one_line_and_take_no_memory(tmp_path, name):
    path = tmp_path / "odd.json"
    content = coco(bbox=[3, 4, 6, 6])
    for key, value in ODD[name].items():
        if key == "annotations" and value is not None:
            value = [{"id": 1, "image_id": content["images"][0]["id"], "category_id": 1} | one for one in value]
        content[key] = value
    path.write_text(json.dumps(content))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"odd\.json: "):
            read_masks(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "shape",
    [
        '<mask rle="99999999999" left="0" top="0" width="4" height="2"/>',
        '<mask rle="-1,9" left="0" top="0" width="4" height="2"/>',
        '<mask rle="8" left="-3" top="0" width="4" height="2"/>',
        '<mask rle="8" left="0"/>',
        '<box xtl="a" ytl="0" xbr="1" ybr="1"/>',
        '<polygon points="1"/>',
    ],
)
def test_odd_cvat_files_are_one_line(tmp_path, shape):
    path = tmp_path / "odd.xml"
    path.write_text(f'<annotations><image name="a.png" width="{WIDTH}" height="{HEIGHT}">{shape}</image></annotations>')
    with pytest.raises(ValueError, match=r"odd\.xml: "):
        read_masks(path)


@pytest.mark.parametrize("side", ["-1", "x", "99999", "1e3", ""])
def test_odd_sizes_are_one_line(tmp_path, side):
    (tmp_path / "odd.xml").write_text(f'<annotations><image name="a" width="{side}" height="9"/></annotations>')
    (tmp_path / "odd.json").write_text(
        json.dumps({"shapes": [], "imagePath": "a", "imageHeight": side, "imageWidth": 9})
    )
    for name in ("odd.xml", "odd.json"):
        with pytest.raises(ValueError, match=rf"{name}: expected heights and widths of 1 to 16384"):
            read_masks(tmp_path / name)
