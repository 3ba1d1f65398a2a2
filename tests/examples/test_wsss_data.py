"""examples/wsss: what is written is read, and bad data is one error that names the file."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

from examples.shared.commands import DataError
from examples.shared.images import voc_palette
from examples.wsss import synthetic
from examples.wsss.data import IGNORE, VOC_CLASSES, read_scenes
from tests.support import wsss_scenes

pytestmark = pytest.mark.promise("examples")
TINY, data, written = wsss_scenes.TINY, wsss_scenes.data, wsss_scenes.written
CLASSES = synthetic.CLASSES


def test_what_is_written_is_read(written):
    data = read_scenes(written, "train")
    assert data.classes == CLASSES and [scene.name for scene in data.scenes[:2]] == ["train-00000", "train-00001"] and len(data) == 8
    for scene in data.scenes:
        mask = scene.mask()
        shown = set(mask.unique().tolist()) - {0, IGNORE}
        assert shown == {1 + c for c in scene.labels} and scene.present().nonzero().flatten().tolist() == list(scene.labels)
        assert IGNORE in mask and scene.shape() == (32, 32) and scene.image(16).shape == (3, 16, 16)


def test_borders_part_every_two_classes(written):
    mask = read_scenes(written, "train").scenes[0].mask()
    for one, two in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        assert ((one == two) | (one == IGNORE) | (two == IGNORE)).all()


def test_classes_are_those_of_voc_where_none_are_named(data):
    (data / "classes.txt").unlink()
    with pytest.raises(DataError, match="is none of the 20: aeroplane"):
        read_scenes(data, "train")
    for path in (data / "Annotations").glob("*.xml"):
        path.write_text("<annotation><object><name>sheep</name></object></annotation>")
    assert {scene.labels for scene in read_scenes(data, "train").scenes} == {(VOC_CLASSES.index("sheep"),)}


def test_names_of_two_words(data):
    names = [*CLASSES[:-1], "traffic light"]
    (data / "classes.txt").write_text("".join(f"{name} \r\n" for name in names) + "\n")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml"), ("SegmentationClass", "png")):
        (data / kind / f"train-00001.{suffix}").rename(data / kind / f"a street.{suffix}")
    (data / "Annotations" / "a street.xml").write_text("<annotation><object><name>traffic light</name></object></annotation>")
    (data / "ImageSets" / "Segmentation" / "train.txt").write_text("a street\n\n")
    scenes = read_scenes(data, "train")
    assert scenes.classes == tuple(names) and [(scene.name, scene.labels) for scene in scenes.scenes] == [("a street", (5,))]
    assert scenes.scenes[0].mask().shape == (32, 32)


def test_more_classes_than_indices_are_refused(data):
    (data / "classes.txt").write_text("".join(f"class {i}\n" for i in range(255)))
    with pytest.raises(DataError, match="names 255 classes, but an index PNG holds 254 beside the background and what is ignored"):
        read_scenes(data, "train")


def test_the_palette_is_vocs():
    assert voc_palette()[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "folder, name, content, says",
    [
        ("Annotations", "train-00001.xml", "<annotation></annotation>", "image without labels"),
        ("Annotations", "train-00001.xml", "<annotation><object><name>rin", "cannot be read"),
        ("Annotations", "train-00001.xml", "<annotation><object><name>unicorn</name></object></annotation>", "'unicorn' is none of the 6"),
        ("Annotations", "train-00001.xml", None, "cannot be read"),
        ("JPEGImages", "train-00001.jpg", None, "no such image"),
        ("ImageSets/Segmentation", "train.txt", None, "no such file"),
        ("ImageSets/Segmentation", "train.txt", "", "names no image"),
        ("", "classes.txt", "", "names no class"),
    ],
)
def test_a_bad_set_is_one_error_that_names_the_file(data, folder, name, content, says):
    path = data / folder / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DataError, match=says) as error:
        read_scenes(data, "train")
    assert str(error.value).startswith(f"{path}: ")


def class_beyond(image):
    return image.point(lambda index: 7 if index == 0 else index)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (class_beyond, "class index 7, but there are 6 classes"),
        (lambda image: image.convert("RGB"), "expected a palette PNG, got mode RGB"),
        (lambda image: image.resize((30, 32)), "is 30x32, its image 32x32"),
    ],
    ids=["class beyond", "colours", "size"],
)
def test_a_bad_mask_is_one_error_that_names_the_file(data, spoil, says):
    scene = read_scenes(data, "train").scenes[1]
    spoil(Image.open(scene.mask_path)).save(scene.mask_path)
    with pytest.raises(DataError, match=says) as error:
        scene.mask()
    assert str(error.value).startswith(f"{scene.mask_path}: ")


@pytest.mark.parametrize("kind", ["path", "mask_path"])
def test_a_truncated_file(data, kind):
    scene = read_scenes(data, "train").scenes[1]
    path = getattr(scene, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read") as error:
        scene.image(32) if kind == "path" else scene.mask()
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"size": 60}, "size: expected a multiple of the patch, 8, got 60"),
        ({"heads": 5}, "width: expected a multiple of the 5 heads, got 24"),
        ({"masking_rate": 1.5}, "masking_rate: expected a probability"),
    ],
)
def test_an_impossible_setting_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY, **change)
