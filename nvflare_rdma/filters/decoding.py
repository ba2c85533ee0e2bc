"""Codes back to a model's tensors. Everything that came from the peer is checked before it is used.

The metadata is described in `nvflare_rdma.filters.encoding`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvflare_rdma.codecs import Blockwise8, FixedSizeCodec
from nvflare_rdma.codecs.base import Array, Float32, Parts
from nvflare_rdma.codecs.tensors import (
    FLOAT_NAMES,
    dtype_name,
    float_bits,
    from_flat,
    is_tensor,
    is_torch,
    new_flat,
    to_flat,
)
from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters.encoding import EXACT, FOUR_BIT_NAMES, MIB
from nvflare_rdma.filters.types import QUANTIZATION_TYPES, codec_of


@dataclass
class DecodedParams:
    """What `decode_params` made: a new dict, and counts for the log."""

    params: dict[str, Any] = field(default_factory=dict)
    decoded: int = 0
    before: int = 0
    after: int = 0

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.decoded}/{len(self.params)} params. Before dequantization: {self.before / MIB:.2f} MB with meta. "
            f"After dequantization: {self.after / MIB:.2f} MB."
        )


def decode_params(params: dict[str, Any], algorithm: Any, quant_state: Any, source_datatype: Any) -> DecodedParams:
    """Decode `params`; the metadata's three parts are as they came. `params` is not changed.

    Every decoded tensor has memory of its own, also where names share codes.

    Raises:
        CodecError: an unknown algorithm, or metadata that doesn't fit the codes; the message names the tensor.
    """
    if not isinstance(algorithm, str) or algorithm.lower() not in QUANTIZATION_TYPES:
        raise CodecError(
            f"the message is quantized with {algorithm!r}, which this version can't decode; "
            f"set the sender's quantization_type to one of: {', '.join(QUANTIZATION_TYPES)}"
        )
    for what, part in (("quant_state", quant_state), ("source_datatype", source_datatype)):
        if not isinstance(part, dict):
            raise CodecError(f"the message's {what} must be a dict but is a {type(part).__name__}")
    codec = codec_of(algorithm)
    result = DecodedParams()
    for name, value in params.items():
        source = source_datatype.get(name)
        if source == EXACT or (source in FLOAT_NAMES and codec.bits >= float_bits(source)):
            result.params[name] = value
            continue
        state = quant_state.get(name)
        _require(name, source in FLOAT_NAMES, f"source_datatype is {source!r}")
        _require(name, isinstance(state, dict), f"quant_state is a {type(state).__name__}, not a dict")
        _require(name, is_tensor(value), f"the codes are a {type(value).__name__}, not a tensor")
        result.params[name] = decoded = _DECODERS[codec.name](name, value, state, source, codec)
        result.decoded += 1
        result.before += value.nbytes + sum(v.nbytes for k, v in state.items() if k == "absmax")
        result.after += decoded.nbytes
    return result


def _require(name: str, condition: bool, problem: str) -> None:
    if not condition:
        raise CodecError(f"can't dequantize '{name}': {problem}")


def _decode_half(name: str, value: Any, state: dict[str, Any], source: str, codec: FixedSizeCodec) -> Any:
    wanted = "uint16" if codec.name == "bfloat16" and not is_torch(value) else codec.name
    _require(name, dtype_name(value) == wanted, f"the codes have dtype {dtype_name(value)}, not {wanted}")
    return _decode(name, {"codes": to_flat(value)}, tuple(value.shape), source, codec, is_torch(value))


def _decode_blockwise8(name: str, value: Any, state: dict[str, Any], source: str, codec: FixedSizeCodec) -> Any:
    codes = _codes(name, value)
    scales = _scales(name, state, codec, codes.size)
    table = _floats(name, state, "code", 256)
    default: Float32 = codec.table  # type: ignore[attr-defined]
    if not np.array_equal(table, default):  # bitsandbytes' table differs in last bits between processors
        _require(name, bool((np.abs(table) <= 1).all()), "'code' holds values outside [-1, 1]")
        codec = Blockwise8(table)
    return _decode(name, {"scales": scales, "codes": codes}, tuple(value.shape), source, codec, is_torch(value))


def _decode_4bit(name: str, value: Any, state: dict[str, Any], source: str, codec: FixedSizeCodec) -> Any:
    codes = _codes(name, value)
    shape: Any = state.get("shape")
    # Sizes are Python integers: a hostile shape can't wrap around to a small product.
    good = isinstance(shape, list | tuple) and all(type(d) is int and d >= 0 for d in shape)
    _require(name, good, f"'shape' is {shape!r}")
    n = 1
    for d in shape:
        n *= d
    _require(name, codes.size == -(-n // 2), f"{codes.size} bytes of codes don't make shape {list(shape)}")
    for key, wanted in (("quant_type", FOUR_BIT_NAMES[codec.name]), ("blocksize", codec.block_size), ("dtype", source)):
        _require(name, state.get(key) == wanted, f"'{key}' is {state.get(key)!r}, not {wanted!r}")
    _require(name, "nested_absmax" not in state, "its scales are quantized as well, which is not supported")
    scales = _scales(name, state, codec, n)
    table = _floats(name, state, "quant_map", 16)
    default: Float32 = codec.table  # type: ignore[attr-defined]
    _require(name, np.array_equal(table, default), f"'quant_map' is not that of {codec.name}")
    return _decode(name, {"scales": scales, "codes": codes}, tuple(shape), source, codec, is_torch(value))


_DECODERS: dict[str, Callable[[str, Any, dict[str, Any], str, FixedSizeCodec], Any]] = {
    "float16": _decode_half,
    "bfloat16": _decode_half,
    "blockwise8": _decode_blockwise8,
    "float4": _decode_4bit,
    "normfloat4": _decode_4bit,
}


def _decode(name: str, parts: Parts, shape: tuple[int, ...], source: str, codec: FixedSizeCodec, in_torch: bool) -> Any:
    _require(name, in_torch or source != "bfloat16", "a numpy array can't have dtype bfloat16")
    n = 1
    for d in shape:
        n *= d
    out = new_flat(source, n)
    codec.decode_parts_into(parts, out)
    return from_flat(out, source, shape, in_torch)


def _codes(name: str, value: Any) -> Array:
    _require(name, dtype_name(value) == "uint8", f"the codes have dtype {dtype_name(value)}, not uint8")
    return to_flat(value)


def _floats(name: str, state: dict[str, Any], key: str, count: int) -> Float32:
    """`state[key]` as a flat float32 array of exactly `count` values."""
    value = state.get(key)
    _require(name, is_tensor(value), f"'{key}' is a {type(value).__name__}, not a tensor")
    _require(name, dtype_name(value) == "float32", f"'{key}' has dtype {dtype_name(value)}, not float32")
    flat = to_flat(value)
    _require(name, flat.size == count, f"'{key}' has {flat.size} values, not {count}")
    _require(name, bool(np.isfinite(flat).all()), f"'{key}' holds NaN or Inf")
    return flat


def _scales(name: str, state: dict[str, Any], codec: FixedSizeCodec, n: int) -> Float32:
    scales = _floats(name, state, "absmax", -(-n // codec.block_size))
    _require(name, bool((scales >= 0).all()), "'absmax' holds negative values")
    return scales
