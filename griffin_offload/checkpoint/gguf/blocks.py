"""GGUF's quantized blocks -> float32. A block is some numbers of a few bits that share a scale.

Layouts and formulas: ggml-quants.c of https://github.com/ggml-org/llama.cpp, and the `gguf` package, whose numpy code
gives the same bits at a third of the speed or less: here every step works in a core's cache. (Products of a half and
small integers are exact in float32; only the last addition rounds.)

n blocks; `out` (n, elements), float32; `spare` (n, elements), uint8: scratch memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...errors import UnsupportedArchitecture
from ...native.weights import SOURCES, unpacker

Unpack = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class BlockType:
    """A block has `elements` numbers in `bytes` bytes. `unpack(blocks, out, spare)`: blocks (n, bytes), uint8."""

    name: str
    elements: int
    bytes: int
    unpack: Unpack

    def unpacks_to(self, dtype: torch.dtype) -> bool:
        """Whether `out` may have this dtype: float32, or what our own kernel rounds to."""
        return dtype == torch.float32 or (dtype in SOURCES and unpacker(self.name) is not None)


def _halves(blocks: Tensor) -> Tensor:
    """float16 in bytes (n, 2 k) -> (n, k), float32."""
    return blocks.view(torch.float16).float()


# Blocks of 256 have 8 places of 32 elements: those of the low nibbles of 4 groups of bytes, then of the high ones.
_Q5_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_Q6_ORDER = (0, 1, 4, 5, 2, 3, 6, 7)


def _nibbles(packed: Tensor, spare: Tensor) -> Tensor:
    """Bytes (a, b, size) -> (2, a, b, size): the low four bits, then the high four."""
    nibbles = spare.view(2, *packed.shape)
    low, high = nibbles
    high.copy_(packed)  # contiguous from here on
    torch.bitwise_and(high, 15, out=low)
    high.bitwise_right_shift_(4)
    return nibbles


def _put(planes: Tensor, order: Sequence[int], out: Tensor) -> None:
    """Planes (k, m, size) -> out as (m, k, size), with plane i at place order[i]."""
    places = out.view(planes.shape[1], len(planes), -1)
    for plane, place in zip(planes, order, strict=True):
        places[:, place].copy_(plane)


def _add_upper_bits(planes: Tensor, order: Sequence[int], packed: Tensor, count: int) -> None:
    """Adds the `count` bits above four: packed (n, g size); a byte has those of 8 / count places, the first lowest."""
    upper, share = torch.empty_like(planes), 8 // count
    groups = [group.contiguous() for group in packed.split(planes.shape[2], dim=1)]
    for bits, place in zip(upper, order, strict=True):
        torch.bitwise_right_shift(groups[place // share], place % share * count, out=bits)
    planes.bitwise_or_(upper.bitwise_and_(2**count - 1).bitwise_left_shift_(4))


def _add_fifth_bits(planes: Tensor, packed: Tensor) -> None:
    """Adds the fifth bits of Q5_0 and Q5_1: bit i of four bytes is element i's."""
    bits = _BITS.index_select(0, packed.flatten().int()).view(torch.uint8).view(-1, 2, 16)
    for plane, upper in zip(planes, bits.unbind(1), strict=True):
        plane.bitwise_or_(upper)


# Byte -> eight bytes in one word, each 16 if its bit is set.
_BITS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).mul(16).to(torch.uint8).view(torch.int64).flatten()


def _q4_0(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """Scale, 16 bytes of nibbles: d (q - 8)."""
    planes = _nibbles(blocks[:, None, 2:], spare).flatten(1, 2)
    _put(planes.view(torch.int8).sub_(8), (0, 1), out)
    out.mul_(_halves(blocks[:, :2]))


def _q4_1(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """Scale, minimum, 16 bytes of nibbles: d q + m."""
    _put(_nibbles(blocks[:, None, 4:], spare).flatten(1, 2), (0, 1), out)
    out.mul_(_halves(blocks[:, :2])).add_(_halves(blocks[:, 2:4]))


def _q5_0(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """Scale, 4 bytes of fifth bits, 16 of nibbles: d (q - 16)."""
    planes = _nibbles(blocks[:, None, 6:], spare).flatten(1, 2)
    _add_fifth_bits(planes, blocks[:, 2:6])
    _put(planes.view(torch.int8).sub_(16), (0, 1), out)
    out.mul_(_halves(blocks[:, :2]))


def _q5_1(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """Scale, minimum, 4 bytes of fifth bits, 16 of nibbles: d q + m."""
    planes = _nibbles(blocks[:, None, 8:], spare).flatten(1, 2)
    _add_fifth_bits(planes, blocks[:, 4:8])
    _put(planes, (0, 1), out)
    out.mul_(_halves(blocks[:, :2])).add_(_halves(blocks[:, 2:4]))


def _q8_0(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """Scale, 32 signed bytes: d q."""
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_halves(blocks[:, :2]))


def _scale_k(blocks: Tensor, out: Tensor) -> None:
    """q -> d s q - dmin m, in 8 groups of 32: d and dmin, then s and m of 6 bits each in 12 bytes.

    These are four bytes of s (above them two bits of the last four s), four of m (likewise), and four of nibbles of the
    last s and m. Bits shifted in from a word's next byte are masked out."""
    s, m, last = blocks[:, 4:16].view(torch.int32).t().contiguous()  # four numbers a word
    s = torch.stack([s & 0x3F3F3F3F, (last & 0x0F0F0F0F) | (s >> 2 & 0x30303030)], dim=1)
    m = torch.stack([m & 0x3F3F3F3F, (last >> 4 & 0x0F0F0F0F) | (m >> 2 & 0x30303030)], dim=1)
    d, least = _halves(blocks[:, :4]).split(1, dim=1)
    scales, minima = s.view(torch.uint8).float().mul_(d), m.view(torch.uint8).float().mul_(least)
    out.view(-1, 32).mul_(scales.view(-1, 1)).sub_(minima.view(-1, 1))


def _q4_k(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """16 bytes for `_scale_k`, 128 bytes of nibbles in 4 groups."""
    _put(_nibbles(blocks[:, 16:].unflatten(1, (4, 32)), spare).flatten(1, 2), (0, 1), out)
    _scale_k(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """16 bytes for `_scale_k`, 32 of fifth bits, 128 of nibbles in 4 groups."""
    planes = _nibbles(blocks[:, 48:].unflatten(1, (4, 32)).transpose(0, 1), spare).flatten(0, 1)
    _add_upper_bits(planes, _Q5_ORDER, blocks[:, 16:48], 1)
    _put(planes, _Q5_ORDER, out)
    _scale_k(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
    """128 bytes of nibbles in 2 groups of 64, 64 of pairs of bits, 16 signed scales s, one scale: d s (q - 32)."""
    planes = _nibbles(blocks[:, :128].unflatten(1, (4, 32)).transpose(0, 1), spare).flatten(0, 1)
    _add_upper_bits(planes, _Q6_ORDER, blocks[:, 128:192], 2)
    _put(planes.view(torch.int8).sub_(32), _Q6_ORDER, out)
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_halves(blocks[:, 208:]))
    out.view(-1, 16, 16).mul_(scales[..., None])


def _plain(dtype: torch.dtype) -> Unpack:
    def unpack(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
        out.copy_(blocks.view(dtype))

    return unpack


def _quickly(name: str, by_torch: Unpack) -> Unpack:
    """By our own kernel (native/weights.py) where there is one."""

    def unpack(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
        if kernel := unpacker(name):
            kernel(blocks, out)
        else:
            by_torch(blocks, out, spare)

    return unpack


BLOCK_TYPES = {
    name: BlockType(name, elements, size, _quickly(name, unpack))
    for name, elements, size, unpack in (
        ("F32", 1, 4, _plain(torch.float32)),
        ("F16", 1, 2, _plain(torch.float16)),
        ("BF16", 1, 2, _plain(torch.bfloat16)),
        ("Q4_0", 32, 18, _q4_0),
        ("Q4_1", 32, 20, _q4_1),
        ("Q5_0", 32, 22, _q5_0),
        ("Q5_1", 32, 24, _q5_1),
        ("Q8_0", 32, 34, _q8_0),
        ("Q4_K", 256, 144, _q4_k),
        ("Q5_K", 256, 176, _q5_k),
        ("Q6_K", 256, 210, _q6_k),
    )
}


def block_type(name: str) -> BlockType:
    """gguf's name of a type -> a type above, or one that the gguf package unpacks. Raises UnsupportedArchitecture."""
    return BLOCK_TYPES.get(name) or _by_the_package(name)


@cache
def _by_the_package(name: str) -> BlockType:
    """A rarer type, at a tenth of the speed."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[name]
    elements, size = GGML_QUANT_SIZES[kind]

    def unpack(blocks: Tensor, out: Tensor, spare: Tensor) -> None:
        for part, target in zip(blocks.split(256), out.split(256), strict=True):  # it takes much memory for each block
            dense = dequantize(part.numpy().reshape(1, -1), kind)
            target.copy_(torch.from_numpy(dense).view(target.shape))

    try:
        dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError:
        known = ", ".join(BLOCK_TYPES)
        raise UnsupportedArchitecture(
            f"it holds tensors of the type {name}, which cannot be unpacked; "
            f"use a file of other types ({known}), or the original safetensors"
        ) from None
    return BlockType(name, elements, size, unpack)
