"""TMA: what a pass with many queries goes over comes to shared memory by tensor descriptors, a block at a time; tiles.csv says where.

It saves the registers of as many pointers. Descriptors are made on the host, and Triton hands the 128 bytes of each to the kernel by value
(a __grid_constant__ parameter): nothing is allocated on the device, and a CUDA graph replays the ones it captured.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..call import Call
from .operands import tile_of
from .tiles import FEW_QUERIES, Tile, block_of

ALIGNMENT = 16  # bytes, of the base and of every stride
LARGEST_REACH = 2**31  # bytes: Triton's driver counts them in 32 bits
OF_QUERIES = ("q_ptr", "do_ptr")  # arguments whose rows are queries; those of the others are keys


def tile(call: Call, kernel: str, *operands: Tensor | None, takes_padding: bool) -> Tile:
    """The tile of a pass over these operands, whose tma says for this call whether descriptors load them; else pointers do.

    Pointers serve few queries, which would wait for the host to make descriptors, and operands that are not all `readable`, a map's among
    them. takes_padding: the pass never multiplies by what it loads of a padded key, which may be NaN. Where it does, padding has to be
    selected out, for which what is in shared memory would go through registers after all.
    """
    own = tile_of(call, kernel)
    few = call.problem.Nq <= FEW_QUERIES
    if own.tma and (few or (call.key_padding_mask is not None and not takes_padding) or not all(map(readable, operands))):
        return tile_of(call, kernel, pointers=True)
    return own


def readable(tensor: Tensor | None) -> bool:
    """Whether TMA takes it: elements of 16 bits, adjacent in a row; rows, heads and batches that are aligned and do not overlap."""
    if tensor is None:
        return False
    size, columns = tensor.element_size(), tensor.shape[-1]
    if size != 2 or tensor.numel() == 0 or tensor.stride(-1) != 1 or tensor.data_ptr() % ALIGNMENT:
        return False
    axes = [(n, stride) for n, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if n > 1]
    reach = columns + sum((n - 1) * stride for n, stride in axes)
    return size * reach < LARGEST_REACH and all(stride >= columns and size * stride % ALIGNMENT == 0 for _, stride in axes)


def blocks(tile: Tile, **operands: Tensor | None) -> dict[str, TensorDescriptor]:
    """Arguments in place of pointers to operands (B, H, N, D): blocks of the tile's rows of a (batch, head), 0 past the ends. Or none."""
    if not tile.tma:
        return {}
    return {name: _descriptor(x, tile.block_m if name in OF_QUERIES else tile.block_n) for name, x in operands.items() if x is not None}


def _descriptor(tensor: Tensor, rows: int) -> TensorDescriptor:
    step = ALIGNMENT // tensor.element_size()  # along an axis of one element any aligned stride does
    strides = [step if n == 1 else stride for n, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, block_of(tensor.shape[-1])])
