"""Instructions that compute each thread's result from its own registers: those that do not touch memory.

ARITHMETIC has one entry for each opcode with its whole suffix, so that a rounding or a saturation nobody thought of is refused and never
ignored. A function gets arrays of the source types and returns one of the result's type; arrays broadcast over (programs, threads).

fma rounds twice, from 53 bits to 24, which differs from once in about one result of 2^29. Approximate functions are computed as well as
float32 allows: the manual bounds their error and does not say what it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
NUMPY = {"pred": np.bool_, "u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16, "s16": np.int16,
         "f16": np.float16, "bf16": np.uint16, "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32,
         "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f64": np.float64}  # fmt: skip
DTYPES = {name: np.dtype(kind) for name, kind in NUMPY.items()}


class Operation(NamedTuple):
    function: Callable[..., Array]
    sources: tuple[str, ...]
    result: str


ARITHMETIC: dict[str, Operation] = {}


def define(opcodes: str, function: Callable[..., Array], sources: int | str = 2, result: str = "") -> None:
    """Opcodes that share a function; {a b} stands for either. Sources and the result have the type that ends the opcode, unless given."""
    for opcode in _alternatives(opcodes):
        kind = opcode.rsplit(".", 1)[1]
        types = (kind,) * sources if isinstance(sources, int) else tuple(sources.replace("T", kind).split())
        ARITHMETIC[opcode] = Operation(function, types, result or kind)


def _alternatives(text: str) -> list[str]:
    before, brace, rest = text.partition("{")
    if not brace:
        return [text]
    inside, _, after = rest.partition("}")
    return [expanded for choice in inside.split() for expanded in _alternatives(before + choice + after)]


INTEGERS = "{u16 s16 u32 s32 u64 s64}"
BITS = "{b16 b32 b64}"


def flush(x: Array) -> Array:
    """.ftz: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


# "Integer Arithmetic Instructions". They wrap around.
define(f"add.{INTEGERS}", np.add)
define(f"sub.{INTEGERS}", np.subtract)
define(f"mul.lo.{INTEGERS}", np.multiply)
define(f"mad.lo.{INTEGERS}", lambda a, b, c: a * b + c, 3)
define(f"min.{INTEGERS}", np.minimum)
define(f"max.{INTEGERS}", np.maximum)
define("neg.{s16 s32 s64}", np.negative, 1)
define("abs.{s16 s32 s64}", np.abs, 1)
for narrow, wide in (("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")):
    to = DTYPES[wide]
    define(f"mul.wide.{narrow}", lambda a, b, to=to: a.astype(to) * b.astype(to), 2, wide)
    define(f"mad.wide.{narrow}", lambda a, b, c, to=to: a.astype(to) * b.astype(to) + c, f"T T {wide}", wide)
for kind, wide in (("u32", np.uint64), ("s32", np.int64)):
    define(f"mul.hi.{kind}", lambda a, b, w=wide: ((a.astype(w) * b.astype(w)) >> w(32)).astype(a.dtype))


def divide(a: Array, b: Array) -> Array:
    """Towards zero. A division by zero is unspecified, and is all ones here."""
    quotient = np.floor_divide(a, np.where(b == 0, a.dtype.type(1), b))
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * b != a)).astype(a.dtype)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


define("div.{u16 s16 u32 s32 u64 s64}", divide)
define("rem.{u16 s16 u32 s32 u64 s64}", lambda a, b: a - divide(a, b) * b)


def extract(a: Array, start: Array, length: Array) -> Array:
    """bfe: `length` bits from `start` on, extended by zeros or by their sign; beyond the top bit come zeros or sign bits."""
    width = a.dtype.itemsize * 8
    start, length = start & 255, length & 255
    first = np.minimum(start, width - 1).astype(a.dtype)
    signed = 1 if a.dtype.kind == "i" else 0  # beyond the top bit there is its sign at least
    count = np.minimum(length, np.maximum(width - np.minimum(start, width), signed)).astype(a.dtype)
    top = (width - count) % width
    moved = (a >> first) << top
    return np.where(count == 0, a.dtype.type(0), moved >> top)


define("bfe.{u32 s32 u64 s64}", extract, "T u32 u32")


def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi of 32 bits: b with the lowest `length` bits of a in the place of its own from `start` on."""
    start, length = np.minimum(start & 255, 32).astype(np.uint64), np.minimum(length & 255, 32).astype(np.uint64)
    one = np.uint64(1)
    mask = ((one << length) - one) << start
    return (((a.astype(np.uint64) << start) & mask) | (b.astype(np.uint64) & ~mask)).astype(np.uint32)


define("bfi.b32", insert, "T T u32 u32")

# "Logic and Shift Instructions". A shift by the width or more leaves nothing, or the sign.
define("and.{pred b16 b32 b64}", np.bitwise_and)
define("or.{pred b16 b32 b64}", np.bitwise_or)
define("xor.{pred b16 b32 b64}", np.bitwise_xor)
define("not.{pred b16 b32 b64}", np.bitwise_not, 1)


def shift_left(a: Array, by: Array) -> Array:
    width = a.dtype.itemsize * 8
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, by: Array) -> Array:
    width = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < width, shifted, a.dtype.type(0))


define(f"shl.{BITS}", shift_left, "T u32")
define("shr.{b16 b32 b64 u16 s16 u32 s32 u64 s64}", shift_right, "T u32")


def funnel(low: Array, high: Array, by: Array) -> Array:
    """shf.l.wrap: the upper half of high:low, shifted left by `by` modulo 32."""
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((both << (by & 31).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


define("shf.l.wrap.b32", funnel, 3)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each nibble of the selector takes one of eight bytes, or with its top bit that byte's sign, eight times."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros((), np.uint32)
    for at in range(4):
        nibble = (selector >> np.uint32(4 * at)) & np.uint32(15)
        byte = ((both >> (8 * (nibble & np.uint32(7))).astype(np.uint64)) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * at))
    return result


define("prmt.b32", permute, 3)

# "Floating-Point Instructions"
define("add.{f32 rn.f32 f16 f64}", np.add)
define("sub.{f32 rn.f32 f16 f64}", np.subtract)
define("mul.{f32 rn.f32 f16 f64}", np.multiply)
define("neg.{f16 f32 f64}", np.negative, 1)
define("abs.{f16 f32 f64}", np.abs, 1)
define("abs.bf16", lambda bits: bits & np.uint16(0x7FFF), 1)
define("max.{f32 f64}", np.fmax)  # of a number and a NaN it is the number
define("min.{f32 f64}", np.fmin)


def fused(a: Array, b: Array, c: Array) -> Array:
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


define("fma.rn.f32", fused, 3)
define("fma.rn.ftz.f32", lambda a, b, c: flush(fused(flush(a), flush(b), flush(c))), 3)
define("ex2.approx.f32", np.exp2, 1)
define("ex2.approx.ftz.f32", lambda x: flush(np.exp2(flush(x))), 1)
define("rcp.rn.f32", lambda x: np.float32(1) / x, 1)
define("sqrt.approx.ftz.f32", lambda x: flush(np.sqrt(flush(x))), 1)
define("div.{full rn}.f32", np.divide)

# "Comparison and Selection Instructions". With NaN the ordered ones are false; those that end in u are true.
ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
for name, compare in ORDERED.items():
    define(f"setp.{name}.{{u16 s16 u32 s32 u64 s64}}", compare, 2, "pred")
    unordered = (lambda a, b, c=compare: c(a, b) | np.isnan(a) | np.isnan(b)) if name != "ne" else compare
    ordered = (lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)) if name == "ne" else compare
    define(f"setp.{name}.{{f32 f64}}", ordered, 2, "pred")
    define(f"setp.{name}u.{{f32 f64}}", unordered, 2, "pred")
define("setp.eq.{b16 b32 b64}", operator.eq, 2, "pred")
define("setp.ne.{b16 b32 b64}", operator.ne, 2, "pred")
define("setp.num.{f32 f64}", lambda a, b: ~(np.isnan(a) | np.isnan(b)), 2, "pred")
define("setp.nan.{f32 f64}", lambda a, b: np.isnan(a) | np.isnan(b), 2, "pred")
define("selp.{b16 u16 s16 b32 u32 s32 f32 b64 u64 s64 f64}", lambda a, b, p: np.where(p, a, b), "T T pred")


# cvt of "Data Movement and Conversion Instructions"
def bfloat(x: Array) -> Array:
    """float32 to bfloat16, to nearest with ties to even. Every NaN is the one NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack(high: Array, low: Array) -> Array:
    return (high.astype(np.uint32) << np.uint32(16)) | low.astype(np.uint32)


def half_bits(x: Array) -> Array:
    return np.ascontiguousarray(x.astype(np.float16)).view(np.uint16)


def to_tf32(x: Array) -> Array:
    """To nearest with ties away from zero, 10 bits of mantissa. Every NaN is the one NaN."""
    rounded = (np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), rounded)


def to_integer(x: Array, kind: np.dtype[Any]) -> Array:
    """.rzi: towards zero, out of range to the nearest end, NaN to 0."""
    ends = np.iinfo(kind)
    whole = np.trunc(x.astype(np.float64))
    inside = np.where((whole > ends.min) & (whole < ends.max), whole, 0).astype(kind)
    return np.where(whole >= ends.max, ends.max, np.where(whole <= ends.min, ends.min, inside)).astype(kind)


WHOLE = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
for result in WHOLE:
    for kind in WHOLE:
        define(f"cvt.{result}.{kind}", lambda a, to=DTYPES[result]: a.astype(to), 1, result)
for kind in WHOLE[2:]:
    define(f"cvt.rn.f32.{kind}", lambda a: a.astype(np.float32), 1, "f32")
    define(f"cvt.rzi.{kind}.f32", lambda a, to=DTYPES[kind]: to_integer(a, to), 1, kind)
define("cvt.rn.f16.f32", lambda x: x.astype(np.float16), 1, "f16")
define("cvt.f32.f16", lambda x: x.astype(np.float32), 1, "f32")
define("cvt.rn.bf16.f32", bfloat, 1, "b16")
define("cvt.f32.bf16", from_bfloat, 1, "f32")
define("cvt.rn.f16x2.f32", lambda high, low: pack(half_bits(high), half_bits(low)), 2, "b32")
define("cvt.rn.bf16x2.f32", lambda high, low: pack(bfloat(high), bfloat(low)), 2, "b32")
define("cvt.rna.tf32.f32", to_tf32, 1, "b32")
define("cvt.f64.f32", lambda x: x.astype(np.float64), 1, "f64")
define("cvt.rn.f32.f64", lambda x: x.astype(np.float32), 1, "f32")
