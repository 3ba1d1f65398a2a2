"""What is counted in machine code: the inner loop found by its branch back, and its units' cycles checked by hand."""

import pytest

loops = pytest.importorskip("smattn.kernels.tools.loops")
counts = pytest.importorskip("smattn.kernels.tools.counts")

pytestmark = pytest.mark.promise("Triton kernels")
# A prologue with a product, an outer loop, in it the inner one with a wait that spins out of line, and an exit.
CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0030*/                   MUFU.EX2 R3, R3 ;
.L_x_2:
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56, gsb0 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R4 ;
        /*0070*/              @!P1 BRA `(.L_x_5) ;
.L_x_6:
        /*0080*/                   MUFU.EX2 R7, R7 ;
        /*0090*/                   MUFU.EX2 R8, R8 ;
        /*00a0*/                   STS.128 [R2], R4 ;
        /*00b0*/                   LDSM.16.M88.4 R4, [R2] ;
        /*00c0*/                   LDS R9, [R2] ;
        /*00d0*/              @!P0 BRA `(.L_x_2) ;
        /*00e0*/              @!P2 BRA `(.L_x_1) ;
.L_x_9:
        /*00f0*/                   EXIT ;
.L_x_5:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], R4 ;
        /*0110*/              @!P1 BRA `(.L_x_5) ;
        /*0120*/                   BRA `(.L_x_6) ;
.L_x_10:
        /*0130*/                   BRA `(.L_x_10);
"""
TTIR = """
      %m = tt.dot %z, %z, %m : tensor<64x16xf16> * tensor<16x64xf16> -> tensor<64x64xf32>
          %s = tt.dot %q, %k, %c : tensor<64x32xf16> * tensor<32x64xf16> -> tensor<64x64xf32> loc(#1)
"""


def test_the_inner_loop_is_the_one_within_the_others():
    loop = loops.inner_loop(CODE)
    assert loop.instructions == 13, "ten of its own, and the three that wait out of line"
    assert (loop.exponentials, loop.hmma) == (2, 0)
    assert loop.flops == loop.hgmma == 2 * (2 * 64 * 64 * 16) / 4, "four warps execute a wgmma together"
    both, one = (64 + 64) * 16 * 2 / 128, 64 * 16 * 2 / 128
    assert loop.passes == (both + one) / 4 + 4 + 4 + 1


def test_of_a_loop_and_its_copy_for_the_last_block_the_one_without_tests_is_counted():
    whole, tested = (f".L_x_{n}:\nMUFU.EX2 R3, R3 ;\n{more}@P0 BRA `(.L_x_{n}) ;\n" for n, more in enumerate(("", "NOP ;\n")))
    assert loops.inner_loop(tested + "EXIT ;").instructions == 3
    assert all(loops.inner_loop(code + "EXIT ;").instructions == 2 for code in (whole + tested, tested + whole))
    loop = "        scf.for %i = %a to %b {" + TTIR
    assert counts.count(loops.Loop(), 4, {"BLOCK_M": 64, "BLOCK_N": 64}, loop + loop).needed == 2 * 64 * 32 * 64


def test_code_without_a_loop_has_none():
    assert loops.inner_loop(CODE.replace("@!P0 BRA `(.L_x_2)", "NOP").replace("@!P2 BRA `(.L_x_1)", "NOP")) == loops.Loop()


def test_what_it_costs_by_hand():
    loop = loops.Loop(instructions=600, exponentials=70, flops=262144.0, hgmma=262144.0, passes=144.0)
    counted = counts.count(loop, 4, {"BLOCK_M": 64, "BLOCK_N": 64}, TTIR)
    assert counted.cycles(90) == (600.0, 560.0, 256.0, 576.0)
    assert counted.cycles(90).together() == 856
    assert counted.needed == 2 * 64 * 32 * 64, "of the deepest loop alone"
    assert counted.exp2_a_score() == 70 * 32 * 4 / 64**2
    wider = counts.count(loop, 8, {"BLOCK_M": 128, "BLOCK_N": 128}, TTIR)
    assert wider.cycles(90) == tuple(cycles / 2 for cycles in counted.cycles(90))
    assert counts.count(loop, 4, {"BLOCK_M": 64}, "").figures(90) == ("",) * 6


def test_tf32_takes_a_tensor_core_twice_as_long():
    code = "\n".join(("HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", "HMMA.1688.F32.TF32 R4, R8, R12, R4 ;"))
    loop = loops.inner_loop(f".L_x_0:\n{code}\n@P0 BRA `(.L_x_0) ;\nEXIT ;\n")
    assert (loop.flops, loop.hmma, loop.instructions) == (4096 + 2048, 4096 + 2 * 2048, 3)
    counted = counts.count(loop, 4, {"BLOCK_M": 64, "BLOCK_N": 64}, TTIR)
    assert counted.cycles(80).tensor == 4 * (4096 + 2 * 2048) / 2048


def test_each_kind_of_product_at_its_own_rate():
    """Small products are HMMA on a chip that has wgmma as well. Where tensor memory is used, the sizes do not stand in the code."""
    lines = ["HMMA.16816.F32.BF16 R4, R8, R12, R4 ;", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;"]
    codes = ("\n".join((".L_x_0:", *lines, more, "@P0 BRA `(.L_x_0) ;", "EXIT ;")) for more in ("", "UTCHMMA gdesc[UR4] ;"))
    mixed, unknown = map(loops.inner_loop, codes)
    of = {"BLOCK_M": 64, "BLOCK_N": 64}
    assert counts.count(mixed, 4, of, TTIR).cycles(90).tensor == 4 * (4096 / 2048 + 2 * 64 * 64 * 16 / 4 / 4096)
    figures = counts.count(unknown, 4, of, TTIR).figures(100)
    assert figures[2] == figures[5] == "" and all(figures[:2])


def test_a_branch_of_threads_that_are_apart_goes_both_ways():
    code = ".L_x_0:\nMUFU.EX2 R3, R3 ;\nBRA.DIV UR4, `(.L_x_1) ;\n.L_x_2:\n@P0 BRA `(.L_x_0) ;\nEXIT ;\n.L_x_1:\nNOP ;\nBRA `(.L_x_2) ;\n"
    assert loops.inner_loop(code).instructions == 5


@pytest.mark.parametrize(
    "exponentials, flops, said",
    [(1.06, 1.0, ""), (1.12, 1.0, "1.12 exp2 a score"), (2.19, 1.0, "2.19 exp2 a score"),
     (1.0, 1.5, "1.50 times the products needed"), (1.0, 1.09, "")],
)
def test_what_is_computed_twice_is_a_failure(exponentials, flops, said):
    loop = loops.Loop(600, exponentials * 4096 / 128, flops * 2 * 64 * 32 * 64 / 4)
    counted = counts.count(loop, 4, {"BLOCK_M": 64, "BLOCK_N": 64}, TTIR)
    assert counts.excess(counted, 64, logits=False) == said


def test_logits_may_have_an_exponential_of_their_own():
    counted = counts.count(loops.Loop(600, 2 * 32), 4, {"BLOCK_M": 64, "BLOCK_N": 64}, TTIR)
    assert [counts.excess(counted, 64, logits) for logits in (False, True)] == ["2.00 exp2 a score", ""]
