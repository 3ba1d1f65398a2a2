"""examples/wsss: masks are scored as VOC does, painted and filled as described, and thresholds are the best of the choices."""

from __future__ import annotations

import time

import pytest
import torch

from examples.wsss import evaluate, pseudo_masks
from examples.wsss.data import IGNORE, read_scenes
from examples.wsss.pseudo_masks import UNDECIDED, Thresholds, filled, pseudo_mask
from tests.support import wsss_scenes

pytestmark = pytest.mark.promise("examples")
written = wsss_scenes.written


def test_miou_as_voc_defines_it():
    truth = torch.tensor([[0, 0, 1], [1, 2, IGNORE]])
    mask = torch.tensor([[0, 1, 1], [1, 0, 2]])
    confusion = evaluate.score([mask], [truth], 3)
    assert confusion.iou()[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 0]) and confusion.iou()[3].isnan()
    assert confusion.miou() == pytest.approx(100 / 3)
    both = evaluate.score([mask, truth.clamp(max=3)], [truth, truth], 3)  # counts are summed before they are divided
    assert both.iou()[:3].tolist() == pytest.approx([3 / 5, 4 / 5, 1 / 2])


def test_a_pixel_predicted_as_ignored_is_a_miss():
    """It is a miss of its true class and a hit of none, also where the true class is the last."""
    truth = torch.tensor([[0, 0, 1, 1], [1, 2, 3, IGNORE]])
    mask = torch.tensor([[0, IGNORE, 1, IGNORE], [1, 2, IGNORE, IGNORE]])
    iou = evaluate.score([mask], [truth], 3).iou()
    assert iou.tolist() == pytest.approx([1 / 2, 2 / 3, 1, 0])


def test_token_accuracy_by_hand():
    truth = torch.tensor([[1, 1, 3], [0, IGNORE, 3]])
    maps = torch.zeros(3, 2, 3)
    maps[0, 0, 0], maps[1, 0, 1], maps[1, 0, 0] = 0.9, 0.2, 0.2  # inside class 0: means 0.45, 0.2, 0
    maps[1, 1, 2], maps[2, 0, 2] = 0.8, 0.5  # inside class 2: 0, 0.4, 0.25
    maps[2, 1, 0] = 9  # in the background: does not count
    assert evaluate.tokens_right(maps, truth) == (1, 2)


def test_the_likelier_class_is_painted_over_the_others():
    maps = torch.full((3, 4, 4), 0.1)
    maps[0, :2], maps[1, 1:3, :2], maps[2] = 1, 1, 5
    present, thresholds = torch.tensor([True, True, False]), Thresholds(1.0, 1.0)
    first = pseudo_mask(maps, torch.tensor([0.9, 0.6, 1.0]), present, thresholds)
    second = pseudo_mask(maps, torch.tensor([0.6, 0.9, 1.0]), present, thresholds)
    assert first.tolist() == [[1] * 4, [1] * 4, [2, 2, 0, 0], [0] * 4]
    assert second.tolist() == [[1] * 4, [2, 2, 1, 1], [2, 2, 0, 0], [0] * 4]


def test_holes_take_the_nearest_label():
    torch.manual_seed(0)
    label = torch.where(torch.rand(9, 13) < 0.1, torch.randint(0, 4, (9, 13)), UNDECIDED)
    label[:, 5] = UNDECIDED  # a column with none
    decided = (label != UNDECIDED).nonzero()
    done = filled(label)
    for y, x in (label == UNDECIDED).nonzero().tolist():
        distance = (decided - torch.tensor([y, x])).square().sum(1)
        nearest = {label[i, j].item() for i, j in decided[distance == distance.min()].tolist()}
        assert done[y, x].item() in nearest
    assert torch.equal(done[label != UNDECIDED], label[label != UNDECIDED])
    assert filled(torch.full((3, 3), UNDECIDED)).eq(0).all()


def test_holes_of_a_photograph_are_filled_at_once():
    """A photograph's masks are filled a thousand times in a sweep over thresholds."""
    torch.manual_seed(0)
    label = torch.where(torch.rand(375, 500) < 0.3, torch.randint(0, 4, (375, 500)), UNDECIDED)
    began = time.process_time()
    filled(label)
    assert time.process_time() - began < 0.2


def test_thresholds_are_the_best_of_the_choices(written):
    data = read_scenes(written, "train")
    maps = torch.stack([torch.stack([(scene.mask() == 1 + c).float() for c in range(6)]) for scene in data.scenes])
    seen = pseudo_masks.Seen(maps + 0.01, torch.ones(8, 6))
    thresholds = pseudo_masks.choose(seen, data)
    truth = [scene.mask() for scene in data.scenes]

    def miou(choice):
        return evaluate.score(pseudo_masks.pseudo_masks(seen, data, choice), truth, 6).miou()

    assert miou(thresholds) == max(map(miou, pseudo_masks.CHOICES)) > 90
