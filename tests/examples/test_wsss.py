"""examples/wsss: masking and gates do what the paper says, maps come from smattn, and a run resumes bit for bit."""

from __future__ import annotations

import dataclasses
import shutil
import sys

import pytest
import torch
from PIL import Image

import smattn
from examples.shared.commands import cli
from examples.shared.rows import read
from examples.wsss import evaluate, gates, losses, model, pictures, pseudo_masks, segment, study, train
from examples.wsss.config import CONFIGS, Config
from examples.wsss.data import read_scenes
from examples.wsss.pretrained import load_timm
from examples.wsss.pseudo_masks import Thresholds
from tests.support import wsss_scenes

pytestmark = pytest.mark.promise("examples")
TINY, data, written = wsss_scenes.TINY, wsss_scenes.data, wsss_scenes.written


# masking, gates, maps


def test_masking_never_masks_a_present_class_and_absent_ones_at_the_rate():
    torch.manual_seed(0)
    present = torch.rand(500, 6) < 0.4
    tokens = torch.ones(500, 6, 4)
    for rate in (0.0, 0.5, 1.0):
        kept = model.masked(tokens, present, rate)
        assert kept[present].eq(1).all()
        absent = kept[~present]
        assert set(absent.unique().tolist()) <= {0.0, 1.0} and absent.std(1).eq(0).all()
        assert (absent == 0).float().mean().item() == pytest.approx(rate, abs=0.05)
    assert model.masked(tokens, present, 0.0).eq(1).all() and model.masked(tokens, present, 1.0)[~present].eq(0).all()


def test_masking_is_of_training_alone():
    torch.manual_seed(0)
    vit = model.ViT(dataclasses.replace(TINY, masking_rate=1.0, gates=False), 6)
    torch.nn.init.normal_(vit.head.weight)  # it starts at 0
    image, present = torch.rand(2, 3, 32, 32), torch.zeros(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="present: expected bool"):
        vit(image)
    torch.testing.assert_close(vit(image, present).logits, vit.head.bias.expand(2, -1))  # all tokens masked
    vit.eval()
    assert not torch.equal(vit(image).logits[0], vit(image).logits[1])


def test_gates_are_drawn_in_training_and_fixed_in_evaluation():
    torch.manual_seed(0)
    gate = gates.HardConcrete(4, 0.0)
    gate.log_a.data = torch.tensor([-20.0, -1.0, 1.0, 20.0])
    drawn = torch.stack([gate() for _ in range(2000)])
    assert drawn.min() == 0 and drawn.max() == 1 and ((drawn < 1e-6) | (drawn > 1 - 1e-6)).all()
    expected = torch.sigmoid(gate.log_a).tolist()  # soft > 0.5 just where logistic noise + log_a > 0
    assert drawn.mean(0).tolist() == pytest.approx(expected, abs=0.04)
    gate.eval()
    assert gate().tolist() == [0, 0, 1, 1] and gate.open().tolist() == [False, False, True, True]


def test_the_gradient_goes_straight_through_a_gate():
    torch.manual_seed(0)
    gate = gates.HardConcrete(1000, 0.0)
    (gradient,) = torch.autograd.grad(gate().sum(), gate.log_a)
    assert (gradient >= 0).all() and 0.3 < (gradient > 0).float().mean() < 1  # 0 only where the stretched variable is clipped


def test_the_penalty_is_the_expected_number_of_open_gates():
    gate = gates.HardConcrete(3, 0.0)
    gate.log_a.data = torch.tensor([-50.0, 0.33 * -2.3978952728, 50.0])  # 0.33 ln(0.1 / 1.1) in the middle
    assert gate.expected_open().item() == pytest.approx(0 + 0.5 + 1, abs=1e-5)


def test_maps_are_the_open_heads_of_plain_attention():
    torch.manual_seed(0)
    vit = model.ViT(TINY, 6).eval()
    for block, log_a in zip(vit.blocks, ([1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]), strict=True):
        block.attn.gates.log_a.data = torch.tensor(log_a)
    assert vit.open_heads() == [2, 0]
    x = torch.randn(2, 23, 24)
    attention = vit.blocks[0].attn
    query, key = attention.qkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)[:2]
    p = torch.softmax(query @ key.mT / 8**0.5, -1)[:, :, :6]
    torch.testing.assert_close(attention(x, 6, False)[1], p[:, [0, 2]].mean(1))
    torch.testing.assert_close(attention(x, 6, True)[1], p.mean(1))
    out, maps = vit.blocks[1].attn(x, 6, False)
    assert maps.eq(0).all()
    torch.testing.assert_close(out, vit.blocks[1].attn.proj.bias.expand_as(out))


def test_every_layer_calls_smattn_for_the_class_rows_alone(monkeypatch):
    asked = []
    real = smattn.attention_map
    monkeypatch.setattr(smattn, "attention_map", lambda query, key, **kw: asked.append((query.shape, key.shape)) or real(query, key, **kw))
    vit = model.ViT(TINY, 6).eval()
    logits, maps = vit(torch.rand(2, 3, 32, 32))
    assert asked == [((2, 3, 6, 8), (2, 3, 23, 8))] * 2 and maps.shape == (2, 6, 4, 4) and logits.shape == (2, 6)
    assert model.ViT(dataclasses.replace(TINY, register=False), 6).eval()(torch.rand(1, 3, 32, 32)).maps.shape == (1, 6, 4, 4)


def test_every_parameter_learns_gates_by_the_maps_too(written):
    torch.manual_seed(0)
    vit = model.ViT(TINY, 6)
    torch.nn.init.normal_(vit.head.weight)  # it starts at 0
    logits, maps = vit(torch.rand(4, 3, 32, 32), torch.ones(4, 6, dtype=torch.bool))
    of_maps = torch.autograd.grad(losses.diversity(maps), [block.attn.gates.log_a for block in vit.blocks], retain_graph=True)
    assert any(gradient.any() for gradient in of_maps)
    (logits.square().mean() + losses.diversity(maps) + vit.expected_open()).backward()
    assert [name for name, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_diversity_is_nothing_for_maps_apart_and_most_for_one_map():
    apart = torch.eye(4).view(1, 4, 2, 2)
    assert losses.diversity(apart).item() == pytest.approx(0, abs=1e-6)
    assert losses.diversity(torch.ones(1, 4, 2, 2)).item() == pytest.approx(12 / 16)


class FakeTimm:
    """A ViT's state dict, named as timm names it."""

    def __init__(self, width=24, depth=2, patch=8, side=3):
        vit = model.ViT(Config(size=patch * side, patch=patch, width=width, depth=depth, heads=3, gates=False), 1)
        keys = ("patch_embed.", "blocks.", "norm.")
        self.state = {name: torch.randn_like(value) for name, value in vit.state_dict().items() if name.startswith(keys)}
        self.state |= {"cls_token": torch.randn(1, 1, width), "pos_embed": torch.randn(1, 1 + side**2, width)}

    def create_model(self, name, pretrained, num_classes):
        assert name == "some_vit" and pretrained and num_classes == 0
        return self

    def state_dict(self):
        return dict(self.state)


def test_weights_of_timm_load(monkeypatch):
    vit = model.ViT(TINY, 6)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="the model 'some_vit' is timm's: pip install timm"):
        load_timm(vit, "some_vit")
    theirs = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", theirs)
    before = vit.extra_tokens.detach().clone()
    load_timm(vit, "some_vit")
    assert torch.equal(vit.blocks[1].attn.qkv.weight, theirs.state["blocks.1.attn.qkv.weight"])
    token = theirs.state["cls_token"][0] + theirs.state["pos_embed"][0, :1]
    torch.testing.assert_close(vit.extra_tokens.detach() - before, token.expand(7, -1), rtol=1e-4, atol=1e-5)
    assert vit.pos_embed.shape == (16, 24) and vit.pos_embed.std() > 0.3  # resized from 3x3
    monkeypatch.setitem(sys.modules, "timm", FakeTimm(depth=3))
    with pytest.raises(ValueError, match="some_vit: not a ViT of width 24, patch 8 and depth 2: blocks.2"):
        load_timm(vit, "some_vit")


def test_the_papers_sizes_are_a_configuration():
    paper = CONFIGS["paper"]
    assert (paper.width // paper.heads, paper.depth, paper.grid**2 + 20 + paper.register) == (48, 12, 1045)


# training


def test_training_reads_no_mask(data):
    shutil.rmtree(data / "SegmentationClass")
    scenes = read_scenes(data, "train")
    row = train.Trainer(train.Run(TINY, scenes.classes), scenes).advance()
    assert row[0] == 1 and row[1] > 0


def test_gates_learn_faster_and_only_matrices_decay():
    groups = train.parameter_groups(model.ViT(TINY, 6))
    assert [group["weight_decay"] for group in groups] == [TINY.weight_decay, 0, 0] and groups[2]["lr"] == TINY.gate_lr * TINY.lr
    vit = model.ViT(TINY, 6)
    assert sum(len(group["params"]) for group in train.parameter_groups(vit)) == len(list(vit.parameters()))
    assert len(groups[2]["params"]) == TINY.depth and all(p.dim() > 1 for p in groups[0]["params"])


def call(module, *arguments):
    cli(module.main, [str(a) for a in arguments])


def test_the_commands_one_after_the_other(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.CONFIGS, "small", dataclasses.replace(TINY, steps=2))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    call(train, "--data", written, "--out", tmp_path / "run", "--register", "False", "--device", "cpu")
    assert not train.load(checkpoint)[0].config.register
    for split, thresholds in (("train", ()), ("val", ("--thresholds", 1, 1.2))):
        options = ("--split", split, "--checkpoint", checkpoint, "--out", tmp_path / split, *thresholds, "--device", "cpu")
        call(pseudo_masks, "--data", written, *options)
    assert Image.open(tmp_path / "train-sheet.png").width > 500
    assert len(list((tmp_path / "train").glob("*.png"))) == 8 and len(list((tmp_path / "val").glob("*.png"))) == 3
    options = ("--size", 32, "--steps", 2, "--device", "cpu")
    call(segment, "--data", written, "--masks", tmp_path / "train", "--out", tmp_path / "segmented", *options)
    capsys.readouterr()
    call(evaluate, "--data", written, "--masks", written / "SegmentationClass")
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["background", "100.0"] and len(said) == 8 and said[-1].startswith("mIoU")
    (tmp_path / "segmented" / "val-00001.png").unlink()
    with pytest.raises(SystemExit, match="val-00001.png: cannot be read"):
        call(evaluate, "--data", written, "--masks", tmp_path / "segmented")
    (written / "classes.txt").rename(written / "names")
    try:
        with pytest.raises(SystemExit, match="is none of the 20"):
            call(pseudo_masks, "--data", written, "--checkpoint", checkpoint, "--out", tmp_path / "x")
    finally:
        (written / "names").rename(written / "classes.txt")


def test_whatever_goes_over_all_images_shows_how_far_it_is(written, monkeypatch, tmp_path):
    shown = []
    for module in (pseudo_masks, segment, evaluate):
        monkeypatch.setattr(module, "tqdm", lambda items, desc, **options: shown.append(desc) or items)
    data = read_scenes(written, "train")
    masks = pseudo_masks.pseudo_masks(pseudo_masks.see(model.ViT(TINY, 6), data), data, Thresholds(1.0, 1.0))
    pseudo_masks.save_masks(masks, data, tmp_path)
    segment.predict(segment.Network(6), data, 32)
    call(evaluate, "--data", written, "--split", "train", "--masks", tmp_path)
    assert shown == ["maps", "pseudo-masks", "writing", "predictions", "scores"]


def test_the_segmentation_network_fits_what_it_is_given(written):
    data = read_scenes(written, "train")
    truth = [scene.mask() for scene in data.scenes]
    before = segment.predict(segment.fit(data, truth, 32, steps=4), data, 32)
    after = segment.predict(segment.fit(data, truth, 32, steps=40), data, 32)
    assert evaluate.score(after, truth, 6).miou() > evaluate.score(before, truth, 6).miou()


def test_a_study_goes_on_where_it_stopped_and_says_what_it_found(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.CONFIGS, "small", dataclasses.replace(TINY, steps=1))
    real = study.fit
    monkeypatch.setattr(study, "fit", lambda *a: real(*a, steps=2))
    arguments = ("--data", written, "--out", tmp_path / "out" / "found", "--runs", tmp_path / "runs", "--variants", "full", "masking 0")
    call(study, *arguments, "--seeds", 1)
    before = read(tmp_path / "out" / "found.csv", study.Row)
    trained = []
    real_train = study.train
    monkeypatch.setattr(study, "train", lambda trainer, out, **options: trained.append(out.name) or real_train(trainer, out, **options))
    capsys.readouterr()
    call(study, *arguments, "--seeds", 2)
    assert "| full | 2 |" in (said := capsys.readouterr().out) and "| masking 0 | 2 |" in said
    rows = read(tmp_path / "out" / "found.csv", study.Row)
    assert trained == ["full-1", "masking-0-1"]
    assert [row[:2] for row in rows] == [("full", 0), ("full", 1), ("masking 0", 0), ("masking 0", 1)]
    assert [str(row) for row in before] == [str(rows[0]), str(rows[2])] and rows[0].heads == 6
    assert (tmp_path / "out" / "found.png").exists() and Image.open(tmp_path / "runs" / "full-0" / "sheet.png").width > 500


def test_a_sheet_says_what_it_shows_and_how_good_it_is_and_needs_no_truth(written, tmp_path, monkeypatch):
    rows = []
    monkeypatch.setattr(pictures, "save_sheet", lambda path, these: rows.extend(these))
    data, maps = read_scenes(written, "val"), torch.rand(3, 6, 4, 4)
    masks = {"pseudo-mask": [scene.mask() for scene in data.scenes]}
    pictures.save_scenes(tmp_path / "sheet.png", data, maps, masks)
    for row, scene in zip(rows, data.scenes, strict=True):
        captions = [cell.caption for cell in row if cell]
        assert captions == [scene.name, *(f"attention, {data.classes[c]}" for c in scene.labels), "pseudo-mask, mIoU 100", "truth"]
    rows.clear()
    untold = dataclasses.replace(data, scenes=tuple(dataclasses.replace(scene, mask_path=tmp_path / "none") for scene in data.scenes))
    pictures.save_scenes(tmp_path / "sheet.png", untold, maps, masks)
    assert [row[-1].caption for row in rows] == ["pseudo-mask"] * 3
