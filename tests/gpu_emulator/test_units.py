"""The emulator by itself: small kernels compiled for both chips compute what torch computes."""

import pytest

from tests.gpu_emulator import own_kernels
from tests.gpu_emulator.compile import launch, state_of

pytestmark = pytest.mark.promise("compiled code")
TRIALS = [*own_kernels.matmuls(), *own_kernels.others()]


def tried(trial, arch):
    for name in trial.outputs:
        trial.arguments[name].fill_(-1)
    states = {trial.arguments[name].untyped_storage().data_ptr(): state_of(trial.arguments[name]) for name in trial.outputs}
    launched = launch(trial.kernel, trial.programs, trial.arguments, trial.tile(), arch, states)
    for name, expected in trial.outputs.items():
        got = trial.arguments[name]
        scale = expected.double().abs().clamp_min(1) if "numbers" in trial.name else 1
        assert ((got.double() - expected.double()).abs() / scale).max() <= trial.tolerance, name
    return launched.counts.opcodes


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_products_reductions_and_transposes(part, arch):
    for trial in TRIALS[part::10]:
        assert tried(trial, arch), trial.name


def test_blocks_that_tensor_descriptors_load():
    for trial in own_kernels.descriptors():
        assert any(opcode.startswith("cp.async.bulk.tensor") for opcode in tried(trial, 90)), trial.name
