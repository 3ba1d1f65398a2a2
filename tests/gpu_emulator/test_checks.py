"""What the emulator refuses and what it finds, each on a few lines of PTX written for it."""

import numpy as np
import pytest

from tests.gpu_emulator import machine
from tests.gpu_emulator.counters import Counts
from tests.gpu_emulator.memory import Fault, GlobalMemory
from tests.gpu_emulator.parser import Refused, parse
from tests.gpu_emulator.tensor_copies import TensorMap

pytestmark = pytest.mark.promise("compiled code")
MODULE = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry tried(.param .u64 data) .reqntid THREADS
{
    .reg .pred %p<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [data];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    mov.b32 %r3, memory;
    shl.b32 %r4, %r1, 2;
    add.s32 %r5, %r3, %r4;
    xor.b32 %r6, %r4, 128;
    add.s32 %r7, %r3, %r6;
    BODY
    ret;
}
"""
OWN, OTHERS = "%r5", "%r7"  # a word of shared memory of each thread, and that of a thread of the other warp


def run(body, programs=1, shared=256, holds=None, threads=64, size=256):
    """What 64 words of memory hold afterwards, which are a tensor of one axis too, copied by 32. size: of the bytes that belong to it."""
    (kernel,) = parse(MODULE.replace("THREADS", str(threads)).replace("BODY", body)).values()
    data = np.arange(64, dtype=np.uint32)
    memory = GlobalMemory()
    state = None if holds is None else np.where(np.arange(256) < holds, 3, 1).astype(np.uint8)
    address = memory.add(data.view(np.uint8)[:size], 0, state)
    launch = machine.Launch(
        machine.Compiled.of(kernel), (programs, 1, 1), threads, shared, address.to_bytes(8, "little"),
        {0: TensorMap(address, (64,), (4,), (32,), 4, 0)}, memory, Counts(detailed=True),
    )  # fmt: skip
    machine.run(launch)
    return data


ARITHMETIC = {
    "a field that begins past the sign is the sign": ("mov.b32 %r8, -3; bfe.s32 %r9, %r8, 40, 5;", 0xFFFFFFFF),
    "a field that begins past the top is nothing": ("mov.b32 %r8, -3; bfe.u32 %r9, %r8, 40, 5;", 0),
    "NaN is NaN in TF32": ("mov.b32 %r8, 0x7fffffff; cvt.rna.tf32.f32 %r9, %r8;", 0x7FFFFFFF),
    "what was never written is NaN in TF32": ("cvt.rna.tf32.f32 %r9, %r30;", 0x7FFFFFFF),
    "TF32 is to nearest, and ties away from zero": ("mov.b32 %r8, 0x3f801000; cvt.rna.tf32.f32 %r9, %r8;", 0x3F802000),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_results_at_the_ends_of_the_range(name):
    body, expected = ARITHMETIC[name]
    assert (run(f"{body} st.global.b32 [%rd2], %r9;") == expected).all()


UNKNOWN = "frobnicate.b32 %r8, %r1;", "add.sat.s32 %r8, %r1, %r2;", "mma.sync.aligned.m8n8k4.row.col.f64.f64 %r8, %r1, %r2;"


@pytest.mark.parametrize("line", UNKNOWN)
def test_an_opcode_that_is_not_known_is_refused_by_name_and_line(line):
    with pytest.raises(Refused, match=rf"line 20: {line.split()[0]}".replace(".", r"\.")):
        run(line)


def test_lines_are_counted_past_those_that_say_where_code_comes_from():
    with pytest.raises(Refused, match="line 23: frobnicate"):
        run("\n\n.loc 1 2 3\nfrobnicate.b32 %r8, %r1;")


def test_threads_that_branch_apart_meet_again():
    body = """
    mov.b32 %r8, 0;
    loop:
    add.s32 %r8, %r8, 3;
    setp.lt.u32 %p1, %r8, %r1;
    @%p1 bra loop;
    setp.gt.u32 %p2, %r1, 40;
    @%p2 bra far;
    add.s32 %r8, %r8, 1000;
    bra.uni done;
    far: add.s32 %r8, %r8, 2000;
    done: st.global.b32 [%rd2], %r8;"""
    n = np.arange(64)
    assert (run(body) == np.maximum(3, (n + 2) // 3 * 3) + np.where(n > 40, 2000, 1000)).all()


RIGHT = f"st.shared.b32 [{OWN}], %r1; bar.sync 0; ld.shared.b32 %r8, [{OTHERS}]; st.global.b32 [%rd2], %r8;"


def test_warps_exchange_words_by_a_barrier():
    assert (run(RIGHT) == np.arange(64) ^ 32).all()


def test_bits_are_put_in_the_place_of_others():
    n = np.arange(64)
    body = "mov.b32 %r8, -1; bfi.b32 %r9, %r1, %r8, 4, 5; bfi.b32 %r10, %r1, 0, 30, 9; xor.b32 %r9, %r9, %r10; st.global.b32 [%rd2], %r9;"
    expected = ((0xFFFFFFFF & ~(31 << 4)) | ((n & 31) << 4)) ^ (n << 30 & 0xFFFFFFFF)
    assert (run(body) == expected).all()


def test_parameters_are_found_by_computed_addresses():
    body = "mov.b64 %rd4, data; add.s64 %rd4, %rd4, -8; ld.param.u64 %rd5, [%rd4+8]; sub.s64 %rd5, %rd5, %rd1; cvt.u32.u64 %r8, %rd5;"
    assert not run(body + "st.global.b32 [%rd2], %r8;").any()


def test_a_copy_reads_a_part_of_its_bytes_and_the_rest_are_zeros():
    """Of 16 bytes a thread of the first 16 reads as many as its number, and no more of memory than that holds anything."""
    read = "setp.lt.u32 %p1, %r1, 16; shl.b32 %r8, %r1, 4; add.s32 %r8, %r8, %r3; mul.wide.u32 %rd3, %r1, 16; add.s64 %rd3, %rd3, %rd1;"
    copy = "@%p1 cp.async.cg.shared.global [%r8], [%rd3], 16, %r1; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
    got = run(f"{read} {copy} ld.shared.b32 %r9, [{OWN}]; st.global.b32 [%rd2], %r9;", holds=255).view(np.uint8).reshape(16, 16)
    expected = np.arange(64, dtype=np.uint32).view(np.uint8).reshape(16, 16)
    assert (got == np.where(np.arange(16) < np.arange(16)[:, None], expected, 0)).all()


COPY = f"cp.async.ca.shared.global [{OWN}], [%rd2], 4; cp.async.commit_group; WAIT ld.shared.b32 %r8, [{OWN}];"
BARRIER = "add.s32 %r9, %r3, 128; setp.eq.s32 %p1, %r1, 0; @%p1 mbarrier.init.shared::cta.b64 [%r9], 1; bar.sync 0; "
WAIT = "again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra again;"
ARRIVE = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r9]; "
SENT = """
    mov.b64 %rd4, data; mov.b32 %r10, 16;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 128;
    @%p1 cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd4, {%r10}], [%r9]; """
FIRST_WORDS = f"setp.lt.u32 %p3, %r1, 32; @%p3 st.shared.b32 [{OWN}], %r1;"
# Two matrices of 8 rows of 16 bytes, of zeros, in 256 bytes; and a product with that of 64 rows in registers.
ZEROS = f"mov.b32 %r8, 0; setp.lt.u32 %p3, %r1, 64; @%p3 st.shared.b32 [{OWN}], %r8; fence.proxy.async.shared::cta; bar.sync 0;"
PRODUCT = f"""
    mov.b64 %rd4, {64 | 8 << 16 | 16 << 32}; mov.pred %p4, 0; wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r20, %r21, %r22, %r23}}, {{%r8, %r8, %r8, %r8}}, %rd4, %p4, 1, 1, 0;
    wgmma.commit_group.sync.aligned; """
WRONG = {
    "a store past the end": ("memcheck", "st.global.b32 [%rd2+4], %r1;"),
    "a load before the start": ("memcheck", "ld.global.b32 %r8, [%rd2+-4];"),
    "a misaligned load": ("memcheck", "setp.lt.s32 %p1, %r1, 9; @%p1 ld.global.v2.b32 {%r8, %r9}, [%rd2];"),
    "a load of shared memory that holds nothing": ("memcheck", f"ld.shared.b32 %r8, [{OWN}];"),
    "a load outside of shared memory": ("memcheck", f"ld.shared.b32 %r8, [{OWN}+4];"),
    "a load past a barrier that is missing": ("racecheck", RIGHT.replace("bar.sync 0;", "")),
    "a store past a barrier that is missing": ("racecheck", RIGHT + f"st.shared.b32 [{OWN}], %r8;"),
    "a copy that was not waited for": ("racecheck", COPY.replace("WAIT", "")),
    "a copy in a later group than was waited for": ("racecheck", COPY.replace("WAIT", "cp.async.wait_group 1;")),
    "a copy that outlives the program": ("racecheck", f"cp.async.ca.shared.global [{OWN}], [%rd2], 4;"),
    "a warp that reads what another stored to global memory": ("racecheck", "st.global.b32 [%rd2], %r1; xor.b32 %r8, %r1, 32;"
                                                                "mad.wide.u32 %rd3, %r8, 4, %rd1; ld.global.b32 %r9, [%rd3];"),
    "a warp that stores over what another loads from global memory": ("racecheck", "xor.b32 %r8, %r1, 32; mad.wide.u32 %rd3, %r8, 4, %rd1;"
                                                                      "ld.global.b32 %r9, [%rd3]; st.global.b32 [%rd2], %r9;"),
    "different values at one address": ("repeatability", "st.global.b32 [%rd1], %r1;"),
    "different values at one address of shared memory": ("repeatability", "st.shared.b32 [%r3], %r1;"),
    "a copy that reads more bytes than it writes": ("memcheck", f"cp.async.ca.shared.global [{OWN}], [%rd2], 4, 5;"),
    "a load past the parameters": ("memcheck", "mov.b64 %rd4, data; ld.param.u64 %rd5, [%rd4+8];"),
    "a barrier that half of the threads come to": ("deadlock", "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;"),
    "a shuffle of the lanes that a mask names": ("refused", "shfl.sync.bfly.b32 %r8, %r1, 1, 31, 255;"),
    "a shuffle of half a warp": ("deadlock", "setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;"),
    "an mbarrier at which nobody arrives": ("deadlock", BARRIER + WAIT),
    "an mbarrier that nobody made": ("memcheck", "add.s32 %r9, %r3, 128; " + WAIT),
    "an mbarrier that another warp made": ("racecheck", BARRIER.replace("bar.sync 0;", "") + WAIT),
    "an mbarrier that ends while others wait for it": ("racecheck", BARRIER + ARRIVE + WAIT + "@%p1 mbarrier.inval.shared::cta.b64 [%r9];"),
    "an mbarrier where others still load": ("racecheck", f"st.shared.b32 [{OWN}], %r1; bar.sync 0; ld.shared.b32 %r8, [{OWN}];" + BARRIER),
    "an mbarrier where others stored": ("racecheck", f"st.shared.b32 [{OWN}], %r1;" + BARRIER),
    "a store over an mbarrier": ("racecheck", BARRIER + f"st.shared.b32 [{OWN}], %r1;"),
    "a barrier of one of two programs": ("refused", "setp.eq.u32 %p1, %r2, 0; @%p1 bar.sync 0;", 2),
    "a wait for copies of one warp": ("refused", "setp.lt.u32 %p1, %r1, 32; " + COPY.replace("WAIT", "@%p1 cp.async.wait_group 0;")),
    "a fence of one thread": ("refused", "setp.eq.u32 %p1, %r1, 0; @%p1 fence.proxy.async.shared::cta;"),
    "a wait of one warp": ("refused", BARRIER + ARRIVE + "setp.lt.u32 %p3, %r1, 32;" + WAIT.replace(": ", ": @%p3 ")),
    "a copy over what another warp stored": ("racecheck", f"st.shared.b32 [{OTHERS}], %r1;"
                                             + COPY.replace("WAIT", "cp.async.wait_group 0;")),
    "a tensor copy over what threads stored": ("racecheck", FIRST_WORDS + BARRIER + SENT),
    "a tensor copy where another warp stored": ("racecheck", f"{BARRIER} setp.ge.u32 %p3, %r1, 32; @%p3 st.shared.b32 [{OTHERS}], %r1;"
                                                        "fence.proxy.async;" + SENT),
    "a tensor copy that is not waited for": ("racecheck", BARRIER + SENT + f"@%p1 ld.shared.b32 %r8, [{OWN}];"),
    "a tensor copy while others wait for the one before": ("racecheck", BARRIER + SENT + WAIT + SENT),
}  # fmt: skip
# Again with another sum or factor, and no fence behind what is new.
AGAIN = PRODUCT.replace("wgmma.fence.sync.aligned;", "").replace("mov.pred %p4, 0", "mov.pred %p4, 1") + "wgmma.wait_group.sync.aligned 0;"
WAITED = ZEROS + PRODUCT + "wgmma.wait_group.sync.aligned 0;"
WRONG_PRODUCTS = {
    "no fence before the first": ZEROS + PRODUCT.replace("wgmma.fence.sync.aligned;", ""),
    "no fence after a sum was changed": WAITED + "add.f32 %r20, %r20, %r20;" + AGAIN,
    "no fence after a fragment was changed": WAITED + "add.s32 %r8, %r8, %r1;" + AGAIN,
    "no fence for what threads stored": ZEROS.replace("fence.proxy.async.shared::cta;", "") + PRODUCT,
    "no barrier after what threads stored": ZEROS.replace("bar.sync 0;", "") + PRODUCT,
    "an operand that is stored over": ZEROS + PRODUCT + f"@%p3 st.shared.b32 [{OWN}], %r8; wgmma.wait_group.sync.aligned 0;",
    "a fragment that is written over": ZEROS + PRODUCT + "mov.b32 %r8, 1; wgmma.wait_group.sync.aligned 0;",
    "a sum that is written over": ZEROS + PRODUCT + "mov.b32 %r20, 1; wgmma.wait_group.sync.aligned 0;",
    "no wait": ZEROS + PRODUCT,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_and_the_instruction_named(name):
    kind, body, *programs = WRONG[name]
    with pytest.raises(Fault, match="tried, line ") as raised:
        run(body, *programs)
    assert raised.value.kind == kind, raised.value


@pytest.mark.parametrize("name", WRONG_PRODUCTS)
def test_wrong_products_of_a_warpgroup_are_found(name):
    with pytest.raises(Fault, match="racecheck"):
        run(WRONG_PRODUCTS[name], threads=128)


def test_a_product_may_be_added_to_without_another_fence():
    assert not run(WAITED + AGAIN + "@%p3 st.global.b32 [%rd2], %r20;", threads=128).any()


def test_a_product_of_a_warpgroup_holds_nan_until_it_is_waited_for():
    body = ZEROS + PRODUCT + "mov.b32 %r24, %r20; wgmma.wait_group.sync.aligned 0; or.b32 %r25, %r20, %r1; @%p3 st.global.b32 [%rd2], "
    assert np.isnan(run(body + "%r24;", threads=128).view(np.float32)).all()
    assert (run(body + "%r25;", threads=128) == np.arange(64)).all()


def test_a_tensor_copy_lands_at_its_mbarrier():
    read = f"setp.lt.u32 %p3, %r1, 32; @%p3 ld.shared.b32 %r8, [{OWN}]; @%p3 st.global.b32 [%rd2], %r8;"
    for before in ("", FIRST_WORDS + "fence.proxy.async;"):
        assert (run(before + BARRIER + SENT + WAIT + read)[:32] == np.arange(16, 48)).all()


def test_a_load_of_memory_that_holds_nothing_is_found():
    body = "ld.global.b32 %r8, [%rd2]; st.global.b32 [%rd2], %r8;"
    assert (run(body, holds=256) == np.arange(64)).all()
    with pytest.raises(Fault, match="memcheck.*never written"):
        run(body, holds=128)


@pytest.mark.parametrize("access", ["st.global.b32 [%rd2], %r1;", "ld.global.b32 %r8, [%rd2];"])
def test_an_access_half_of_which_is_past_the_end_is_found(access):
    with pytest.raises(Fault, match="outside every tensor"):
        run(access, size=254)


def test_a_thread_may_store_over_what_it_stored_in_parts():
    body = "mov.b64 %rd4, 7; setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.b32 [%r3], %r1; @%p1 st.shared.b64 [%r3], %rd4;"
    assert (run(body + "@%p1 ld.shared.b32 %r8, [%r3]; @%p1 st.global.b32 [%rd2], %r8;")[:2] == (7, 1)).all()


OF_THE_FIRST, OF_THE_SECOND = "setp.eq.u32 %p1, %r2, 0; @%p1 ", "setp.eq.u32 %p1, %r2, 1; @%p1 "
STORE, LOAD = "st.global.b32 [%rd2], %r1; ", "ld.global.b32 %r8, [%rd2]; "


@pytest.mark.parametrize("body", [STORE, OF_THE_FIRST + STORE + OF_THE_SECOND + LOAD, OF_THE_FIRST + LOAD + OF_THE_SECOND + STORE])
def test_two_programs_that_use_one_address_are_found(body):
    """In whatever order they come to it."""
    with pytest.raises(Fault, match="racecheck.*another program"):
        run(body, programs=2)


def test_two_programs_may_load_from_one_address():
    assert (run(LOAD, programs=2) == np.arange(64)).all()


def test_an_mbarrier_completes_when_enough_threads_arrived():
    assert (run(BARRIER + ARRIVE + WAIT + "st.global.b32 [%rd2], %r1;") == np.arange(64)).all()
