"""Encoding with torch ops on the device that holds the tensor, to the same bits as the numba kernels on the CPU.

Only codes and scales come to the CPU. The device needs memory for one piece of `PIECE` values at a time and what is
computed of it: some tens of MiB, whatever the tensor's size.

Each formula here is that of the kernel of the same name in `nvflare_rdma.codecs.kernels`, and rounds where that rounds:

- one torch op per rounding, so that nothing can become a fused multiply-add;
- divisors and dividends are tensors on the device: by a Python number torch multiplies with its reciprocal on CUDA;
- sums are of integers, for which order doesn't matter, or are made one value after the other;
- the device has to do float32 and, once per block, float64 as IEEE 754 has it, denormals included. CUDA does.

torch is imported with this module, so import it where a torch tensor is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvflare_rdma.codecs.base import Array, Bytes, Codec, FixedSizeCodec
from nvflare_rdma.codecs.e4m3_scales import NormalFloat4E4M3
from nvflare_rdma.codecs.fourbit import DoubleQuantized
from nvflare_rdma.codecs.tables import WEAK, largest_scale
from nvflare_rdma.codecs.tensors import NUMPY_DTYPES, dtype_name, to_array
from nvflare_rdma.errors import CodecError

PIECE = 1 << 20  # values, a multiple of every block size; 4 MiB of float32

#: A piece's float32 values and the codec's tables -> the piece's parts, flat or in rows of a block.
Run = Callable[..., dict[str, Tensor]]

_CHUNK = 4096  # of which topk2 takes the largest
_FLOOR = float(np.float32(1e-38))  # what 4-bit codecs raise an absmax to before they divide by it


class _NotFiniteError(Exception):
    """There is NaN or Inf in a piece, or a value became infinite."""


def can_encode_on_device(codec: Codec) -> bool:
    """Return whether `encode_on_device` takes this codec: all but `adaquant`, `lossless` and `exact_delta`."""
    return codec.name in _RUNS


def encode_on_device(codec: Codec, tensor: Tensor) -> Bytes:
    """Encode `tensor` where it is, bit for bit as `Codec.encode_into` does.

    If the device has no memory left for a piece, the CPU does it all.

    Args:
        codec: one that `can_encode_on_device`.
        tensor: float32, float16 or bfloat16, of any shape and strides, on any device that keeps to IEEE 754. Not
            changed.

    Returns:
        uint8, `codec.encoded_nbytes(tensor.numel())` bytes in CPU memory.

    Raises:
        UnrepresentableError: as `Codec.encode_into`, with the same message.
        CodecError: another codec or dtype.
    """
    dtype = NUMPY_DTYPES.get(dtype_name(tensor))
    if dtype is None or not can_encode_on_device(codec) or not isinstance(codec, FixedSizeCodec):
        raise CodecError(f"{codec.name} can't encode {dtype_name(tensor)} tensors on {tensor.device}")
    encoded = np.empty(codec.encoded_nbytes(tensor.numel()), np.uint8)
    parts = codec.parts(encoded, tensor.numel())
    try:
        if isinstance(codec, DoubleQuantized):
            # The scales of the scales are made on the CPU: that is a 64th of the work.
            absmax = np.empty(parts["scales"].size, np.float32)
            _encode(codec, codec.inner, tensor, {"scales": absmax, "codes": parts["codes"]})
            codec.encode_scales(absmax, parts, dtype)
        elif isinstance(codec, NormalFloat4E4M3):
            top = max((float(piece.abs().amax()) for _, piece in _pieces(tensor.detach())), default=0.0)
            parts["scale"][:] = scale = codec.shared_scale(np.float32(top))
            _encode(codec, codec, tensor, parts, float(scale))
        else:
            _encode(codec, codec, tensor, parts)
    except torch.cuda.OutOfMemoryError:
        codec.encode_into(to_array(tensor), encoded)
    return encoded


def _encode(
    codec: FixedSizeCodec, inner: FixedSizeCodec, tensor: Tensor, parts: dict[str, Array], *more: float
) -> None:
    """Fill in `parts`, which are those of `inner`. The run takes `more` after the codec's tables."""
    run = _RUNS[codec.name]
    tables = [torch.from_numpy(getattr(inner, name)).to(tensor.device) for name in _TABLES.get(run, ())]
    for start, piece in _pieces(tensor.detach()):
        made: dict[str, Any]
        try:
            made = run(piece.float(), *tables, *more)
        except _NotFiniteError:  # rare, and the CPU knows which to carry, which to refuse and how to say so
            encoded = np.empty(codec.encoded_nbytes(piece.numel()), np.uint8)
            codec.encode_into(to_array(piece), encoded)
            made = {name: torch.from_numpy(p.view(np.uint8)) for name, p in codec.parts(encoded, piece.numel()).items()}
        # Rows of an incomplete block are longer than what is wanted of them.
        before, after = inner.layout(start), inner.layout(start + piece.numel())
        for (name, _, first), (_, _, last) in zip(before, after, strict=True):
            wanted = parts[name][first:last].view(np.uint8)
            torch.from_numpy(wanted).copy_(made[name].reshape(-1).view(torch.uint8)[: wanted.size])


def _pieces(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`tensor` in C order, flat, `PIECE` values at a time, each piece with its start."""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else None
    for start in range(0, tensor.numel(), PIECE):
        stop = min(start + PIECE, tensor.numel())
        if flat is not None:
            piece = flat[start:stop]
        else:  # reshape would copy all of it
            piece = tensor[torch.unravel_index(torch.arange(start, stop, device=tensor.device), tensor.shape)]
        yield start, piece


def _blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`values` in rows of one block each, the last one filled up with zeros, and the largest magnitude of each."""
    missing = -values.numel() % size
    rows = (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, size)
    absmax = rows.abs().amax(1)
    if not torch.isfinite(absmax).all():
        raise _NotFiniteError
    return rows, absmax


def _over(level: float, absmax: Tensor) -> Tensor:
    return torch.full_like(absmax, level) / absmax


def _half(dtype: torch.dtype) -> Run:
    def run(values: Tensor) -> dict[str, Tensor]:
        codes = values.to(dtype)
        if not torch.isfinite(codes).all():
            raise _NotFiniteError
        return {"codes": codes}

    return run


def _evenly(values: Tensor, size: int, level: int) -> tuple[Tensor, Tensor]:
    """Scales `absmax / level`, and the values in rows times the inverse of that."""
    rows, absmax = _blocks(values, size)
    weak = absmax < float(WEAK)
    scales = (absmax / torch.full_like(absmax, level)).clamp_(max=float(largest_scale(level)))
    inverse = _over(level, absmax).masked_fill_(weak, 0)
    return scales.masked_fill_(weak, 0), rows * inverse[:, None]


def _int8(values: Tensor) -> dict[str, Tensor]:
    scales, scaled = _evenly(values, 2048, 127)
    return {"scales": scales, "codes": scaled.round_().to(torch.int8)}  # ties to even


def _float8(values: Tensor) -> dict[str, Tensor]:
    scales, scaled = _evenly(values, 128, 448)
    return {"scales": scales, "codes": scaled.to(torch.float8_e4m3fn)}


def _blockwise8(values: Tensor, nearest: Tensor) -> dict[str, Tensor]:
    rows, absmax = _blocks(values, 4096)
    # The reciprocal of next to nothing is infinite; 0 * inf is NaN and goes to step 0.
    position = (rows * _over(1, absmax)[:, None]).clamp_(-1, 1).nan_to_num_(nan=-1)
    steps = position.add_(1).mul_(32767.5).add_(0.5).to(torch.int32)
    return {"scales": absmax, "codes": nearest.index_select(0, steps.view(-1))}


def _fourbit(values: Tensor, middles: Tensor, order: Tensor) -> dict[str, Tensor]:
    rows, absmax = _blocks(values, 64)
    divisor = absmax.clamp(min=_FLOOR)
    position = rows * _over(1, divisor)[:, None]
    if values.numel() % 64:  # an incomplete block is divided
        position[-1:] = rows[-1:] / divisor[-1:, None]
        absmax[-1:] = divisor[-1:]
    # How many of the middles are smaller, then the code of that rank.
    ranks = torch.bucketize(position.view(-1), middles, out_int32=True)
    codes = order.index_select(0, ranks).view(-1, 2)
    return {"scales": absmax, "codes": codes[:, 0] * 16 + codes[:, 1]}


def _fourbit_e4m3(values: Tensor, middles: Tensor, scale: float) -> dict[str, Tensor]:
    rows, absmax = _blocks(values, 32)
    shared = torch.full_like(absmax, scale)
    scales = (absmax * _over(1, shared).masked_fill_(shared == 0, 0)).to(torch.float8_e4m3fn)
    divisor = scales.float() * shared
    factor = _over(1, divisor).masked_fill_(divisor == 0, 0)
    ranks = torch.bucketize((rows * factor[:, None]).view(-1), middles, out_int32=True).view(-1, 2)
    # The shared scale is the tensor's, and is there already.
    return {"scale": absmax, "scales": scales, "codes": (ranks[:, 0] * 16 + ranks[:, 1]).to(torch.uint8)}


def _few_levels(values: Tensor, share: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return what `int2` and `ternary` have in common.

    Both have blocks of 256 and integer steps of 2**-16 of absmax, of which those count as large that exceed
    `share[0] / share[1]` of their mean.

    Returns per value: whether it is negative, and whether it is large, as uint8; per block: absmax, whether that is so
    small that the block becomes zeros, the number of values, of large ones, the sum of all steps, and that of the
    large ones'.
    """
    rows, absmax = _blocks(values, 256)
    weak = absmax < float(WEAK)
    steps = (rows.abs() * _over(65536, absmax).masked_fill_(weak, 0)[:, None]).to(torch.int32)
    count = torch.full_like(absmax, 256, dtype=torch.int64)
    count[-1:] -= -values.numel() % 256
    total = steps.sum(1, dtype=torch.int32).long()
    threshold = total * share[0] // (share[1] * count)
    above = steps > threshold.int()[:, None]
    large, product = above.sum(1, dtype=torch.int32).long(), (steps * above).sum(1, dtype=torch.int32).long()
    return torch.signbit(rows), above.to(torch.uint8), absmax, weak, count, large, total, product


def _mean(absmax: Tensor, product: Tensor, squares: Tensor) -> Tensor:
    """`absmax * product / (65536 * squares)` in float64, rounded to float32."""
    return (absmax.double() * product.double() / (squares.double() * 65536)).float()


def _int2(values: Tensor) -> dict[str, Tensor]:
    negative, above, absmax, weak, count, large, total, product = _few_levels(values, (5, 4))
    best = _mean(absmax, total + 2 * product, count + 8 * large)
    # No value may decode to more than the largest one, where there are any with the larger level. The largest float32
    # is a multiple of 3, so three times the limit is always finite.
    limit = absmax / torch.full_like(absmax, 3)
    scales = torch.where(large > 0, torch.minimum(best, limit), best).masked_fill_(weak, 0)
    code = torch.where(negative, 1 - above, 2 + above).masked_fill_(weak[:, None], 0)
    code.view(-1)[values.numel() :] = 0
    c = code.view(-1, 64, 4)
    return {"scales": scales, "codes": c[..., 0] + c[..., 1] * 4 + c[..., 2] * 16 + c[..., 3] * 64}


def _ternary(values: Tensor) -> dict[str, Tensor]:
    negative, above, absmax, weak, _, large, _, product = _few_levels(values, (7, 10))
    scales = _mean(absmax, product, large).masked_fill_(weak, 0)  # a weak block has no large ones: 0 / 0
    digit = torch.where(negative, 1 - above, 1 + above)
    d = torch.nn.functional.pad(digit, (0, 4), value=1).view(-1, 52, 5)
    return {"scales": scales, "codes": d[..., 0] + d[..., 1] * 3 + d[..., 2] * 9 + d[..., 3] * 27 + d[..., 4] * 81}


def _topk(most: int) -> Run:
    def run(values: Tensor) -> dict[str, Tensor]:
        rows, _ = _blocks(values, _CHUNK)
        keys = rows.abs().view(torch.int32)
        count = torch.full((rows.shape[0], 1), most, dtype=torch.int64, device=rows.device)
        count[-1] = -(-(values.numel() - (rows.shape[0] - 1) * _CHUNK) * most // _CHUNK)
        place, magnitude, found = _largest_of(rows, keys, count, most)
        total = _in_order(magnitude)
        mean = total / found
        is_large = magnitude > mean
        above, of_large = is_large.sum(1, keepdim=True), _in_order(magnitude.masked_fill(~is_large, 0))
        large = torch.where(above > 0, of_large / above, mean).masked_fill_(found == 0, 0).float()
        small = ((total - of_large) / (found - above)).masked_fill_(found == above, 0)
        low = ((small / large.double()).clamp_(0, 1) * 65535 + 0.5).masked_fill_(large == 0, 0).to(torch.int32)
        there = torch.arange(most, device=rows.device) < torch.where(found > 0, count, 0)
        # What is missing is filled up with the last one that is there.
        last = torch.minimum(torch.arange(most, device=rows.device).expand_as(place), (found - 1).clamp_(min=0))
        negative = torch.signbit(rows).gather(1, place).gather(1, last)
        code = (negative * 2 + (is_large | (above == 0)).gather(1, last)).masked_fill_(~there, 0).view(-1, 4)
        p = place.gather(1, last).masked_fill_(~there, 0).view(-1, 2)
        both = p[:, 0] | p[:, 1] << 12
        return {
            "high": large,
            "low": torch.where(low > 32767, low - 65536, low).to(torch.int16),  # the bits of uint16
            "places": torch.stack([both & 255, both >> 8 & 255, both >> 16], 1).to(torch.uint8),
            "signs": (code[:, 0] | code[:, 1] << 2 | code[:, 2] << 4 | code[:, 3] << 6).to(torch.uint8),
        }

    return run


def _largest_of(rows: Tensor, keys: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the places of the `count` largest of each row by their `keys`, ascending, and of equal ones the first;
    their magnitudes in float64, 0 where there is none; and how many there are, without zeros."""
    ranked = keys.topk(most, dim=1).values  # of equal ones it may take any, so it only tells how large they are
    threshold = ranked.gather(1, count - 1)
    ties = count - (keys > threshold).sum(1, keepdim=True)
    equal = keys == threshold
    chosen = (keys > threshold) | (equal & (equal.cumsum(1) <= ties))
    chosen &= keys > 0
    found = chosen.sum(1, keepdim=True)
    row, column = chosen.nonzero(as_tuple=True)
    place = torch.zeros((rows.shape[0], most), dtype=torch.int64, device=rows.device)
    place[row, (chosen.cumsum(1) - 1)[row, column]] = column
    there = torch.arange(most, device=rows.device) < found
    return place, rows.abs().gather(1, place).double().masked_fill_(~there, 0), found


def _in_order(values: Tensor) -> Tensor:
    """The sum of each row, one value after the other: where float64 rounds, the order decides how."""
    total = torch.zeros_like(values[:, :1])
    for k in range(values.shape[1]):
        total += values[:, k : k + 1]
    return total


_RUNS: dict[str, Run] = {
    "float16": _half(torch.float16),
    "bfloat16": _half(torch.bfloat16),
    "float8_e4m3": _float8,
    "int8": _int8,
    "blockwise8": _blockwise8,
    "float4": _fourbit,
    "normfloat4": _fourbit,
    "float4_dq": _fourbit,
    "normfloat4_dq": _fourbit,
    "normfloat4_e4m3": _fourbit_e4m3,
    "int2": _int2,
    "ternary": _ternary,
    "topk2": _topk(64),
    "topk2_128": _topk(128),
}
#: The attributes of the codec that a run takes as tensors on the device.
_TABLES: dict[Run, tuple[str, ...]] = {
    _blockwise8: ("nearest",),
    _fourbit: ("middles", "order"),
    _fourbit_e4m3: ("middles",),
}
