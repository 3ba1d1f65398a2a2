"""examples/vos: what is written is read, and bad data is one error that names the file."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples.shared.commands import DataError, cli
from examples.shared.images import read_index, save_index, voc_palette
from examples.vos import figures, infer, pictures, study, synthetic, train
from examples.vos.data import read_clip, read_clips
from tests.support import vos_clips

pytestmark = pytest.mark.promise("examples")
TINY, written = vos_clips.TINY, vos_clips.written


@pytest.fixture
def data(written, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def test_what_is_written_is_read(written):
    clips = read_clips(written, "train")
    assert [clip.name for clip in clips] == ["train-000", "train-001", "train-002"] and all(len(clip) == 5 for clip in clips)
    for clip in clips:
        mask = clip.first_mask()
        assert mask.shape == (clip.objects, 40, 48) and mask.flatten(1).any(1).all() and mask.sum(0).max() == 1
        assert clip.image(0).shape == (3, 40, 48) and clip.annotated() == list(range(5))


def test_objects_are_of_the_size_asked_for():
    def area(size):
        labels = [synthetic.clip(np.random.default_rng(i), 1, 64, 96, size)[1][0] for i in range(8)]
        return sum((label > 0).sum() / label.max() for label in labels)  # of an object

    assert 0.15 < area(0.5) / area(1) < 0.4


def test_a_figure_swings_before_a_ground_that_passes():
    pictures, labels = figures.figure(np.random.default_rng(0), 12, 64, 112)
    assert {picture.shape for picture in pictures} == {(64, 112, 3)} and {label.shape for label in labels} == {(64, 112)}
    shares = [label.mean() for label in labels]
    assert 0.02 < min(shares) and max(shares) < 0.3 and {label.max() for label in labels} == {1}
    first, last = (pictures[t].astype(float)[(labels[0] == 0) & (labels[-1] == 0)] for t in (0, -1))
    assert np.abs(first - last).mean() > 10  # of 255: another part of the ground
    first, last = (labels[t].astype(bool) for t in (0, -1))
    assert 0.05 < (first & last).sum() / (first | last).sum() < 0.95


def paths(data, name="train-001"):
    return data / "JPEGImages" / "480p" / name, data / "Annotations" / "480p" / name


def repaint(path, change):
    image = Image.open(path)
    palette = image.getpalette()
    label = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)
    changed = Image.fromarray(change(label).numpy()).convert("P")
    changed.putpalette(palette)
    changed.save(path)


def missing_first(images, annotations):
    (annotations / "00000.png").unlink()
    return annotations / "00000.png"


def no_frames(images, annotations):
    shutil.rmtree(images)
    return images


def annotation_of_another_size(images, annotations):
    repaint(annotations / "00000.png", lambda label: label[:, :-3].contiguous())
    return annotations / "00000.png"


def frame_of_another_size(images, annotations):
    Image.open(images / "00002.jpg").resize((10, 10)).save(images / "00002.jpg")
    return images / "00002.jpg"


def no_object(images, annotations):
    repaint(annotations / "00000.png", torch.zeros_like)
    return annotations / "00000.png"


def colours_instead_of_a_palette(images, annotations):
    Image.open(annotations / "00000.png").convert("RGB").save(annotations / "00000.png")
    return annotations / "00000.png"


@pytest.mark.parametrize(
    "spoil, says",
    [
        (missing_first, "no annotation"),
        (no_frames, "no .jpg or .png frame here"),
        (annotation_of_another_size, "is 45x40, its frame 48x40"),
        (frame_of_another_size, "is 10x10, the first frame 48x40"),
        (no_object, "no object in the first frame"),
        (colours_instead_of_a_palette, "expected a palette PNG, got mode RGB"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_data_is_one_error_that_names_the_file(data, spoil, says):
    path = spoil(*paths(data))
    with pytest.raises(DataError, match=says) as error:
        read_clips(data, "train")
    assert str(error.value).startswith(str(path))


def test_a_palette_index_beyond_the_objects(data):
    path = paths(data)[1] / "00003.png"
    repaint(path, lambda label: label + 4)
    with pytest.raises(DataError, match=r"object \d, which the first frame does not show") as error:
        read_clip(data, "train-001").mask(3)
    assert str(error.value).startswith(str(path))


def test_gaps_in_the_numbers_of_objects(data):
    """They are kept: what is predicted has the numbers of the annotation, by which others will compare it."""
    before = read_clip(data, "train-001")
    masks = [before.mask(t) for t in range(len(before))]
    for path in paths(data)[1].glob("*.png"):
        repaint(path, lambda label: label * 3)
    clip = read_clip(data, "train-001")
    assert clip.ids == tuple(3 * o for o in before.ids)
    assert all(torch.equal(clip.mask(t), mask) for t, mask in enumerate(masks))
    pictures.save_pictures(data / "out", clip, [study.copied(clip)] * len(clip))
    assert read_index(data / "out" / "labels" / "train-001" / "00002.png").tolist() == read_index(paths(data)[1] / "00000.png").tolist()


def test_what_is_written_of_a_frame_has_its_name(data):
    """By which others find the annotation to compare it with."""
    for folder, suffix in zip(paths(data), ("jpg", "png"), strict=True):
        for t in (4, 3, 2, 1):
            (folder / f"{t:05}.{suffix}").rename(folder / f"{5 * t:05}.{suffix}")
    clip = read_clip(data, "train-001")
    pictures.save_pictures(data / "out", clip, [study.copied(clip)] * len(clip))
    for folder in (data / "out" / "train-001", data / "out" / "labels" / "train-001"):
        assert sorted(path.name for path in folder.iterdir()) == [f"{5 * t:05}.png" for t in range(5)]


def test_void_is_background(data):
    path = paths(data)[1] / "00000.png"
    before = read_clip(data, "train-001")
    masks = {t: before.mask(t) for t in (0, 3)}

    def with_void(label):
        label = label.clone()
        label[:4] = 255
        return label

    for name in ("00000.png", "00003.png"):
        repaint(path.with_name(name), with_void)
    clip = read_clip(data, "train-001")
    assert clip.objects == before.objects
    for t, mask in masks.items():
        assert torch.equal(clip.mask(t)[:, 4:], mask[:, 4:]) and not clip.mask(t)[:, :4].any()


@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_file_of_0_and_255_is_the_mask_of_one_object(data, mode):
    before, folder = read_clip(data, "train-001"), paths(data)[1]
    masks = [before.mask(t).amax(0) for t in range(len(before))]
    for path in folder.glob("*.png"):
        Image.fromarray(((read_index(path) > 0) * 255).astype(np.uint8)).convert(mode).save(path)
    clip = read_clip(data, "train-001")
    assert clip.objects == 1
    assert all(torch.equal(clip.mask(t)[0], mask) for t, mask in enumerate(masks))


def test_nothing_but_void_is_no_object(data):
    """In a palette PNG 255 is void, whatever else the file has."""
    path = paths(data)[1] / "00000.png"
    repaint(path, lambda label: (label > 0).to(torch.uint8) * 255)
    with pytest.raises(DataError, match="no object in the first frame"):
        read_clip(data, "train-001")


def test_frames_may_be_png(data):
    before, folder = read_clip(data, "train-001"), paths(data)[0]
    pictures = [before.image(t) for t in range(len(before))]
    for path in folder.glob("*.jpg"):
        Image.open(path).save(path.with_suffix(".png"))
        if path.stem != "00002":
            path.unlink()
    with pytest.raises(DataError, match="00002 is there twice, as .jpg and .png"):
        read_clip(data, "train-001")
    (folder / "00002.jpg").rename(folder / "00002.JPG")
    (folder / "00002.png").unlink()
    clip = read_clip(data, "train-001")
    assert [path.name for path in clip.frames] == ["00000.png", "00001.png", "00002.JPG", "00003.png", "00004.png"]
    assert all(torch.equal(clip.image(t), picture) for t, picture in enumerate(pictures)) and clip.annotated() == before.annotated()


@pytest.mark.parametrize("name", ["{}", "frame_{}"])
def test_frames_are_in_the_order_of_their_numbers(data, name):
    for folder, suffix in zip(paths(data), ("jpg", "png"), strict=True):
        for t in range(5):
            (folder / f"{t:05}.{suffix}").rename(folder / f"{name.format(5 * t)}.{suffix}")
    clip = read_clip(data, "train-001")
    assert [frame.stem for frame in clip.frames] == [name.format(5 * t) for t in range(5)] and clip.annotated() == list(range(5))


def test_clips_with_names_of_two_words(data):
    for folder in paths(data):
        folder.rename(folder.with_name("a street"))
    (data / "ImageSets" / "2017" / "train.txt").write_text("a street \r\n\n")
    assert [clip.name for clip in read_clips(data, "train")] == ["a street"]


def test_labels_of_many_objects_have_vocs_palette_in_8_bits(tmp_path):
    index = np.arange(255, dtype=np.uint8).reshape(15, 17)
    save_index(index, tmp_path / "many.png")
    save_index(index.clip(max=3), tmp_path / "few.png")
    for name in ("many", "few"):  # nothing is left out of the palette for want of a pixel
        image = Image.open(tmp_path / f"{name}.png")
        assert image.mode == "P" and np.array(image.getpalette(), np.uint8).reshape(-1, 3).tolist() == voc_palette().tolist()
        assert (tmp_path / f"{name}.png").read_bytes()[24] == 8  # the bit depth of its header
    assert np.array_equal(read_index(tmp_path / "many.png"), index)


def test_objects_beyond_the_fifteenth_have_colours_of_their_own():
    label = torch.arange(64).view(8, 8).repeat_interleave(24, 0).repeat_interleave(24, 1)
    inside = np.array(pictures.overlay(torch.zeros(3, *label.shape), label))[12::24, 12::24]
    assert len(np.unique(inside.reshape(-1, 3), axis=0)) == 64


@pytest.mark.parametrize("kind", [0, 1], ids=["jpeg", "png"])
def test_a_truncated_file(data, kind):
    folder = paths(data)[kind]
    path = folder / ("00002.jpg" if kind == 0 else "00002.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    clip = read_clip(data, "train-001")
    with pytest.raises(DataError, match="cannot be read") as error:
        clip.image(2) if kind == 0 else clip.mask(2)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("content, says", [(None, "no such file"), ("", "names no clip"), ("nothing-here", "no .jpg or .png frame here")])
def test_a_list_of_clips_that_is_wrong(data, content, says):
    names = data / "ImageSets" / "2017" / "train.txt"
    names.unlink() if content is None else names.write_text(content)
    with pytest.raises(DataError, match=says):
        read_clips(data, "train")


@pytest.mark.parametrize("command", [train, infer, study])
def test_a_command_says_in_one_line_what_is_wrong_with_the_data(data, tmp_path, monkeypatch, command):
    train.Trainer(train.Run(TINY), read_clips(data, "train")).save(tmp_path / "checkpoint.pt")
    path = missing_first(*paths(data, "val-000"))
    arguments = ["--data", data, "--out", tmp_path / "out"]
    arguments += {train: [], infer: ["--checkpoint", tmp_path / "checkpoint.pt"], study: []}[command]
    if command is train:
        path.parents[3].joinpath("ImageSets", "2017", "train.txt").write_text("val-000")
    with pytest.raises(SystemExit) as end:
        cli(command.main, [str(a) for a in arguments])
    assert end.value.code == f"{path}: no annotation"


def test_training_reads_no_annotation_but_the_first(data):
    for name in ("train-000", "train-001", "train-002"):
        for path in paths(data, name)[1].glob("*.png"):
            if path.stem != "00000":
                path.unlink()
    trainer = train.Trainer(train.Run(TINY), read_clips(data, "train"))
    assert math.isfinite(trainer.advance()[1])
