"""One tensor's codes as they lie in a message, with the `quant_state` entry that goes with them.

FLARE's layouts (source: `nvflare.app_opt.pt.quantization`), so that its dequantizer can read them:

- `float16`: the tensor itself; `bfloat16` (FLARE has none) likewise, in numpy as uint16. No state.
- `blockwise8`: codes of the tensor's shape; `absmax` and the table `code`.
- `float4`, `normfloat4`: a column of codes; what bitsandbytes' `QuantState.as_dict` gives, except that
  `shape` is a list: FLARE's serializer spends 126 bytes on a tuple of two and 9 on a list.
- `adaquant`: flat codes; `offset`, `norm`, `quantization_level` and `tensor_shape`. A constant tensor has
  one False for codes, and neither norm nor level.

All other codecs: the encoded bytes as they are, flat uint8; `dtype` and `shape`. FLARE's can't read these.
Received layouts are checked before anything is allocated for what they stand for.
"""

from __future__ import annotations

import bz2
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nvflare_rdma.accumulate import Encoded, EncodedParts
from nvflare_rdma.codecs import (
    FLOAT_NAMES,
    MAX_DIMENSIONS,
    Array,
    Blockwise8,
    Bytes,
    Codec,
    ExactDelta,
    FixedSizeCodec,
    Float32,
    Parts,
    dtype_name,
    from_flat,
    get_codec,
    is_plain,
    is_tensor,
    is_torch,
    to_flat,
)
from nvflare_rdma.errors import CodecError

FOUR_BIT_NAMES = {"float4": "fp4", "normfloat4": "nf4"}  # what bitsandbytes calls them
_MAX_VALUES = 1 << 60  # whose bytes an int64 can count
_ADAQUANT_DTYPES = {"u1": np.uint8, "<u2": np.uint16}


def to_message(codec: Codec, encoded: Array, value: Any) -> tuple[Any, dict[str, Any]]:
    """Return the codes, in `value`'s framework, and the `quant_state` of `value`, which was encoded to `encoded`."""
    in_torch, shape, n = is_torch(value), tuple(value.shape), math.prod(value.shape)
    parts = codec.parts(encoded, n)
    if codec.name == "adaquant":
        return _adaquant_message(parts, shape, in_torch)
    codes = parts.get("codes", encoded)
    if codec.name == "bfloat16":
        return from_flat(codes, "bfloat16", shape, True) if in_torch else codes.reshape(shape), {}
    if codec.name == "float16":
        return from_flat(codes, "float16", shape, in_torch), {}
    if codec.name == "blockwise8":
        state = {"absmax": _tensor(parts["scales"], in_torch), "code": shared_table(codec, in_torch)}
        return from_flat(codes, "uint8", shape, in_torch), state
    if codec.name in FOUR_BIT_NAMES:
        state = {
            "quant_type": FOUR_BIT_NAMES[codec.name],
            "absmax": _tensor(parts["scales"], in_torch),
            "blocksize": codec.block_size,
            "quant_map": shared_table(codec, in_torch),
            "dtype": dtype_name(value),
            "shape": list(shape),
        }
        return from_flat(codes, "uint8", (codes.size, 1), in_torch), state
    return _tensor(encoded, in_torch), {"dtype": dtype_name(value), "shape": list(shape)}


def _adaquant_message(parts: Parts, shape: tuple[int, ...], in_torch: bool) -> tuple[Any, dict[str, Any]]:
    offset, norm, level = parts["header"].tolist()
    state: dict[str, Any] = {"offset": offset, "tensor_shape": list(shape)}
    if norm == 0:
        return _tensor(np.zeros(1, np.bool_), in_torch), state
    return _tensor(parts["codes"], in_torch), {**state, "norm": norm, "quantization_level": int(level)}


def _tensor(flat: Array, in_torch: bool) -> Any:
    return from_flat(flat, str(flat.dtype.name), flat.shape, in_torch)


_tables: dict[tuple[str, bool], Any] = {}


def shared_table(codec: Any, in_torch: bool) -> Any:
    """Return the codec's code table, one object per framework.

    FLARE's download path sends one object once per message.
    """
    key = (codec.name, in_torch)
    if key not in _tables:
        _tables.setdefault(key, _tensor(codec.table.copy(), in_torch))
    return _tables[key]


@dataclass(frozen=True)
class Received:
    """The codes of one tensor, which have been checked.

    Attributes:
        shape: of the tensor that they stand for.
        nbytes: how much of the message they are.
        decode_into: the function that writes the values to a flat float32, float16 or uint16 (bfloat16 bits) array.
        counted: whether the number of values follows from the number of codes.
        constant: whether all values are the same: then any number of them takes no more codes than one, and no limit
            has been looked at.
        encoded: what `decode_into` decodes, if that can be done run by run.
        decode_against: the function that writes the values to such an array with the help of those of the base, if the
            codec does that itself; None: what is decoded is to be added to them.
    """

    shape: tuple[int, ...]
    nbytes: int
    decode_into: Callable[[Array], None]
    counted: bool = True
    constant: bool = False
    decode_against: Callable[[Array, Array], None] | None = None
    encoded: Encoded | None = None


def from_message(name: str, codec: Codec, value: Any, state: Any, source: Any, limit: int) -> Received:
    """Check what `to_message` or FLARE made of the tensor `name`, whose dtype was `source`, before it is decoded.

    Args:
        limit: how many values the codes may stand for where their number doesn't follow from the number of codes, and
            they differ.

    Raises:
        CodecError: codes and state don't fit each other; the message names the tensor.
    """
    require(name, source in FLOAT_NAMES, f"source_datatype is {source!r}")
    require(name, isinstance(state, dict), f"quant_state is a {type(state).__name__}, not a dict")
    _require_plain(name, value, "the codes are")
    require(name, is_torch(value) or source != "bfloat16", "a numpy array can't have dtype bfloat16")
    if codec.name == "adaquant":
        return _received_adaquant(name, codec, value, state, limit)
    if codec.name in ("float16", "bfloat16"):
        # numpy has no bfloat16, and FLARE's tensor streaming makes torch tensors of arrays.
        wanted = ("bfloat16", "uint16") if codec.name == "bfloat16" else (codec.name,)
        require(name, dtype_name(value) in wanted, f"the codes have dtype {dtype_name(value)}, not {codec.name}")
        return _received(codec, {"codes": to_flat(value)}, tuple(value.shape), source)
    codes = _codes(name, value)
    if codec.name == "blockwise8":
        scales = _scales(name, state, codec, codes.size)
        table = _floats(name, state, "code", 256)
        default: Float32 = codec.table  # type: ignore[attr-defined]
        if not np.array_equal(table, default):  # bitsandbytes' table differs in last bits between processors
            require(name, bool((np.abs(table) <= 1).all()), "'code' holds values outside [-1, 1]")
            codec = Blockwise8(table)
        return _received(codec, {"scales": scales, "codes": codes}, tuple(value.shape), source)
    shape, n = _shape(name, state, "shape")
    require(name, _is(state.get("dtype"), source), f"'dtype' is {state.get('dtype')!r}, not {source!r}")
    if codec.name not in FOUR_BIT_NAMES:
        if isinstance(codec, FixedSizeCodec):
            fits = codes.size == codec.encoded_nbytes(n)
            require(name, fits, f"{codes.size} bytes of {codec.name} don't make shape {list(shape)}")
            for key, part in codec.parts(codes, n).items():
                finite = part.dtype != np.float32 or bool(np.isfinite(part).all())
                require(name, finite, f"'{key}' holds NaN or Inf")
        else:
            check_limit(name, n, limit)
        fixed = isinstance(codec, FixedSizeCodec)
        return Received(
            shape,
            codes.nbytes,
            partial(codec.decode_into, codes),
            counted=fixed,
            encoded=EncodedParts(codec, codec.parts(codes, n), n, source)
            if isinstance(codec, FixedSizeCodec)
            else None,
            decode_against=partial(codec.decode_against, codes) if isinstance(codec, ExactDelta) else None,
        )
    require(name, codes.size == -(-n // 2), f"{codes.size} bytes of codes don't make shape {list(shape)}")
    expected: dict[str, Any] = {"quant_type": FOUR_BIT_NAMES[codec.name], "blocksize": codec.block_size}
    for key, item in expected.items():
        require(name, _is(state.get(key), item), f"'{key}' is {state.get(key)!r}, not {item!r}")
    require(name, "nested_absmax" not in state, "its scales are quantized as well, which is not supported")
    scales = _scales(name, state, codec, n)
    table = _floats(name, state, "quant_map", 16)
    require(name, np.array_equal(table, codec.table), f"'quant_map' is not that of {codec.name}")  # type: ignore[attr-defined]
    return _received(codec, {"scales": scales, "codes": codes}, shape, source)


def codes_nbytes(value: Any, state: Any) -> int:
    """Return how many bytes of the message are a tensor's codes. FLARE has compressed ones in the state."""
    parts = [value, state.get("compressed_tensor") if isinstance(state, dict) else None]
    return sum(part.nbytes for part in parts if is_tensor(part) and is_plain(part))


def codec_for(name: str, state: Any, algorithm: Codec | None) -> Codec:
    """Return the codec of the tensor `name`: the message's or, in a mixed message, the one that its state names.

    Raises:
        CodecError: the state names no codec that is known here.
    """
    if algorithm is not None:
        return algorithm
    given = state.get("codec") if isinstance(state, dict) else None
    try:
        return get_codec(given)  # type: ignore[arg-type]
    except ValueError:
        raise CodecError(f"can't dequantize '{name}': its codec {given!r} is unknown here") from None


def require(name: str, condition: bool, problem: str) -> None:
    """Raise `CodecError` about the tensor `name` unless `condition` holds."""
    if not condition:
        raise CodecError(f"can't dequantize '{name}': {problem}")


def _require_plain(name: str, value: Any, what: str) -> None:
    """Raise `CodecError` unless `value` is a tensor whose values can be read: sparse and meta tensors have none."""
    require(name, is_tensor(value), f"{what} a {type(value).__name__}, not a tensor")
    require(name, is_plain(value), f"{what} a {type(value).__name__}, but no plain dense tensor")


def _received(codec: Codec, parts: Parts, shape: tuple[int, ...], source: str) -> Received:
    assert isinstance(codec, FixedSizeCodec)
    encoded = EncodedParts(codec, parts, math.prod(shape), source)
    return Received(shape, encoded.nbytes, lambda out: codec.decode_parts_into(parts, out), encoded=encoded)


def _received_adaquant(name: str, codec: Codec, value: Any, state: dict[str, Any], limit: int) -> Received:
    shape, n = _shape(name, state, "tensor_shape")
    norm, level = state.get("norm", 0.0), state.get("quantization_level", 0)
    numbers = {"offset": state.get("offset"), "norm": norm, "quantization_level": level}
    for key, number in numbers.items():
        # Compared and not asked with isfinite, which fails on integers beyond the range.
        good = type(number) in (int, float) and abs(number) <= sys.float_info.max
        require(name, good, f"'{key}' is {number!r}")
    codes = np.empty(0, np.uint8)
    nbytes = value.nbytes
    if level == 0 or norm == 0:  # a constant, or so narrow a range that FLARE found no level for it
        norm = 0.0
    elif "compressed_tensor" in state:
        check_limit(name, n, limit)
        packed = _codes(name, state["compressed_tensor"])
        nbytes, codes = packed.nbytes, _decompressed(name, packed, state.get("new_dtype"), n)
    else:
        codes = to_flat(value)
        require(name, codes.dtype in (np.uint8, np.uint16), f"the codes have dtype {codes.dtype}, not uint8 or uint16")
        require(name, codes.size == n, f"{codes.size} codes don't make shape {list(shape)}")
    if codes.size and level <= 255:
        require(name, codes.dtype == np.uint8, f"the codes of {level} levels have dtype {codes.dtype}, not uint8")
    header = np.array([numbers["offset"], norm, level], np.float64)
    encoded = np.concatenate([header.view(np.uint8), codes.view(np.uint8)])
    try:
        codec.parts(encoded, n)
    except CodecError as error:
        raise CodecError(f"can't dequantize '{name}': {error}") from None
    decode = partial(codec.decode_into, encoded)
    return Received(shape, nbytes, decode, counted=False, constant=norm == 0)


def _decompressed(name: str, packed: Bytes, dtype: Any, n: int) -> Array:
    require(name, isinstance(dtype, str) and dtype in _ADAQUANT_DTYPES, f"'new_dtype' is {dtype!r}")
    wanted = n * np.dtype(dtype).itemsize
    try:
        raw = bz2.BZ2Decompressor().decompress(packed.tobytes(), max_length=wanted + 1)
    except (OSError, ValueError) as error:
        raise CodecError(f"can't dequantize '{name}': its compressed codes are damaged: {error}") from None
    require(name, len(raw) == wanted, f"its compressed codes are not the {wanted} bytes that its shape takes")
    return np.frombuffer(raw, dtype)


def _shape(name: str, state: dict[str, Any], key: str) -> tuple[tuple[int, ...], int]:
    shape: Any = state.get(key)
    if isinstance(shape, list | tuple):
        require(name, len(shape) <= MAX_DIMENSIONS, f"'{key}' has {len(shape)} dimensions")
    # Sizes are Python integers: a hostile shape can't wrap around to a small product.
    good = isinstance(shape, list | tuple) and all(type(d) is int and d >= 0 for d in shape)
    require(name, good, f"'{key}' is {shape!r}")
    # numpy and torch refuse sizes beyond all memory even where another one is 0.
    require(name, math.prod(max(d, 1) for d in shape) <= _MAX_VALUES, f"'{key}' is {shape!r}")
    return tuple(shape), math.prod(shape)


def _is(found: Any, wanted: Any) -> bool:
    """Return whether a received item equals `wanted`; an array would answer with an array."""
    return isinstance(found, type(wanted)) and bool(found == wanted)


def check_limit(name: str, n: int, limit: int) -> None:
    """Raise `CodecError` if the tensor `name` stands for more values than it may."""
    problem = f"it stands for {n} values, but is not expected to have as many, and its message is too small for them"
    require(name, n <= limit, problem)


def _codes(name: str, value: Any) -> Array:
    _require_plain(name, value, "the codes are")
    require(name, dtype_name(value) == "uint8", f"the codes have dtype {dtype_name(value)}, not uint8")
    return to_flat(value)


def _floats(name: str, state: dict[str, Any], key: str, count: int) -> Float32:
    """`state[key]` as a flat float32 array of exactly `count` values."""
    value = state.get(key)
    _require_plain(name, value, f"'{key}' is")
    require(name, dtype_name(value) == "float32", f"'{key}' has dtype {dtype_name(value)}, not float32")
    flat = to_flat(value)
    require(name, flat.size == count, f"'{key}' has {flat.size} values, not {count}")
    require(name, bool(np.isfinite(flat).all()), f"'{key}' holds NaN or Inf")
    return flat


def _scales(name: str, state: dict[str, Any], codec: Codec, n: int) -> Float32:
    scales = _floats(name, state, "absmax", -(-n // codec.block_size))
    require(name, bool((scales >= 0).all()), "'absmax' holds negative values")
    return scales
