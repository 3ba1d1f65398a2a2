"""What all tests share: which backends a test runs over, how a run is set up, and the count of skipped tests at its end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, so this comes first; 0: the emulated chips

import hypothesis
import numpy

import smattn
from smattn import prepared
from tests.support import promises
from tests.support.expected import BACKENDS, DEVICE, INTERPRETED, interpreter_breaks, names

# Every run draws the same examples. They are not shrunk, because that takes minutes where kernels are interpreted.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None, print_blob=False, phases=PHASES)
hypothesis.settings.load_profile("suite")

if not (Path(smattn.__file__).parents[1] / "setup.py").exists():
    # Processes that tests start from the root are to find the package that is installed too, and not its source there.
    os.environ.setdefault("PYTHONSAFEPATH", "1")

torch.set_num_threads(1)  # the tensors are tiny
if INTERPRETED:
    from tests.support.interpreter import search_once

    search_once()


def pytest_configure(config: pytest.Config) -> None:
    # the interpreter computes log2(0) and the like, which kernels mask out
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:smattn runs on the reference:UserWarning")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--promises", action="store_true", help="print which tests hold which promise of tests/README.md, and run none")
    parser.addoption("--no-skips", action="store_true", help="a skipped test is a failure, and so is a run without a test that passed")


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not config.getoption("--promises"):
        return None
    print(promises.table(), end="")
    return 0


ON_THE_DEVICE = {"device", "backend", "map_backend", "fused_backend"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_THE_DEVICE & set(getattr(item, "fixturenames", ())):
            item.add_marker("device")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends an xdist worker that has lost its GPU, as after a kernel that read where it must not. Later tests get a new worker."""
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    outcomes, option = session.config.pluginmanager.get_plugin("terminalreporter"), session.config.getoption
    if outcomes is None or not option("--no-skips") or option("--collect-only"):
        return
    if outcomes.stats.get("skipped") or not outcomes.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, those in {
        "backend": names(),
        "map_backend": names(attention_map=True),
        "fused_backend": names(fused=True),
    }.items():
        if fixture not in metafunc.fixturenames:
            continue
        if "dtype" in metafunc.fixturenames:
            pairs = [(name, dtype) for name in those for dtype in BACKENDS[name].dtypes]
            metafunc.parametrize((fixture, "dtype"), pairs, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in pairs])
        else:
            metafunc.parametrize(fixture, those)


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _calls_are_made_anew() -> None:
    """A test that changes what decides a call must not be handed the launches of an earlier test."""
    prepared.forget()


@pytest.fixture(autouse=True)
def _interpreter_works(request: pytest.FixtureRequest) -> None:
    """Says why where Triton's interpreter is known to break, instead of letting each test find out."""
    callspec = getattr(request.node, "callspec", None)
    if not INTERPRETED or callspec is None or "triton" not in callspec.params.values():
        return
    import triton

    reason = interpreter_breaks(triton.__version__, numpy.__version__)
    if reason:
        pytest.fail(reason)


def pytest_terminal_summary(terminalreporter) -> None:
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    terminalreporter.section("skipped, by reason")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4}  {reason}")
    terminalreporter.line(f"{sum(reasons.values())} skipped on {DEVICE}, where {', '.join(BACKENDS)} must run")
