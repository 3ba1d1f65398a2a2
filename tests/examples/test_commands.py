"""What a user of the examples can put right is one line without a traceback, and no run is written over."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from examples import learn_mask, mask2former_cost, pairformer
from examples.shared.commands import cli
from examples.shared.resumable import train as train_run
from examples.shared.rows import read, write
from examples.vos import cost, figures, infer, search
from examples.vos import study as vos_study
from examples.vos import synthetic as vos_synthetic
from examples.vos import train as vos
from examples.vos.data import read_clips
from examples.wsss import evaluate, pseudo_masks, segment
from examples.wsss import study as wsss_study
from examples.wsss import synthetic as wsss_synthetic
from examples.wsss import train as wsss
from examples.wsss.data import read_scenes
from tests.support import vos_clips, wsss_scenes

pytestmark = pytest.mark.promise("examples")

clips, scenes = vos_clips.written, wsss_scenes.written
SYSTEMS = {"vos": (vos, infer), "wsss": (wsss, pseudo_masks)}
both_systems = pytest.mark.parametrize("system", SYSTEMS)


@pytest.fixture
def said():
    """Calls a command, which must end with one line, and returns the line."""

    def call(command, *arguments):
        with pytest.raises(SystemExit) as end:
            cli(command.main, [str(a) for a in arguments])
        assert isinstance(end.value.code, str) and "\n" not in end.value.code
        return end.value.code

    return call


@pytest.fixture
def tiny(monkeypatch):
    """Both systems' small configuration as one step of the tests' own."""
    for module, config in ((vos, vos_clips.TINY), (wsss, wsss_scenes.TINY), (vos_study, vos_clips.TINY), (wsss_study, wsss_scenes.TINY)):
        monkeypatch.setitem(module.CONFIGS, "small", config)


@pytest.fixture
def data(request, system):
    return request.getfixturevalue("clips" if system == "vos" else "scenes")


def trained(system, root, out):
    """One step of a run of that system; its checkpoint."""
    if system == "vos":
        trainer = vos.Trainer(vos.Run(vos_clips.TINY), read_clips(root, "train"))
    else:
        data = read_scenes(root, "train")
        trainer = wsss.Trainer(wsss.Run(wsss_scenes.TINY, data.classes), data)
    train_run(trainer, out, stop=1, save_every=1)
    return out / "checkpoint.pt"


@both_systems
def test_a_checkpoint_that_is_missing_or_none(system, data, tmp_path, said):
    use = SYSTEMS[system][1]
    path = tmp_path / "checkpoint.pt"
    arguments = ("--data", data, "--out", tmp_path / "out", "--checkpoint", path, "--device", "cpu")
    assert said(use, *arguments) == f"{path}: no such checkpoint"
    path.write_text("not a checkpoint")
    assert said(use, *arguments).startswith(f"{path}: not a checkpoint")
    torch.save({"model": {}}, path)
    assert said(use, *arguments).startswith(f"{path}: not a checkpoint")


@pytest.mark.parametrize("system, other", [("vos", "wsss"), ("wsss", "vos")])
def test_a_checkpoint_of_the_other_system(system, other, data, request, tmp_path, said):
    path = trained(other, request.getfixturevalue("clips" if other == "vos" else "scenes"), tmp_path)
    message = said(SYSTEMS[system][1], "--data", data, "--out", tmp_path / "out", "--checkpoint", path, "--device", "cpu")
    assert message.startswith(f"{path}: not a checkpoint of this system")


def test_a_start_that_is_missing(clips, tmp_path, said):
    for command in (vos, vos_study):
        message = said(command, "--data", clips, "--out", tmp_path / "out", "--start", tmp_path / "no.pt")
        assert message == f"{tmp_path / 'no.pt'}: no such checkpoint"


def test_a_start_of_another_network(clips, tmp_path, tiny, said):
    arguments = ("--data", clips, "--out", tmp_path / "out", "--start", trained("vos", clips, tmp_path / "run"))
    of_the_study = ("--contestants", "hard", "--runs", tmp_path / "runs")
    for command, more in (vos, ("--masking", "hard", "--device", "cpu")), (vos_study, of_the_study):
        assert said(command, *arguments, *more) == "--start: its weights are not of a network with masking 'hard' and these sizes"


def test_a_study_keeps_to_its_own_rows(clips, tmp_path, said):
    """A name may have a dot in it, and rows of another number of steps are no part of this study."""
    rows = [vos_study.Row("soft", 0, 7, frame, 1.0, 1.0, 1.0, "a machine", "a commit") for frame in (-1, 1)]
    write(tmp_path / "v1.0.csv", rows)
    arguments = ["--data", clips, "--contestants", "copy", "--runs", tmp_path / "runs"]
    cli(vos_study.main, [str(a) for a in [*arguments, "--out", tmp_path / "v1.1"]])
    assert read(tmp_path / "v1.0.csv", vos_study.Row) == rows and (tmp_path / "v1.1.png").exists()
    message = said(vos_study, *arguments, "--out", tmp_path / "v1.0", "--steps", 9)
    assert message == f"{tmp_path / 'v1.0.csv'}: has rows of 7 steps, not 9: another --out keeps them"


@pytest.fixture
def short(clips, tmp_path):
    """Clips of one frame, of which none can be scored."""
    root = shutil.copytree(clips, tmp_path / "short")
    for frame in root.glob("JPEGImages/480p/*/*.jpg"):
        if frame.stem != "00000":
            frame.unlink()
    return root


def test_clips_of_one_frame_are_propagated_but_not_judged(short, tmp_path, capsys, said, monkeypatch, tiny):
    checkpoint = trained("vos", short, tmp_path / "run")
    arguments = ["--data", short, "--checkpoint", checkpoint, "--out", tmp_path / "shown", "--device", "cpu"]
    cli(infer.main, [str(a) for a in arguments])
    label = tmp_path / "shown" / "labels" / "val-000" / "00000.png"
    assert label.exists() and capsys.readouterr().out.startswith("no frame of val can be scored: ")
    for command, *more in [vos_study], [vos_study, "--alone", "--seeds", 1], [search]:
        monkeypatch.setattr(command, "train", None)
        message = said(command, "--data", short, "--out", tmp_path / "found", *more)
        assert message.startswith(f"{short}: no frame to judge by: ")


def test_more_seeds_than_clips_to_be_alone_with(clips, tmp_path, said):
    message = said(vos_study, "--data", clips, "--out", tmp_path / "found", "--alone", "--seeds", 4)
    assert message == "--seeds: with --alone expected at most 3, the clips of train, got 4"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
@both_systems
def test_a_device_that_is_not_there(system, data, tmp_path, said):
    train, use = SYSTEMS[system]
    commands = {train: [], use: ["--checkpoint", tmp_path / "no.pt"]}
    if system == "wsss":
        commands[segment] = ["--masks", data / "SegmentationClass"]
    for command, more in commands.items():
        for device in ("cuda", "cuda:1", "tpu"):
            assert said(command, "--data", data, "--out", tmp_path / "out", "--device", device, *more).startswith(f"--device {device}: ")


@both_systems
def test_a_resume_that_does_not_match(system, data, tmp_path, tiny, said):
    trained(system, data, tmp_path / "run")
    message = said(SYSTEMS[system][0], "--data", data, "--out", tmp_path / "run", "--resume", "--seed", 3, "--steps", 9, "--device", "cpu")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    steps = (vos_clips if system == "vos" else wsss_scenes).TINY.steps
    assert message == f"{checkpoint}: a checkpoint of another run, with config.steps {steps}, not 9; seed 0, not 3"


@both_systems
def test_a_new_run_does_not_write_over_another(system, data, tmp_path, tiny, said):
    checkpoint = trained(system, data, tmp_path / "run")
    before, arguments = checkpoint.read_bytes(), ("--data", data, "--out", tmp_path / "run", "--device", "cpu")
    message = f"{tmp_path / 'run'}: has a run in it already: --resume goes on with it, another --out keeps it"
    assert said(SYSTEMS[system][0], *arguments) == message
    checkpoint.unlink()  # the run ended before its first checkpoint
    assert said(SYSTEMS[system][0], *arguments) == message
    assert (tmp_path / "run" / "log.csv").exists() and before


def test_a_setting_that_is_impossible(scenes, tmp_path, said):
    message = said(wsss, "--data", scenes, "--out", tmp_path, "--size", 60, "--device", "cpu")
    assert message == "size: expected a multiple of the patch, 8, got 60"


@pytest.mark.parametrize(
    "command, flag, low",
    [
        *((command, "--seeds", 1) for command in (vos_study, wsss_study, search, learn_mask, pairformer)),
        *((command, "--steps", 1) for command in (vos, wsss, segment, learn_mask, pairformer)),
        (wsss, "--batch", 1), (wsss, "--size", 1), (segment, "--size", 4), (figures, "--clips", 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_number_that_is_too_small_is_refused_with_the_usage(command, flag, low, tmp_path, capsys):
    parameters = inspect.signature(command.main).parameters.items()
    paths = {"out"} | {name for name, parameter in parameters if parameter.default is inspect.Parameter.empty}
    with pytest.raises(SystemExit) as end:
        cli(command.main, [flag, str(low - 1), *(f"--{name}={tmp_path}" for name in paths)])
    assert end.value.code == 2 and f"expected at least {low}, got {low - 1}" in capsys.readouterr().err


def test_objects_that_are_too_large_to_be_seen(tmp_path, said):
    message = said(vos_synthetic, "--out", tmp_path, "--size", 12, "--train", 1, "--frames", 1)
    assert message == "--size: of 100 clips of 96x64 none shows each of its objects, expected less than 12.0"


@pytest.mark.parametrize("system, backbone", [("vos", "some_model"), ("wsss", "some_vit")])
def test_weights_of_timm_without_timm(system, backbone, data, tmp_path, monkeypatch, tiny, said):
    monkeypatch.setitem(sys.modules, "timm", None)
    more = ["--timm", backbone]
    if system == "vos":
        monkeypatch.setitem(vos.CONFIGS, "small", vos.CONFIGS["paper"])
        more = []
    assert said(SYSTEMS[system][0], "--data", data, "--out", tmp_path / "out", "--device", "cpu", *more).endswith("pip install timm")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_name_that_timm_does_not_know(system, data, tmp_path, monkeypatch, tiny, said):
    def create_model(name, **options):
        raise RuntimeError(f"Unknown model ({name})")  # as timm does

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
    monkeypatch.setitem(vos.CONFIGS, "small", dataclasses.replace(vos_clips.TINY, backbone="vit_bse", stride=8))
    more = [] if system == "vos" else ["--timm", "vit_bse"]
    message = said(SYSTEMS[system][0], "--data", data, "--out", tmp_path / "out", "--device", "cpu", *more)
    assert message == "timm's model 'vit_bse': Unknown model (vit_bse)"


COMMANDS = {
    vos: [], infer: ["--checkpoint", "no.pt"], vos_study: [], search: [],
    wsss: [], pseudo_masks: ["--checkpoint", "no.pt"], segment: ["--masks", "none"], wsss_study: [], evaluate: ["--masks", "none"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_folder_that_is_not_there(command, tmp_path, said):
    checkpoint = tmp_path / "no.pt"
    more = [checkpoint if argument == "no.pt" else argument for argument in COMMANDS[command]]
    out = [] if command is evaluate else ["--out", tmp_path / "out"]
    assert said(command, "--data", tmp_path / "nothing", *out, *more).startswith(str(tmp_path))


def test_a_file_in_the_place_of_a_folder(clips, tmp_path, tiny, said):
    (tmp_path / "out").write_text("")
    assert said(vos, "--data", clips, "--out", tmp_path / "out", "--device", "cpu").startswith(f"{tmp_path / 'out'}: ")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80"], ids=["utf-16", "latin"])
@both_systems
def test_a_list_that_is_no_text(system, data, tmp_path, content, said):
    folder = tmp_path / "ImageSets" / ("2017" if system == "vos" else "Segmentation")
    folder.mkdir(parents=True)
    (folder / "train.txt").write_bytes(content)
    message = said(SYSTEMS[system][0], "--data", tmp_path, "--out", tmp_path / "out", "--device", "cpu")
    assert message.startswith(f"{folder / 'train.txt'}: cannot be read")


def test_a_picture_that_its_reader_gives_up_on(scenes, tmp_path, monkeypatch, said):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)  # the reader's own limit against bombs
    (tmp_path / "masks").mkdir()
    assert "cannot be read" in said(evaluate, "--data", scenes, "--masks", tmp_path / "masks")


MAKERS = [vos_synthetic.main, wsss_synthetic.write_scenes, figures.main, cost.main, learn_mask.main, pairformer.main, mask2former_cost.main]


@pytest.mark.parametrize("command", [*(module.main for module in COMMANDS), *MAKERS], ids=lambda command: command.__module__)
def test_every_flag_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli(command, ["--help"])
    assert end.value.code == 0 and "--out" in capsys.readouterr().out or command is evaluate.main
    explained = re.findall(r"^        (\w+): \w", command.__doc__, re.M)
    assert explained == list(inspect.signature(command).parameters)
