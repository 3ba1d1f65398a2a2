"""TMA descriptors: which passes load by them, which operands they can read, and that they give the bits that pointers give."""

from dataclasses import replace

import pytest
import torch

from smattn.testing import make_case, run
from tests.support.expected import BACKENDS
from tests.support.meters import launches_recorded
from tests.support.zero_calls import ZeroCall

if "triton" not in BACKENDS:
    pytest.skip("triton is not expected here", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from smattn.kernels import chip, descriptors, tiles  # noqa: E402
from smattn.kernels.tools import jobs  # noqa: E402

pytestmark = pytest.mark.promise("Triton kernels")
ALL = {"k_ptr", "v_ptr", "q_ptr", "do_ptr"}
MANY = {"forward": {"k_ptr", "v_ptr"}, "dq": {"k_ptr", "v_ptr"}, "dkdv": {"q_ptr", "do_ptr"}, "dmask": ALL}


def loaded(case, arch):
    """For each kernel the arguments that are descriptors, with the tiles of a real chip."""
    with launches_recorded(arch) as recorder:
        recorder.launches = []  # a list of its own keeps the arguments
        run(case, "triton")
    names = {jobs.name_of(kernel): arguments for kernel, arguments, _ in recorder.launches}
    return {name: {key for key, value in arguments.items() if isinstance(value, TensorDescriptor)} for name, arguments in names.items()}


def case_of(device, dtype="float16", Nq=200, **more):
    return ZeroCall(2, 4, Nq, 300, 64, dtype, **more).case(device)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_queries_are_loaded_by_descriptors(device, arch, dtype):
    found = loaded(case_of(device, dtype), arch)
    assert {kernel: found[kernel] for kernel in MANY} == MANY and found["delta"] == set()


def test_pointers_serve_the_rest(device):
    cases = {
        "an older chip": (80, case_of(device)),
        "a smaller one": (120, case_of(device)),
        "float32": (90, case_of(device, "float32")),
        "few queries": (90, case_of(device, Nq=100)),
        "a map": (90, case_of(device, as_map=True)),
    }
    for name, (arch, case) in cases.items():
        found = loaded(case, arch)
        assert len(found) >= 3 and not any(found.values()), (name, found)


def test_padding_is_loaded_where_it_is_not_multiplied_with(device):
    case = case_of(device)
    found = loaded(replace(case, key_padding_mask=torch.zeros(2, 300, dtype=torch.bool, device=device)), 90)
    assert {kernel: found[kernel] for kernel in MANY} == MANY | {"forward": set(), "dq": set()}


def test_one_operand_that_is_askew_sends_its_passes_to_pointers(device):
    case = case_of(device)
    for operand, passes in {"query": {"dkdv", "dmask"}, "key": {"forward", "dq", "dmask"}, "dout": {"dkdv", "dmask"}}.items():
        found = loaded(replace(case, **{operand: askew(getattr(case, operand))}), 90)
        assert {kernel for kernel in MANY if not found[kernel]} == passes, operand


def buffer(*sizes, dtype=torch.float16):
    return torch.zeros(sizes, dtype=dtype)


READ = {
    "contiguous": buffer(2, 3, 50, 64),
    "48 columns": buffer(2, 3, 50, 48, dtype=torch.bfloat16),
    "rows before heads": buffer(2, 50, 3, 64).transpose(1, 2),
    "columns from 8": buffer(2, 3, 50, 72)[..., 8:],
    "a third of the columns": buffer(2, 3, 50, 192)[..., 64:128],
    "every second row": buffer(2, 3, 100, 64)[:, :, 1::2],
    "single rows": buffer(1, 3, 1, 64).as_strided((1, 3, 1, 64), (1, 64, 3, 1)),
    "small": buffer(1, 1, 1, 8),
}
NOT_READ = {
    "float32": buffer(2, 3, 50, 64, dtype=torch.float32),
    "base": buffer(2, 3, 50, 72)[..., 4:68],
    "row stride": buffer(2, 3, 50, 68)[..., :64],
    "narrow rows": buffer(2, 3, 50, 20),
    "columns apart": buffer(2, 3, 50, 128)[..., ::2],
    "transposed": buffer(2, 3, 64, 50).mT,
    "one head": buffer(2, 1, 50, 64).expand(2, 3, 50, 64),
    "one batch": buffer(1, 3, 50, 64).expand(2, 3, 50, 64),
    "one number": buffer(1).expand(2, 3, 50, 64),
    "overlapping rows": buffer(2, 3, 50 * 64).as_strided((2, 3, 40, 64), (9600, 3200, 32, 1)),
    "no columns": buffer(2, 3, 50, 64)[..., :0],
    "two gigabytes": torch.empty(8, 16, 2**16, 128, dtype=torch.float16, device="meta"),
}


@pytest.mark.parametrize("tensor", READ.values(), ids=READ)
def test_what_tma_reads(tensor):
    assert descriptors.readable(tensor)
    block = descriptors.blocks(tiles.Tile(16, 32, 4, 1, tma=True), k_ptr=tensor)["k_ptr"]
    assert block.block_shape == [1, 1, 32, tiles.block_of(tensor.shape[-1])] and block.shape == list(tensor.shape)
    assert all(stride % 8 == 0 and stride > 0 for stride in block.strides[:-1]) and block.strides[-1] == 1


@pytest.mark.parametrize("tensor", NOT_READ.values(), ids=NOT_READ)
def test_what_tma_does_not_read(tensor):
    assert not descriptors.readable(tensor)


def askew(tensor):
    """The same numbers in rows an odd number of elements apart, where no descriptor can read them."""
    return torch.cat([tensor, tensor[..., :1]], -1)[..., :-1]


def test_the_table_has_descriptors_for_16_bits_on_chips_that_have_tma():
    marked = {key for key, tile in tiles.TABLE.items() if tile.tma}
    assert {key.kernel for key in marked} == set(MANY) and {(key.chip, key.bytes) for key in marked} == {(90, 2), (100, 2)}


CASES = {
    "odd sizes": dict(B=1, H=2, Nq=135, Nk=45, D=48),
    "grouped heads and dropout": dict(B=1, H=4, Hkv=2, Nq=130, Nk=31, D=16, dropout_p=0.3),
    "padding of NaN": dict(B=2, H=1, Nq=130, Nk=70, D=32, padded=0.4),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_descriptors_give_the_bits_of_pointers(device, monkeypatch, sizes, dtype):
    case = make_case(**sizes, dtype=dtype, mask_dtype=dtype, device=device)
    if case.key_padding_mask is not None:
        hidden = case.key_padding_mask[:, None, :, None]
        hidden[0] = True  # a batch element without keys, whose dO may be anything
        case = replace(case, key=case.key.masked_fill(hidden, torch.nan), value=case.value.masked_fill(hidden, torch.inf))
        case.dout[0] = torch.nan
    taken, make = [], descriptors.blocks
    monkeypatch.setattr(descriptors, "blocks", lambda *args, **more: taken.append(set(made := make(*args, **more))) or made)
    straight = run(case, "triton")
    if chip.arch_of(case.query.device) == chip.INTERPRETER:
        padding = case.key_padding_mask is not None
        assert [operands for operands in taken if operands] == ([] if padding else [MANY["forward"]]) + [
            MANY[kernel] for kernel in ("dkdv", "dq", "dmask") if kernel != "dq" or not padding
        ]
    taken.clear()
    turned = run(replace(case, **{name: askew(getattr(case, name)) for name in ("query", "key", "value", "dout")}), "triton")
    assert taken and not any(taken)
    for name, tensor in straight.items():
        assert torch.equal(tensor, turned[name]) and tensor.isfinite().all(), name
