"""Codes back to a model's tensors. Everything that came from the peer is checked before it is used.

The metadata is described in `nvflare_rdma.filters.encoding` and `nvflare_rdma.filters.metadata`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvflare_rdma.accumulate import Holdings, encoded_tensor, plain
from nvflare_rdma.codecs import (
    CODEC_NAMES,
    Array,
    Codec,
    dtype_name,
    from_flat,
    get_codec,
    is_tensor,
    is_torch,
    new_flat,
)
from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters.correction import OnBase, add_base
from nvflare_rdma.filters.delta_base import Base
from nvflare_rdma.filters.encoding import EXACT_DTYPE, MIB, MIXED, is_no_wider
from nvflare_rdma.filters.expected import Sizes
from nvflare_rdma.filters.metadata import Received, check_limit, codec_for, codes_nbytes, from_message, require

# Values that a message may stand for, beyond those that are expected and those that its codes are counted for:
# constants take no codes at all, and lossless and compressed ones few.
_FREE_VALUES = 16 << 20
# Values that one byte of a tensor's own codes may stand for. Weights reach none of these. Where much is expected, what
# is not has no more than codes of two bits, which are counted; a site may get a whole model that is nearly all zero.
_VALUES_PER_BYTE = 4096
_VALUES_PER_BYTE_STRICT = 64
_VALUES_PER_BYTE_EXPECTED = 4


@dataclass(frozen=True)
class Metadata:
    """A message's metadata as it came: nothing has been checked.

    Attributes:
        algorithm, quant_state, source_datatype: FLARE's.
        tied: see `nvflare_rdma.filters.encoding.EncodedParams`.
    """

    algorithm: Any
    quant_state: Any
    source_datatype: Any
    tied: Any = None


@dataclass
class DecodedParams:
    """What `decode_params` made.

    Attributes:
        values: tensors and whatever else was in the message, by flat name.
        arrays: the memory of those that were decoded, flat, by name.
        views: constants that were decoded to one value, which stands for all.
        kept: how many tensors stay encoded.
        count: how many values the message has.
        before, after: bytes of the codes with their metadata, and of the memory that they were decoded to.
    """

    values: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    views: set[str] = field(default_factory=set)
    kept: int = 0
    count: int = 0
    before: int = 0
    after: int = 0

    def summary(self) -> str:
        """Return one line for the log."""
        views = f", and {len(self.views)} constants are views of one value each" if self.views else ""
        kept = f", and {self.kept} stay encoded until they are added" if self.kept else ""
        return (
            f"{len(self.arrays) + len(self.views)}/{self.count} params{kept}. "
            f"Before dequantization: {self.before / MIB:.2f} MB with meta. "
            f"After dequantization: {self.after / MIB:.2f} MB{views}."
        )


def decode_params(
    values: Mapping[str, Any],
    metadata: Metadata,
    base: Base | None = None,
    expected: Sizes | None = None,
    strict: bool = False,
    count: int = 1,
    holdings: Holdings | None = None,
) -> DecodedParams:
    """Decode what was received, given by flat name. `values` is not changed.

    Tensors that FLARE has left on disk, and codes that wait there to be added (`nvflare_rdma.accumulate`), are loaded
    one at a time, as they are decoded; all others stay there. Decoded
    tensors have memory of their own, but names that are tied to another name share that one's tensor, and
    constants that have more values than are expected of a message of this size are views of one value: they take memory
    when somebody needs it.

    Args:
        base: the model that tensors are the difference from, if there is one.
        expected: how many values tensors may have, whatever they take in the message.
        strict: refuse what would be such a view, and take fewer values for each byte of codes.
        count: how many of these are in the message, which share what may come without being expected.
        holdings: keep torch tensors encoded until they are added, where that can be done run by run, and count them
            here; None: decode all of them.

    Raises:
        CodecError: an unknown algorithm, metadata that doesn't fit the codes, the difference from a tensor that isn't
            in `base`, or codes that stand for more values than are expected; the message names the tensor.
    """
    codec = _algorithm(metadata.algorithm)
    states, sources, tied = (
        metadata.quant_state,
        metadata.source_datatype,
        {} if metadata.tied is None else metadata.tied,
    )
    for what, part in (("quant_state", states), ("source_datatype", sources), ("tied", tied)):
        if not isinstance(part, dict):
            raise CodecError(f"the message's {what} must be a dict but is a {type(part).__name__}")
    ties = _checked_ties(tied, values)
    free = _FREE_VALUES // count
    per_byte = _values_per_byte(expected, strict)
    result = DecodedParams(count=len(values))
    for name, value in values.items():
        source = sources.get(name)
        if name not in ties and not isinstance(source, str):  # anything else may refuse to be compared
            raise CodecError(f"can't dequantize '{name}': source_datatype is {source!r}")
        if name in ties or source == EXACT_DTYPE or is_no_wider(codec, source):
            result.values[name] = value
            continue
        state = states.get(name)
        its_codec = codec_for(name, state, codec)
        value, state = _loaded(value), _loaded_state(state)
        if _is_left_alone(its_codec, value, state, source):
            result.values[name] = values[name]
            continue
        value = plain(value)
        known = base.sized(name) if base is not None else 0
        room = max((expected or {}).get(name, 0), known, per_byte * codes_nbytes(value, state))
        limit = max(free, room)
        received = from_message(name, its_codec, value, state, source, limit)
        n = math.prod(received.shape)
        is_difference = _is_difference(name, state)
        problem = f"it is the difference from a tensor of {n} values that isn't here"
        require(name, n == known or not is_difference, problem)
        if received.constant and strict:
            check_limit(name, n, limit)
        if received.constant and n > limit:
            result.values[name] = _view_of_constant(received, source, is_torch(value))
            result.views.add(name)
            result.before += received.nbytes
            continue
        if not received.counted and n > room:
            free -= n
        out = new_flat(source, n)
        offset = base.tensor(name, out) if base is not None and is_difference else None
        problem = f"it is the difference from a tensor of dtype {source} that isn't here"
        require(name, offset is not None or not is_difference, problem)
        if holdings is not None and received.encoded is not None and is_torch(value):
            encoded = received.encoded if offset is None else OnBase(received.encoded, offset)
            result.values[name] = encoded_tensor(encoded, received.shape, holdings)
            result.kept += 1
            result.before += received.nbytes
            continue
        try:
            if offset is not None and received.decode_against is not None:
                received.decode_against(offset, out)
            elif is_difference:
                difference = np.empty(n, np.float32)
                received.decode_into(difference)
                add_base(difference, offset, out)
            else:
                received.decode_into(out)
        except CodecError as error:
            raise CodecError(f"can't dequantize '{name}': {error}") from None
        result.arrays[name] = out
        result.values[name] = from_flat(out, source, received.shape, is_torch(value))
        result.before += received.nbytes
        result.after += out.nbytes
    result.values |= {name: result.values[other] for name, other in ties.items()}
    return result


def _loaded(value: Any) -> Any:
    """Return the tensor that FLARE has put on disk on its way, where a workflow has `enable_tensor_disk_offload`."""
    return value.materialize() if hasattr(value, "materialize") and not is_tensor(value) else value


def _loaded_state(state: Any) -> Any:
    """Return the state with all tensors in memory. A transfer can't tell codes and scales from a model's values, so at
    a server beyond its memory budget they may wait to be added as well, which nobody will do."""
    return {key: plain(_loaded(value)) for key, value in state.items()} if isinstance(state, dict) else state


def _values_per_byte(expected: Sizes | None, strict: bool) -> int:
    if not strict:
        return _VALUES_PER_BYTE
    return _VALUES_PER_BYTE_EXPECTED if expected else _VALUES_PER_BYTE_STRICT


def _is_difference(name: str, state: Mapping[str, Any]) -> bool:
    found = state.get("delta", False)
    require(name, type(found) is bool, f"delta is a {type(found).__name__}, and not a bool")
    return bool(found)


def _is_left_alone(codec: Codec, value: Any, state: Any, source: Any) -> bool:
    """Return whether FLARE's quantizer has found no fewer bits for the tensor, which it says with an empty state."""
    empty = isinstance(state, dict) and not state
    return empty and codec.name == "adaquant" and is_tensor(value) and dtype_name(value) == source


def _view_of_constant(received: Received, source: str, torch_tensor: bool) -> Any:
    """Return a tensor of one value in memory. It can be read as any other; to write to it fails."""
    one = new_flat(source, 1)
    received.decode_into(one)
    value = from_flat(one, source, (1,), torch_tensor)
    return value.expand(received.shape) if torch_tensor else np.broadcast_to(value, received.shape)


def _algorithm(algorithm: Any) -> Codec | None:
    """Return the codec of the whole message, or None if each tensor names its own."""
    if isinstance(algorithm, str) and algorithm == MIXED:
        return None
    if not isinstance(algorithm, str) or algorithm.lower() not in CODEC_NAMES:
        raise CodecError(
            f"the message is quantized with {algorithm!r}, which this version can't decode; "
            f"set the sender's quantization_type to one of: {', '.join(CODEC_NAMES)}"
        )
    return get_codec(algorithm)


def _checked_ties(tied: dict[Any, Any], values: Mapping[str, Any]) -> dict[str, str]:
    for name, other in tied.items():
        # FLARE's filters take numbers for names, too. Anything else may refuse to be looked up.
        if name not in values or type(other) not in (str, int) or other not in values or other in tied:
            raise CodecError(f"'{name}' is tied to '{other}', but the message has no such two tensors")
    return tied
