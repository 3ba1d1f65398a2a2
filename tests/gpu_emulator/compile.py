"""Triton kernels to PTX: its compiler up to the stage before ptxas, with a cache of its own, and launches of what comes out."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from smattn.kernels.tiles import Tile
from smattn.kernels.tools import aot

from . import machine
from .counters import Counts
from .memory import Array, GlobalMemory
from .parser import Kernel, parse
from .tensor_copies import TensorMap

CACHE = Path(__file__).resolve().parents[2] / "build" / "gpu_emulator"
States = dict[int, Array]  # address of a storage -> which of its bytes hold something
Change = Callable[[Kernel], Kernel]


class Module(NamedTuple):
    ptx: str
    shared: int  # bytes of shared memory that a launch asks for
    descriptors: list[dict[str, Any]]  # how tensor descriptors are encoded, in the order of the arguments


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what is to be at the path: whole or not at all, whoever else writes it and whenever the process is stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    yield unfinished
    unfinished.replace(path)


def source_of(kernel: Any, arguments: dict[str, Any]) -> ASTSource:
    """As ahead of time, except that a pointer is only known to be aligned where it is."""
    source = aot.source(kernel, arguments)
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, Tensor) and value.device.type != "meta" and value.data_ptr() % 16:
            source.attrs.pop((index,), None)
    return source


def compile_kernel(source: ASTSource, arch: int, tile: Tile) -> Module:
    key = hashlib.sha256(f"{source.hash()} {arch} {tile} {triton.__version__}".encode()).hexdigest()[:32]
    path = CACHE / f"{source.name}-{key}.json"
    if path.exists():
        return Module(*json.loads(path.read_text()))
    module = _compile(source, arch, tile)
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(module))
    return module


def _compile(source: ASTSource, arch: int, tile: Tile) -> Module:
    """What triton.compile does, up to PTX."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options({**tile.options(), **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    metadata = {"target": target, **options.__dict__}
    for name, stage in stages.items():
        if name == "cubin":
            break
        code = stage(code, metadata)
    return Module(code, metadata["shared"], metadata.get("tensordesc_meta") or [])


@cache
def translated(ptx: str) -> machine.Compiled:
    (kernel,) = parse(ptx).values()
    return machine.Compiled.of(kernel)


def launch(
    kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile, arch: int, states: States,
    counts: Counts | None = None, change: Change | None = None,
) -> machine.Launch:  # fmt: skip
    """Compile the kernel for these arguments and run it on their storages. change: makes another kernel of it first."""
    source = source_of(kernel, arguments)
    module = compile_kernel(source, arch, tile)
    code = translated(module.ptx)
    if change is not None:
        code = machine.Compiled.of(change(code.kernel))
    memory = GlobalMemory()
    values = _pass(source, arguments, module.descriptors, memory, states)
    parameters, tensor_maps = bytearray(4096), {}
    for parameter, value in zip(code.kernel.parameters, [*values, 0, 0], strict=True):  # Triton's scratch memory comes last: none here
        if isinstance(value, TensorMap):
            tensor_maps[parameter.offset] = value
        else:
            form = "<f" if isinstance(value, float) else {4: "<I", 8: "<Q"}[parameter.size]
            struct.pack_into(form, parameters, parameter.offset, value if isinstance(value, float) else value % 256**parameter.size)
    launched = machine.Launch(
        code, (programs, 1, 1), code.kernel.threads, module.shared, bytes(parameters), tensor_maps, memory, counts or Counts()
    )  # fmt: skip
    machine.run(launched)
    return launched


def _pass(
    source: ASTSource, arguments: dict[str, Any], descriptors: list[dict[str, Any]], memory: GlobalMemory, states: States
) -> list[Any]:
    """The values of the kernel's parameters: a descriptor is itself, its sizes and its strides."""
    values: list[Any] = []
    found: dict[int, int] = {}
    encodings = iter(descriptors)
    for name, kind in source.signature.items():
        value = arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, TensorDescriptor):
            values += [_tensor_map(value, next(encodings), _address(name, value.base, memory, states, found)), *value.shape, *value.strides]
        elif isinstance(value, Tensor):
            values.append(_address(name, value, memory, states, found))
        else:
            values.append(float(value) if kind == "fp32" else int(value))
    return values


def _address(name: str, tensor: Tensor, memory: GlobalMemory, states: States, found: dict[int, int]) -> int:
    storage = tensor.untyped_storage()
    at = storage.data_ptr()
    if at not in found:
        found[at] = memory.add(bytes_of(tensor), at, states.get(at), name)
    return found[at] + tensor.storage_offset() * tensor.element_size()


def bytes_of(tensor: Tensor) -> Array:
    """The bytes of its storage, not a copy."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _tensor_map(descriptor: TensorDescriptor, encoding: dict[str, Any], address: int) -> TensorMap:
    """As Triton's driver encodes it. What a block of the descriptor holds may be copied in several parts."""
    size = descriptor.base.element_size()
    strides = [size * stride for stride in descriptor.strides]
    return TensorMap(
        address, tuple(descriptor.shape)[::-1], tuple(strides)[::-1], tuple(encoding["block_size"])[::-1], size, encoding["swizzle"]
    )  # fmt: skip


def state_of(tensor: Tensor) -> Array:
    """The state of a storage that holds nothing."""
    return np.ones(tensor.untyped_storage().nbytes(), np.uint8)
