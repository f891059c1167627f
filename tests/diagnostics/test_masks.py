import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from agra.diagnostics.masks import read_masks, with_masks

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


def agree(found, expected, pixels=0):
    """Outlines through the middle of pixels may be drawn with their border."""
    assert (found != expected).sum() <= pixels


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
        found = read_masks(path)["a.png"]
        if kind == "mask":
            assert np.argwhere(found).tolist() == [[6, 6], [6, 7]]
        else:
            agree(found, BOX, 13 if kind == "polygon" else 0)
        assert not read_masks(path, labels=["lid"])["a.png"].any()


def test_labelme(tmp_path):
    for name, kind, points in (("a", "polygon", CORNERS), ("b", "rectangle", [(9, 10), (3, 4)])):
        content = {
            "imagePath": f"..\\pictures\\{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH,
            "shapes": [{"label": "hand", "points": points, "shape_type": kind}],
        }  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = read_masks(tmp_path)
    assert set(found) == {"a.png", "b.png"}
    agree(found["a.png"], BOX, 13)
    agree(found["b.png"], BOX)
    assert set(read_masks(tmp_path / "a.json")) == {"a.png"}


def test_masks_find_their_frames(make_sample):
    sample = make_sample(trial="kitchen/3", step=12, masked=False)
    assert sample.image_names()[1] == "kitchen-3-step00012-frame1.png"
    (found,) = with_masks([sample], {sample.image_names()[1]: BOX})
    assert found.masks.any(axis=(1, 2)).tolist() == [False, True, False]
    np.testing.assert_array_equal(found.masks[1], BOX)
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
