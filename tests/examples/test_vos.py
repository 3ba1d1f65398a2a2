"""examples/vos: gradients through the cycle, resuming bit for bit, inference, studies."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from PIL import Image

from examples.shared.commands import cli
from examples.shared.rows import read, write
from examples.shared.where import Where
from examples.vos import batches, cycle, infer, losses, search, study, train
from examples.vos.attention import attention_of_first_object
from examples.vos.batches import Batch, _other_view, sample
from examples.vos.config import CONFIGS
from examples.vos.data import read_clips
from examples.vos.model import VOS, grid_cells, mean_inside
from tests.support import vos_clips

pytestmark = pytest.mark.promise("examples")
TINY, written = vos_clips.TINY, vos_clips.written


# losses


def test_dice_of_an_object_missed_entirely_is_whole_and_has_a_gradient():
    mask = torch.zeros(1, 2, 8, 8)
    mask[0, 0, :4], mask[0, 1, 6:] = 1, 1
    probability = torch.stack([mask[:, 0], torch.zeros(1, 8, 8)], 1).requires_grad_()
    present = torch.ones(1, 2, dtype=torch.bool)
    dice = losses.dice(probability, mask, present)
    assert dice.item() == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(dice, probability)
    assert (gradient[0, 1, 6:] < 0).all()
    assert losses.dice(probability, mask, torch.tensor([[True, False]])).item() == pytest.approx(0, abs=1e-6)


def test_losses_of_a_perfect_prediction_are_nothing():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    logits = 50 * torch.cat([1 - mask, mask], 1)
    dice, cross_entropy = losses.loss(logits, mask, torch.ones(1, 1, dtype=torch.bool))
    assert dice.item() == pytest.approx(0, abs=1e-5) and cross_entropy.item() == pytest.approx(0, abs=1e-5)


def test_pixels_that_are_not_known_count_for_nothing():
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., 2:6, 2:6] = 1
    known = torch.ones(2, 8, 8, dtype=torch.bool)
    known[:, 0], known[1, 3] = False, False
    logits = torch.randn(2, 2, 8, 8, requires_grad=True)
    parts = losses.loss(logits, mask, torch.ones(2, 1, dtype=torch.bool), known)
    (gradient,) = torch.autograd.grad(sum(parts), logits)
    assert not gradient.movedim(1, -1)[~known].any() and gradient.movedim(1, -1)[known].all()
    everywhere = losses.loss(logits, mask, torch.ones(2, 1, dtype=torch.bool), torch.ones_like(known))
    torch.testing.assert_close(everywhere, losses.loss(logits, mask, torch.ones(2, 1, dtype=torch.bool)))


# model and cycle


@pytest.fixture
def batch(written):
    return sample(read_clips(written, "train"), TINY, 1.0, torch.Generator().manual_seed(0))


def test_the_other_view_shows_the_same_pixels_under_the_same_mask(written):
    clip = read_clips(written, "train")[0]
    mask = clip.first_mask()
    flat = mask.argmax(0)[None].expand(3, -1, -1).float() / 4  # the picture is its own mask
    views = [_other_view(flat, mask, torch.Generator().manual_seed(seed)) for seed in range(5)]
    for view, seen in views:
        assert seen.shape == mask.shape and set(seen.unique().tolist()) == {0, 1} and seen.sum(0).max() == 1
        agree = (view[0] - seen.argmax(0) / 4).abs() < 1e-3
        assert agree.float().mean() > 0.85  # the interpolated borders differ
    assert len({seen.sum().item() for _, seen in views}) == 5


def test_the_grid_of_the_background_covers_every_pixel_once():
    cells = grid_cells(torch.zeros(1, 1, 5, 7))
    assert cells.shape == (9, 5, 7) and (cells.sum(0) == 1).all() and cells.flatten(1).any(1).all()


def test_descriptors_start_as_the_mean_inside():
    features = torch.arange(6.0).view(1, 6, 1)
    masks = torch.tensor([[[0, 0.9, 0.6, 0, 0, 0.5], [0, 0, 0.25, 0.25, 0, 0], [0.0] * 6]])
    torch.testing.assert_close(mean_inside(features, masks)[0, :, 0], torch.tensor([1.5, 2.5, 2.5]), rtol=0, atol=1e-4)


def test_a_pasted_picture_shows_the_objects_of_the_other_view_on_the_ground_of_the_frame_between(batch):
    again, pasted, between = batch.images[:, 3], batch.images[:, 4], batch.images[:, 1]
    on = batch.mask_again.any(1, keepdim=True).expand_as(again)
    assert torch.equal(pasted[on], again[on]) and torch.equal(pasted[~on], between[~on]) and 0 < on.float().mean() < 1


def test_an_object_that_a_crop_loses_of_frame_0_is_not_asked_of_the_other_view(monkeypatch):
    """Clips of both orientations are cropped to a common size, and the logits of an object that is not present can never be right."""
    wide, tall = torch.zeros(2, 1, 16, 32), torch.zeros(2, 1, 32, 16)
    wide[0, 0, :, 0] = tall[0, 0, 0] = wide[1] = tall[1] = 1  # at the border in frame 0, everywhere in the other view
    monkeypatch.setattr(batches, "_item", lambda masks, *rest: (torch.zeros(5, 3, *masks.shape[-2:]), masks))
    batch = sample([wide, tall], dataclasses.replace(TINY, batch=16), 1.0, torch.Generator().manual_seed(0))
    assert batch.mask_again.shape == (16, 1, 16, 16) and 0 < batch.present.sum() < 16
    assert torch.equal(batch.mask_again.flatten(2).any(-1), batch.present)


def test_the_labels_of_a_pasted_picture_are_known_on_what_was_pasted_and_away_from_what_may_be_there():
    masks, pasted = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 32, 32)
    masks[..., 6:10, 6:10], pasted[..., 14:18, 18:32] = 1, 1
    known = cycle.known(masks, pasted)
    assert known[pasted.any(1)].all() and known[0, :8].all() and known[0, 24:].all()
    beside = (known & ~pasted.any(1))[0, 10:22, 10:22]  # two pixels more than the object
    assert not beside.any()


def gradient_of_intermediate_masks(masking, batch, monkeypatch, path):
    """True where the loss at the end of a path reaches the masks predicted on the way."""
    torch.manual_seed(0)
    model = VOS(dataclasses.replace(TINY, dropout=0.0), masking)
    between = []
    real = cycle.soft_masks

    def watched(logits):
        masks = real(logits)
        masks.retain_grad()
        between.append(masks)
        return masks

    monkeypatch.setattr(cycle, "soft_masks", watched)
    (end,) = cycle.run(model, batch, (path,))
    torch.stack(losses.loss(end.logits, batch.mask_again, batch.present, end.known)).sum().backward()
    assert len(between) == len(path) - 1 and all(((0 <= m) & (m <= 1)).all() for m in between)
    return [masks.grad is not None and bool(masks.grad.any()) for masks in between]


PATHS = {"there and back": cycle.THERE_AND_BACK, "chain": cycle.CHAIN, "history": cycle.HISTORY}
PATHS["other ground"] = cycle.on_other_ground(cycle.CHAIN)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_gradient_flows_through_every_intermediate_soft_mask(batch, monkeypatch, path):
    assert all(gradient_of_intermediate_masks("soft", batch, monkeypatch, path))


@pytest.mark.parametrize("masking", ["detached", "hard", "none"])
def test_and_through_none_of_them_otherwise(batch, monkeypatch, masking):
    assert not any(gradient_of_intermediate_masks(masking, batch, monkeypatch, cycle.CHAIN))


def test_objects_that_are_not_there_change_nothing(batch):
    model = VOS(dataclasses.replace(TINY, dropout=0.0))
    mask, mask_again = (torch.nn.functional.pad(m, (0, 0, 0, 0, 0, 2)) for m in (batch.mask, batch.mask_again))
    more = Batch(batch.images, mask, mask_again, torch.nn.functional.pad(batch.present, (0, 2)))
    (end,), (with_more,) = (cycle.run(model, b, (cycle.HISTORY,)) for b in (batch, more))
    torch.testing.assert_close(with_more.logits[:, : end.logits.shape[1]], end.logits, rtol=1e-4, atol=1e-4)


def test_every_parameter_learns(batch):
    model = VOS(TINY)
    ends = cycle.run(model, batch, (cycle.SELF, cycle.HISTORY))
    sum(torch.stack(losses.loss(end.logits, batch.mask_again, batch.present)).sum() for end in ends).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


class FakeTimm(torch.nn.Module):
    """A stand-in for timm's features_only models: chosen maps at strides 2 to 32, or only at 16, channels last, and their description."""

    output_fmt = "NHWC"

    class feature_info:
        reduction = staticmethod(lambda: FakeTimm.strides)
        channels = staticmethod(lambda: [16, 24, 40])

    @classmethod
    def create_model(cls, name, pretrained, features_only, out_indices, **options):
        assert features_only and not options
        strides = {"some_model": [2, 4, 8, 16, 32], "flat_model": [16] * 5}[name]
        cls.strides = [strides[i] for i in out_indices]
        return cls()

    def forward(self, image):
        B, _, H, W = image.shape
        maps = zip(self.feature_info.reduction(), self.feature_info.channels(), strict=True)
        return [torch.ones(B, H // stride, W // stride, channels) for stride, channels in maps]


def test_a_backbone_of_timm(monkeypatch):
    config = dataclasses.replace(TINY, backbone="some_model", stride=8)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="the model 'some_model' is timm's: pip install timm"):
        VOS(config)
    monkeypatch.setitem(sys.modules, "timm", FakeTimm)
    coarse, fine = VOS(config).features(torch.rand(2, 3, 64, 96))
    assert coarse.shape == (2, 16, 8, 12) and fine.shape == (2, 16, 16, 24)
    with pytest.raises(ValueError, match="stride: expected 8"):
        VOS(dataclasses.replace(config, stride=4))
    with pytest.raises(ValueError, match=r"backbone 'flat_model': expected maps at strides 4, 8 and 16, got \[16, 16, 16\]"):
        VOS(dataclasses.replace(config, backbone="flat_model"))


# training


def test_inference_writes_scores_and_pictures(written, tmp_path, monkeypatch, capsys):
    train.train(train.Trainer(train.Run(TINY), read_clips(written, "train")), tmp_path, stop=1, save_every=1)
    arguments = ["--data", written, "--checkpoint", tmp_path / "checkpoint.pt", "--out", tmp_path / "shown", "--device", "cpu"]
    rows, save_sheet = [], infer.save_sheet
    monkeypatch.setattr(infer, "save_sheet", lambda path, these: rows.extend(these) or save_sheet(path, these))
    cli(infer.main, [str(a) for a in arguments])
    said = capsys.readouterr()
    assert said.out.startswith("J&F-Mean ") and "frames of val-000: " in said.err
    clip = read_clips(written, "val")[0]
    with open(tmp_path / "shown" / "scores.csv", newline="") as file:
        assert sum(1 for _ in file) == 1 + clip.objects * 3  # neither the first frame nor the last
    assert len(list((tmp_path / "shown" / clip.name).glob("*.png"))) == 5
    with Image.open(tmp_path / "shown" / f"{clip.name}.gif") as gif:
        assert gif.n_frames == 5
    captions = ["frame 0: mask given", "frame 2", "soft masks, summed", "attention of object 1", "result, frame 2", "result, frame 4; J&F"]
    assert all(want in cell.caption for row in rows for want, cell in zip(captions, row, strict=True)) and len(rows) == 1
    assert all(row[3].picture.sum().item() == pytest.approx(1, abs=1e-4) for row in rows)
    assert Image.open(tmp_path / "shown" / "sheet.png").width > 1000
    label = Image.open(tmp_path / "shown" / "labels" / clip.name / "00000.png")
    assert label.mode == "P" and label.tobytes() == Image.open(clip.annotations / "00000.png").tobytes()


def test_inference_keeps_the_annotated_frame_and_a_history(written, monkeypatch):
    clip, read = read_clips(written, "val")[0], []
    model = VOS(TINY)
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda memory, *rest: read.append([id(d) for d in memory]) or decode(memory, *rest))
    infer.propagate(model, clip, dataclasses.replace(TINY, history=2))
    assert [len(memory) for memory in read] == [1, 2, 3, 3] and len({memory[0] for memory in read}) == 1


def test_frames_are_resized_for_the_network_and_labels_are_as_large_as_the_clip(written):
    clip, config = read_clips(written, "val")[0], dataclasses.replace(TINY, height=24)
    batch = sample([clip], config, 1.0, torch.Generator().manual_seed(0))
    assert batch.images.shape[-2:] == batch.mask.shape[-2:] == (24, 32)  # of 40 x 48: to the nearest multiples of 8
    labels = infer.propagate(VOS(config), clip, config)
    assert len(labels) == len(clip) and {label.shape for label in labels} == {(40, 48)}


def test_the_papers_sizes_are_a_configuration():
    paper = dataclasses.replace(CONFIGS["paper"], backbone="small")  # timm is not required
    model = VOS(paper)
    assert len(model.encoder) == len(model.decoder) == 5
    assert model.encoder[0].cross_attention.scaling_factors.tolist() == [32, 32, 16, 16, 8, 8, 4, 4]


def test_a_study_goes_on_where_it_stopped_and_says_what_it_found(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(study.CONFIGS, "small", dataclasses.replace(TINY, steps=1))
    arguments = ["--data", written, "--out", tmp_path / "out" / "found", "--runs", tmp_path / "runs"]
    arguments += ["--contestants", "soft", "copy"]

    def say(seeds):
        cli(study.main, [str(a) for a in [*arguments, "--seeds", seeds]])
        return capsys.readouterr().out

    say(1)
    before = read(tmp_path / "out" / "found.csv", study.Row)
    trained = []
    monkeypatch.setattr(study, "train", lambda trainer, out, **options: trained.append(out.name))
    assert "| soft | 1 | 1 |" in (said := say(2)) and "| copy | 1 | 0 |" in said
    rows = read(tmp_path / "out" / "found.csv", study.Row)
    assert trained == ["soft-1"] and rows[: len(before)] == before and len(rows) == len(before) + 1 + 3
    assert [row.frame for row in before] == [-1, 1, 2, 3] * 2 and (tmp_path / "out" / "found.png").exists()
    there = Where("another processor, 1 thread", "unknown")
    monkeypatch.setattr(study, "here", lambda: there)
    said = say(2)
    assert trained == ["soft-1", "soft-0", "soft-1"], "another machine's runs are not those of this one"
    assert "| soft | 2 | 1 |" in said and "| copy | 2 | 0 |" in said
    assert said.endswith("\nMachine 2: another processor, 1 thread; runs by commit: unknown (3).\n")


def test_clips_alone_and_the_oracle_that_sees_every_annotation(written, tmp_path, monkeypatch):
    monkeypatch.setitem(study.CONFIGS, "small", dataclasses.replace(TINY, steps=1))
    trained = {}
    monkeypatch.setattr(study, "train", lambda trainer, out, **options: trained.update({out.name: trainer.clips}))
    arguments = ["--data", written, "--out", tmp_path / "alone", "--runs", tmp_path / "runs", "--alone", "--seeds", 2]
    cli(study.main, [str(a) for a in [*arguments, "--contestants", "frame0", "oracle", "copy"]])
    clips = read_clips(written, "train")
    assert trained["frame0-0"] == clips[:1] and trained["frame0-1"] == clips[1:2]
    assert len(trained["oracle-0"]) == len(clips[0]) and trained["oracle-0"][0] == clips[0]
    for t, turned in enumerate(trained["oracle-0"]):
        assert torch.equal(turned.first_mask(), clips[0].mask(t)) and torch.equal(turned.image(0), clips[0].image(t))
    rows = read(tmp_path / "alone.csv", study.Row)
    assert {(row.contestant, row.seed) for row in rows} == {(name, seed) for name in ("frame0", "oracle", "copy") for seed in range(2)}


def test_a_search_pairs_the_runs_of_a_seed_and_goes_on_where_it_stopped(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(search.SETTINGS, "nothing at all", (dataclasses.replace(TINY, steps=1), "long", 1))
    out = tmp_path / "found.csv"
    arguments = ["--data", written, "--out", out, "--runs", tmp_path / "runs", "--seeds", 2, "--settings", "nothing at all"]
    earlier = [search.Found("nothing at all", masking, 0, JF, 0.0, 0.0) for masking, JF in (("soft", 50.0), ("detached", 40.0))]
    write(out, earlier)
    cli(search.main, [str(a) for a in arguments])
    found = read(out, search.Found)
    assert found[:2] == earlier and [one[:3] for one in found[2:]] == [("nothing at all", masking, 1) for masking in ("soft", "detached")]
    gain = found[2].JF - found[3].JF
    assert capsys.readouterr().out.strip().endswith(f"| +10.0, {gain:+.1f} |")


def test_the_first_mask_copied_scores_what_it_overlaps(written):
    clip = read_clips(written, "val")[0]
    scores = infer.score(clip, [study.copied(clip)] * len(clip))
    first, second = clip.first_mask()[0].bool(), clip.mask(2)[0].bool()
    (one,) = [s for s in scores if (s.frame, s.object) == (2, 1)]
    assert one.J == (first & second).sum().item() / (first | second).sum().item()


@pytest.mark.parametrize("masking, shown", [("soft", True), ("detached", True), ("hard", False), ("none", False)])
def test_a_descriptor_looks_where_its_mask_is(masking, shown):
    torch.manual_seed(0)
    model = VOS(dataclasses.replace(TINY, alpha_init=32.0), masking)
    frame, masks = model.features(torch.rand(1, 3, 32, 48)), torch.zeros(1, 2, 32, 48)
    masks[:, 0, :, 24:] = 1
    found = attention_of_first_object(model, frame, masks, torch.ones(1, 2, dtype=torch.bool))
    assert (found is not None) == shown
    if shown:
        assert found.shape == frame.coarse.shape[-2:] and found[:, found.shape[1] // 2 :].sum() > 0.99
