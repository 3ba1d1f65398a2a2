"""Training that resumes, for both systems that train by examples/shared/resumable.py."""

from __future__ import annotations

import csv
from collections.abc import Callable

import pytest
import torch

from examples.shared.resumable import Resumable, train
from examples.vos import train as vos
from examples.vos.data import read_clips
from examples.wsss import train as wsss
from examples.wsss.data import read_scenes
from tests.support import vos_clips, wsss_scenes

pytestmark = pytest.mark.promise("examples")

clips, scenes = vos_clips.written, wsss_scenes.written
Make = Callable[..., Resumable]  # seed -> a trainer that has made no step


@pytest.fixture(params=["vos", "wsss"])
def trainer(request: pytest.FixtureRequest) -> Make:
    if request.param == "vos":
        root = request.getfixturevalue("clips")
        return lambda seed=0: vos.Trainer(vos.Run(vos_clips.TINY, seed=seed), read_clips(root, "train"))
    data = read_scenes(request.getfixturevalue("scenes"), "train")
    return lambda seed=0: wsss.Trainer(wsss.Run(wsss_scenes.TINY, data.classes, seed), data)


def run_to_the_end(trainer: Resumable, out, **options):
    train(trainer, out, save_every=2, **options)
    return trainer.model.state_dict(), (out / "log.csv").read_bytes()


def test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit(trainer, tmp_path):
    weights, log = run_to_the_end(trainer(), tmp_path / "whole")
    train(trainer(), tmp_path / "parts", save_every=2, stop=4)
    with open(tmp_path / "parts" / "log.csv", "a") as file:
        file.write("5,1,1,1,1,1\n")  # as if the run was killed after the checkpoint
    torch.rand(7)  # the process draws something else
    again, log_again = run_to_the_end(trainer(), tmp_path / "parts", resume=True)
    assert log_again == log and len(list(csv.reader(log.decode().splitlines()))) == 1 + trainer().run.config.steps
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_checkpoint_of_another_run_is_refused(trainer, tmp_path):
    train(trainer(), tmp_path, stop=1, save_every=1)
    with pytest.raises(ValueError, match="a checkpoint of another run"):
        train(trainer(seed=1), tmp_path, resume=True)
