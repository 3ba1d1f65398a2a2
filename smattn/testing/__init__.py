"""What the project measures itself with, and its users can: named workloads, seeded inputs, plain PyTorch, and the error budget.

    case = make_case(B=2, H=8, Nq=13, Nk=100, D=32)
    assert_within_budget(run(case, backend="reference"), case)

`run` gives the output and every gradient of the public call, `run_plain` those of plain PyTorch, `run_exact` those in float64.
"""

from .budget import Error, Exact, assert_dead_rows, assert_within_budget, dead_queries, errors, run_exact
from .cases import Case, blob_mask, default_alpha, make_case, run
from .plain import plain, run_plain
from .workloads import WORKLOADS, Workload, workload_case

__all__ = [
    "WORKLOADS",
    "Case",
    "Error",
    "Exact",
    "Workload",
    "assert_dead_rows",
    "assert_within_budget",
    "blob_mask",
    "dead_queries",
    "default_alpha",
    "errors",
    "make_case",
    "plain",
    "run",
    "run_exact",
    "run_plain",
    "workload_case",
]
