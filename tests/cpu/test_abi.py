"""The compiled extension: the symbols that it takes from torch, and the dropout bits, compared with Philox in numpy."""

import re
import subprocess

import numpy as np
import pytest
import torch

from smattn import cpu
from tests.support.philox import philox, words

# Random123's known answers for philox4x32 with 10 rounds: counter, key, block.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, -1, 0x299F31D0A4093822, -(2**63)]


@pytest.fixture(scope="module", autouse=True)
def extension():
    if cpu.reasons():
        pytest.fail("\n".join(cpu.reasons()))


@pytest.fixture
def dropout_keep():
    return torch.ops.smattn_cpu.dropout_keep


@pytest.mark.promise("dropout")
@pytest.mark.parametrize("counter, key, block", KNOWN_ANSWERS)
def test_the_numpy_philox_gives_the_published_answers(counter, key, block):
    assert tuple(int(word) for word in philox(counter, key)) == block


@pytest.mark.promise("dropout")
@pytest.mark.parametrize("seed", SEEDS)
def test_dropout_compares_exactly_the_philox_word_with_p(dropout_keep, seed):
    expected = words(seed, 2, 3, 5, 7)
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 4, 6), (0, 2, 3, 1), (1, 0, 0, 5)]:
        word = int(expected[b, h, i, j])
        at, above = (dropout_keep(torch.tensor([seed]), 2, 3, 5, 7, w / 2**32)[b, h, i, j].item() for w in (word, word + 1))
        assert (at, above) == (True, False)


@pytest.mark.promise("dropout")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 13, 1000), (3, 1, 700, 33)])
def test_dropout_bits_do_not_depend_on_the_threads(dropout_keep, shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        keep = dropout_keep(torch.tensor([SEEDS[3]]), *shape, 0.3)
    finally:
        torch.set_num_threads(before)
    assert keep.dtype == torch.bool
    np.testing.assert_array_equal(keep.numpy(), words(SEEDS[3], *shape) >= int(0.3 * 2**32))


@pytest.mark.promise("dropout")
@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
def test_dropout_bits_of_nothing_are_nothing(dropout_keep, shape):
    assert dropout_keep(torch.tensor([0]), *shape, 0.5).shape == shape


@pytest.mark.promise("dropout")
@pytest.mark.parametrize(
    "seed, shape, p, message",
    [
        (torch.tensor([0]), (1, 1, 1, 1), 1.0, "expected 0 <= p < 1, got 1"),
        (torch.tensor([0]), (1, 1, 1, 1), -0.1, "expected 0 <= p < 1"),
        (torch.tensor([0]), (1, 1, 1, 1), float("nan"), "expected 0 <= p < 1"),
        (torch.tensor([0.0]), (1, 1, 1, 1), 0.5, "seed: expected one int64 element"),
        (torch.tensor([0, 1]), (1, 1, 1, 1), 0.5, "seed: expected one int64 element"),
        (torch.tensor([0]), (1, 1, -1, 1), 0.5, "expected none below 0"),
    ],
)
def test_dropout_refuses(dropout_keep, seed, shape, p, message):
    with pytest.raises(RuntimeError, match=message):
        dropout_keep(seed, *shape, p)


@pytest.mark.promise("CPU kernels")
def test_only_the_stable_abi_of_torch_is_imported():
    imported = subprocess.run(["nm", "-DC", "--undefined-only", cpu.LIBRARY.path], check=True, capture_output=True, text=True).stdout
    names = [line.split(maxsplit=1)[1] for line in imported.splitlines()]
    assert [name for name in names if re.search(r"\b(at|c10|torch|caffe2)::", name)] == []
    assert [name for name in names if "torch" in name and not re.fullmatch(r"(aoti_)?torch_\w+", name)] == []
    assert "torch_parallel_for" in names and "aoti_torch_library_def" in names  # nm has read the table indeed


@pytest.mark.promise("CPU kernels")
def test_the_extension_belongs_to_no_python_version():
    imported = subprocess.run(["nm", "-D", "--undefined-only", cpu.LIBRARY.path], check=True, capture_output=True, text=True).stdout
    assert re.findall(r"\b_?Py[A-Z_]\w*", imported) == []
