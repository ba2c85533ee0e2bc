"""Codes back to a model's tensors. Everything that came from the peer is checked before it is used.

The metadata is described in `nvflare_rdma.filters.encoding` and `nvflare_rdma.filters.metadata`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nvflare_rdma.codecs import CODEC_NAMES, Codec, FixedSizeCodec, get_codec
from nvflare_rdma.codecs.base import Array
from nvflare_rdma.codecs.tensors import FLOAT_NAMES, float_bits, from_flat, is_torch, new_flat
from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters.encoding import EXACT, MIB, MIXED, has_memory
from nvflare_rdma.filters.flat_params import flatten, rebuild
from nvflare_rdma.filters.metadata import Received, codec_for, from_message

# Values that a message may stand for beyond those that its codes are counted for: constants take no codes at all, and
# lossless and compressed ones few. 4096 is more than any of them reaches on weights.
_FREE_VALUES = 16 << 20
_VALUES_PER_BYTE = 4096

Decode = Callable[[str, Received, Array], None]


@dataclass
class DecodedParams:
    """What `decode_params` made: new dicts, the decoded arrays by name (flat), and counts for the log."""

    params: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    count: int = 0
    before: int = 0
    after: int = 0

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{len(self.arrays)}/{self.count} params. Before dequantization: {self.before / MIB:.2f} MB with meta. "
            f"After dequantization: {self.after / MIB:.2f} MB."
        )


def decode_alone(name: str, received: Received, out: Array) -> None:
    """Decode a tensor that was encoded on its own."""
    received.decode_into(out)


def decode_params(
    params: dict[str, Any],
    algorithm: Any,
    quant_state: Any,
    source_datatype: Any,
    tied: Any = None,
    decode: Decode = decode_alone,
) -> DecodedParams:
    """Decode `params`; the metadata's parts are as they came. `params` is not changed.

    Decoded tensors have memory of their own, but names that `tied` maps to another name share that one's tensor.

    Raises:
        CodecError: an unknown algorithm, or metadata that doesn't fit the codes; the message names the tensor.
    """
    codec = _algorithm(algorithm)
    for what, part in (("quant_state", quant_state), ("source_datatype", source_datatype), ("tied", tied or {})):
        if not isinstance(part, dict):
            raise CodecError(f"the message's {what} must be a dict but is a {type(part).__name__}")
    values = flatten(params)
    ties = _checked_ties(tied or {}, values)
    limit = _FREE_VALUES + _VALUES_PER_BYTE * sum(v.nbytes for v in values.values() if has_memory(v))
    result, flat = DecodedParams(count=len(values)), {}
    for name, value in values.items():
        source = source_datatype.get(name)
        if name not in ties and not isinstance(source, str):  # anything else may refuse to be compared
            raise CodecError(f"can't dequantize '{name}': source_datatype is {source!r}")
        if name in ties or source == EXACT or _is_no_wider(codec, source):
            flat[name] = value
            continue
        state = quant_state.get(name)
        own = codec_for(name, state, codec)
        received = from_message(name, own, value, state, source, limit)
        n = math.prod(received.shape)
        limit -= n
        out = new_flat(source, n)
        try:
            decode(name, received, out)
        except CodecError as error:
            raise CodecError(f"can't dequantize '{name}': {error}") from None
        result.arrays[name] = out
        flat[name] = from_flat(out, source, received.shape, is_torch(value))
        result.before += received.nbytes
        result.after += out.nbytes
    flat |= {name: flat[other] for name, other in ties.items()}
    result.params = rebuild(params, flat)
    return result


def _algorithm(algorithm: Any) -> Codec | None:
    """The codec of the whole message, or None if each tensor names its own."""
    if isinstance(algorithm, str) and algorithm == MIXED:
        return None
    if not isinstance(algorithm, str) or algorithm.lower() not in CODEC_NAMES:
        raise CodecError(
            f"the message is quantized with {algorithm!r}, which this version can't decode; "
            f"set the sender's quantization_type to one of: {', '.join(CODEC_NAMES)}"
        )
    return get_codec(algorithm)


def _is_no_wider(codec: Codec | None, source: Any) -> bool:
    """Whether FLARE's quantizer would have left a tensor of dtype `source` as it is."""
    return isinstance(codec, FixedSizeCodec) and source in FLOAT_NAMES and codec.bits >= float_bits(source)


def _checked_ties(tied: dict[Any, Any], values: dict[str, Any]) -> dict[str, str]:
    for name, other in tied.items():
        if name not in values or not isinstance(other, str) or other not in values or other in tied:
            raise CodecError(f"'{name}' is tied to '{other}', but the message has no such two tensors")
    return tied
