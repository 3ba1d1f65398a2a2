"""The backends that this machine must have are there, and they do what the table says."""

import warnings

import pytest

import smattn
from smattn.backends import NAMES, TABLE, resolve
from smattn.testing import make_case, run
from tests.support.expected import BACKENDS, DEVICE, interpreter_breaks

pytestmark = pytest.mark.promise("backends")


def test_the_expected_backends_run_and_no_other():
    problem = make_case(1, 1, 1, 1, 32, device=DEVICE).problem()  # on a machine with a GPU "cpu" runs as well, but on another device
    assert {row.name for row in TABLE if not row.unsupported_reasons(problem, "forward")} == set(BACKENDS)
    assert set(BACKENDS) <= {name for name, status in smattn.backends().items() if status.available}


def test_every_name_of_the_signature_has_a_row_and_a_reason():
    status = smattn.backends()
    assert tuple(status) == NAMES
    assert all(bool(s.reasons) != s.available for s in status.values())
    assert [name for name, s in status.items() if s.notes] == [name for name in ("cpu",) if status[name].available]
    assert all("kernels" in note for note in status["cpu"].notes)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_a_backend_has_is_what_the_table_says(name):
    row = next(row for row in TABLE if row.name == name)
    assert hasattr(row.load(), "attention_map") == BACKENDS[name].attention_map


@pytest.mark.promise("dtypes")
def test_a_backend_refuses_the_dtypes_it_does_not_claim(backend, device):
    claimed = BACKENDS[backend].dtypes
    for dtype in BACKENDS["reference"].dtypes:
        case = make_case(1, 1, 1, 1, 1, dtype=dtype, device=device)
        if dtype in claimed:
            assert run(case, backend)["out"].dtype == dtype
        else:
            with pytest.raises(ValueError, match=f"backend='{backend}' cannot run this call: .*{dtype}"):
                run(case, backend)


def test_none_takes_the_first_of_the_table_that_can():
    considered = [row for row in TABLE if DEVICE in row.default_on]
    problem = make_case(1, 1, 1, 1, 1, device=DEVICE).problem()
    first = next(row for row in considered if not row.unsupported_reasons(problem, "forward"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resolve(problem, "", "forward") is first.load()


VERSIONS = [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.9.0", "2.4.6", True), ("3.6.1", "3.0.0", False)]


@pytest.mark.parametrize("triton, numpy, works", VERSIONS)
def test_an_interpreter_known_to_break_is_a_clear_failure(triton, numpy, works):
    reason = interpreter_breaks(triton, numpy)
    assert reason == "" if works else f"numpy {numpy}" in reason and "pip install" in reason
