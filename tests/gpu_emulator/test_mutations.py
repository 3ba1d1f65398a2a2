"""Mistakes planted in the real kernels are caught: by a check while they run, or because the results leave the budget."""

import random
from collections import Counter

import pytest
import torch

from smattn.testing import assert_within_budget, make_case, run
from tests.gpu_emulator import compile, machine, witness
from tests.gpu_emulator.memory import Fault
from tests.gpu_emulator.mutations import KINDS, MET, decides_on_values_alone, mutant, sites
from tests.support.emulated_triton import ROWS, backend

pytestmark = [pytest.mark.promise("compiled code"), pytest.mark.slow]
SEED, EACH = 21, 8  # mutants of a kind on a chip
CALLS = {
    "many queries": dict(B=1, H=2, Nq=145, Nk=70, D=64, dtype=torch.float16, with_lse=True),
    "few queries": dict(B=1, H=2, Nq=13, Nk=150, D=32, dtype=torch.bfloat16, with_lse=True),
}


def kernels_of(case, arch, monkeypatch):
    """The kernels that the call launches, by name, and the barriers that it needs."""
    found, row = {}, ROWS[arch]

    class Watching(dict):
        def get(self, name, default=None):
            return lambda kernel: witness.watched(found.setdefault(name, kernel))

    witness.NEEDED.clear()
    with monkeypatch.context() as patch:
        patch.setattr(machine, "SharedMemory", witness.Witness)
        patch.setattr(compile, "GlobalMemory", witness.NothingExchanged)
        patch.setattr(row, "changes", Watching())
        assert_within_budget(run(case, backend.name_of(arch)), case)
    return found, witness.NEEDED.copy()


def is_caught(case, arch, name, kernel, site, right, needed):
    """Whether anything is wrong; None where the change is no mistake. right: the results without it. needed: barriers."""
    ROWS[arch].changes = {name: lambda kernel: mutant(kernel, site)}
    try:
        results = run(case, backend.name_of(arch))
        assert_within_budget(results, case)
        caught = False
    except (Fault, AssertionError):
        caught = True
    finally:
        ROWS[arch].changes = {}
    if site.kind == "barrier dropped" and (kernel.name, site.at) not in needed:
        assert not caught, f"{name}: by definition the run does not need {site.text}"
        return None
    if caught:
        return True
    if decides_on_values_alone(kernel, site) and all(torch.equal(results[name], right[name]) for name in right):
        return None
    return False if MET.anything else None


@pytest.mark.parametrize("arch", backend.CHIPS)
def test_nine_mistakes_in_ten_are_caught(arch, capsys, monkeypatch):
    every, right, needed = [], {}, {}
    cases = {name: make_case(**sizes) for name, sizes in CALLS.items()}
    for call, case in cases.items():
        right[call] = run(case, backend.name_of(arch))
        found, needed[call] = kernels_of(case, arch, monkeypatch)
        every += [(call, name, kernel, site) for name, kernel in found.items() for site in sites(kernel)]
    chance, outcomes, missed, left_out = random.Random(SEED), [], [], Counter()
    for kind in KINDS:
        of_kind = [each for each in every if each[3].kind == kind]
        chance.shuffle(of_kind)
        tried = 0
        for call, name, kernel, site in of_kind:
            if tried == EACH:
                break
            caught = is_caught(cases[call], arch, name, kernel, site, right[call], needed[call])
            if caught is None:
                left_out[kind] += 1
                continue
            tried += 1
            outcomes.append((kind, caught))
            if not caught:
                missed.append(f"{kind}, {name} of {call}: {site.text}")
    with capsys.disabled():
        for kind in KINDS:
            caught = [was for of, was in outcomes if of == kind]
            found = sum(each[3].kind == kind for each in every)
            print(f"sm_{arch} {kind}: {sum(caught)} of {len(caught)} caught, {left_out[kind]} left out, {found} sites")
        print("\n".join(missed))
    assert len(outcomes) >= 4 * EACH and sum(was for _, was in outcomes) >= 0.9 * len(outcomes), missed
