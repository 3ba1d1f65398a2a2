"""examples/vos/metrics.py on cases made by hand."""

from __future__ import annotations

import pytest
import torch

from examples.vos import metrics

pytestmark = pytest.mark.promise("examples")


def square(top, left, side, size=40):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.mark.parametrize(
    "predicted, true, J",
    [
        (square(5, 5, 10), square(5, 5, 10), 1.0),
        (square(5, 5, 10), square(5, 10, 10), 50 / 150),
        (square(5, 5, 10), square(20, 20, 10), 0.0),
        (square(0, 0, 0), square(20, 20, 10), 0.0),
        (square(0, 0, 0), square(0, 0, 0), 1.0),
    ],
)
def test_region_overlap(predicted, true, J):
    assert metrics.region(predicted, true) == pytest.approx(J)


def test_the_boundary_of_a_square_in_the_open():
    edges = metrics.edges(square(5, 5, 4, size=12))
    ring = square(4, 4, 5, size=12) & ~square(5, 5, 3, size=12)  # shifted up and left by the half pixel of "right and below"
    assert torch.equal(edges, ring)


def test_a_mask_to_the_border_has_no_boundary_there():
    everything = torch.ones(6, 7, dtype=torch.bool)
    assert not metrics.edges(everything).any()
    half = everything.clone()
    half[:, 3:] = False
    assert metrics.edges(half).nonzero()[:, 1].unique().tolist() == [2]


def test_dilation_is_by_a_disk():
    one = torch.zeros(9, 9, dtype=torch.bool)
    one[4, 4] = True
    grown = metrics.dilated(one, 2)
    assert grown.sum() == 13 and grown[4, 6] and grown[2, 4] and grown[3, 3] and not grown[2, 2] and not grown[4, 7]


def test_boundary_agreement_allows_for_the_tolerance_and_no_more():
    true = square(10, 10, 12)  # tolerance of 0.008 * 56.6 pixels, rounded up: 1
    assert metrics.boundary(true, true) == 1.0
    assert metrics.boundary(square(10, 11, 12), true) == 1.0
    # moved by 2: of the 48 pixels of either boundary, the two sides of 11 across the motion leave the tolerance
    assert metrics.boundary(square(10, 12, 12), true) < 0.75
    assert metrics.boundary(square(28, 28, 8), square(2, 2, 8)) == 0.0


def test_boundary_of_empty_masks():
    empty, some = square(0, 0, 0), square(10, 10, 10)
    assert metrics.boundary(empty, empty) == 1.0
    assert metrics.boundary(empty, some) == metrics.boundary(some, empty) == 0.0


def test_precision_and_recall_of_the_boundary():
    true = square(5, 5, 6) | square(25, 25, 6)
    found = square(5, 5, 6)  # all of what is found is right, half of what is there is found
    assert metrics.boundary(found, true) == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_scores_are_means_over_frames_then_objects():
    Score = metrics.Score
    scores = [Score("a", 1, 1, 1.0, 0.5), Score("a", 2, 1, 0.0, 0.5), Score("b", 1, 1, 1.0, 1.0)]
    assert metrics.mean_scores(scores) == (100 * (0.75 + 0.75) / 2, 75.0, 75.0)


def test_recall_and_decay_are_those_of_the_official_table():
    """Recall is the share of frames above a half; decay the mean of the first quarter less that of the last, whose ends both count."""
    Score = metrics.Score
    J = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    scores = [Score("a", t, 1, j, 1.0) for t, j in enumerate(J, 1)] + [Score("a", t, 2, 0.6, 0.0) for t in range(1, 10)]
    official = metrics.official(scores)
    assert list(official) == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
    first, last = (1.0 + 0.9 + 0.8) / 3, (0.4 + 0.3 + 0.2) / 3
    assert official["J-Mean"] == pytest.approx(100 * (sum(J) / 9 + 0.6) / 2)
    assert official["J-Recall"] == pytest.approx(100 * (5 / 9 + 1) / 2)
    assert official["J-Decay"] == pytest.approx(100 * ((first - last) + 0) / 2)
    assert (official["F-Mean"], official["F-Recall"], official["F-Decay"]) == (50, 50, 0)
    assert official["J&F-Mean"] == pytest.approx((official["J-Mean"] + 50) / 2)
    assert metrics.official(list(reversed(scores))) == official  # frames count by their numbers


@pytest.mark.parametrize("frames, ends", [(1, (1, 1)), (2, (1, 1)), (3, (2, 1)), (6, (2, 2)), (68, (18, 18))])
def test_quarters_are_cut_as_the_official_code_cuts_them(frames, ends):
    """The bounds are 1 + i (n - 1) / 4 for i from 0 to 4, halves rounded up."""
    values = [float(t) for t in range(frames)]
    first, last = (sum(part) / len(part) for part in (values[: ends[0]], values[-ends[1] :]))
    assert metrics.decay(values) == pytest.approx(first - last)


def test_each_object_is_scored_for_itself():
    label = torch.zeros(40, 40, dtype=torch.int64)
    label[square(5, 5, 10)] = 2
    true = torch.stack([square(25, 25, 10), square(5, 5, 10)]).float()
    first, second = metrics.frame_scores("a", 3, label, true)
    assert (first.object, first.J, first.F) == (1, 0.0, 0.0) and (second.object, second.J, second.F) == (2, 1.0, 1.0)
