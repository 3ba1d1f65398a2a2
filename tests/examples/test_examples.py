"""The examples learn what they claim, and in the way that they claim."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import smattn
from examples import learn_mask, pairformer, quickstart, readme_figures
from examples.shared.rows import RESULTS, read
from examples.vos import search

pytestmark = pytest.mark.promise("examples")
ROOT = Path(__file__).resolve().parents[2]


def disc() -> tuple[torch.Tensor, torch.Tensor]:
    """A noisy orange disc on a noisy dark ground, (32, 40, 3), and the pixels of the disc."""
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    inside = (row - 14).square() + (column - 22).square() < 81
    noise = torch.randn(32, 40, 3, generator=torch.Generator().manual_seed(0)) * 0.05
    ground, orange = torch.tensor([0.1, 0.3, 0.3]), torch.tensor([0.9, 0.6, 0.3])
    return (torch.where(inside[..., None], orange, ground) + noise).clamp(0, 1), inside


def overlap(mask: torch.Tensor, inside: torch.Tensor) -> float:
    """Intersection over union of a soft mask and the object."""
    return (torch.minimum(mask, inside.float()).sum() / torch.maximum(mask, inside.float()).sum()).item()


def test_quickstart_mask_learns_to_cover_the_object():
    photo, inside = disc()
    learned = quickstart.learn_mask(photo, click=(14, 22), steps=150)
    assert overlap(learned.first, inside) < 0.3
    assert overlap(learned.mask, inside) > 0.9
    assert learned.attention.sum().item() == pytest.approx(1, abs=1e-5) and learned.attention[inside].sum() > 0.9
    assert (learned.redrawn - photo).abs().mean() < 0.1


def test_quickstart_mask_learns_through_the_attention_alone(monkeypatch):
    attention = smattn.soft_masked_attention
    monkeypatch.setattr(smattn, "soft_masked_attention", lambda q, k, v, mask, alpha: attention(q, k, v, mask.detach(), alpha))
    with pytest.raises(RuntimeError, match="does not require grad"):
        quickstart.learn_mask(disc()[0], click=(14, 22), steps=1)


def test_quickstart_is_deterministic():
    photo, _ = disc()
    one, two = (quickstart.learn_mask(photo, click=(14, 22), steps=10).mask for _ in range(2))
    assert torch.equal(one, two)


def test_a_mask_is_learned_from_labels_through_the_gradient_of_the_soft_mask():
    network, course = learn_mask.train("soft", seed=0, steps=120, every=120, quiet=True)
    assert course[0].mask_iou < 0.15
    assert course[-1].mask_iou > 0.6 and course[-1].inverted_iou < 0.1


@pytest.mark.parametrize("train", [partial(learn_mask.train, "soft"), partial(pairformer.train, "learned")], ids=["mask", "pairs"])
def test_the_last_row_is_of_the_network_as_it_is_returned(train, monkeypatch):
    """Whatever the number of steps, and no step of training comes after it."""
    losses, real = [], torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *logits: losses.append(1) or real(*logits))
    network, course = train(seed=0, steps=3, batch=2, every=2, quiet=True)
    assert [row.step for row in course] == [0, 2, 3] and len(losses) == 3


@pytest.mark.parametrize("masking", ["detached", "hard"])
def test_without_that_gradient_the_mask_learns_nothing(masking):
    network, course = learn_mask.train(masking, seed=0, steps=10, every=10, quiet=True)
    assert course[0].mask_iou == course[-1].mask_iou < 0.15
    assert all(parameter.grad is None for parameter in network.mask_head.parameters())
    assert network.classify.weight.grad.any()


def test_the_mask_head_sees_no_texture_and_the_values_no_colour():
    network = learn_mask.Network("soft")
    image = torch.rand(2, 3, learn_mask.SIDE, learn_mask.SIDE)
    grating = torch.rand(2, 1, learn_mask.SIDE, learn_mask.SIDE)
    torch.testing.assert_close(network.mask(image + grating), network.mask(image), rtol=0, atol=1e-6)
    colour = torch.rand(2, 3, learn_mask.SIDE, learn_mask.SIDE)
    colour -= colour.mean(1, keepdim=True)
    network.mask_head[-1].weight.data.zero_()  # the same mask whatever the colour
    torch.testing.assert_close(network(image + colour)[0], network(image)[0], rtol=0, atol=1e-5)


TABLES = readme_figures.tables()


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_of_the_readmes_are_those_of_the_committed_rows(name):
    assert TABLES[name].count("\n") > 1, "a table has at least a row"
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    assert begin + TABLES[name] + end in readme_figures.readme_of(name).read_text()


def test_every_file_of_rows_is_shown():
    assert {path.stem for path in RESULTS.glob("*.csv")} == set(TABLES)
    assert {row.setting for row in read(RESULTS / "vos_search.csv", search.Found)} <= search.SETTINGS.keys()


@pytest.mark.parametrize("module", ["examples.vos.train", "examples.wsss.study", "examples.learn_mask", "examples.mask2former_cost"])
def test_an_example_runs_as_a_module_from_the_root(module):
    from_the_root = {**os.environ, "PYTHONSAFEPATH": ""}
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, env=from_the_root, capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout, done.stderr


def test_a_pair_block_learns_more_with_its_bias_than_without():
    """In a few steps already, and the bias has a gradient."""
    (learned, with_bias), (_, without) = (pairformer.train(bias, seed=0, steps=60, every=60, quiet=True) for bias in pairformer.BIASES)
    assert with_bias[-1].error < with_bias[0].error - 0.1 and with_bias[-1].error < without[-1].error
    assert learned.blocks[0].rows.to_bias.weight.grad.any()


def test_the_tables_of_distances_are_symmetric_and_their_bins_in_range():
    tables = pairformer.draw(2, torch.Generator().manual_seed(0))
    assert torch.equal(tables.bins, tables.bins.mT) and torch.equal(tables.shown, tables.shown.mT)
    assert tables.bins.max() < pairformer.BINS and (tables.given()[~tables.shown] == pairformer.HIDDEN).all()
