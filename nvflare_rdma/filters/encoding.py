"""A model's tensors to codes, with the metadata that FLARE's quantization filters use.

``source_datatype`` has the dtype's name of each tensor, or ``bool`` for whatever travels exact: FLARE's dequantizer
leaves those be. ``quant_state`` has what `nvflare_rdma.filters.metadata` says.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvflare_rdma.codecs import Codec, FixedSizeCodec
from nvflare_rdma.codecs.base import Array
from nvflare_rdma.codecs.policy import Decision, Policy
from nvflare_rdma.codecs.tensors import (
    FLOAT_NAMES,
    dtype_name,
    float_bits,
    identity,
    is_encodable,
    is_on_gpu,
    is_tensor,
    is_torch,
    to_array,
)
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.filters.flat_params import flatten, rebuild
from nvflare_rdma.filters.metadata import to_message

EXACT = "bool"  # the source_datatype that makes FLARE's dequantizer skip a tensor
MIXED = "mixed"  # the algorithm of a message whose tensors name their codecs themselves
MIB = 1 << 20

#: A tensor's name, its codec and the tensor -> the encoded bytes that count, uint8, in CPU memory.
Encode = Callable[[str, Codec, Any], Array]

#: A tensor's name, its codec and the tensor -> a view of it that is marked (`nvflare_rdma.codecs.marks`).
Mark = Callable[[str, FixedSizeCodec, Any], Any]


@dataclass
class EncodedParams:
    """What `encode_params` made.

    Attributes:
        params: new dicts, codes in place of the tensors that were encoded.
        algorithm: the codec of all encoded tensors, or `MIXED`.
        quant_state, source_datatype: FLARE's metadata.
        tied: names whose tensors are the same memory as that of another name.
        codecs: the codec of each tensor that was encoded; of tied ones, the first only.
        exact: tensors that travel exact for a reason worth a warning, and the reason.
        marked: the codec of each tensor that is encoded only when it is sent (`nvflare_rdma.codecs.marks`). For
            FLARE's metadata it is one that travels exact.
    """

    algorithm: str
    params: dict[str, Any] = field(default_factory=dict)
    quant_state: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_datatype: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    codecs: dict[str, Codec] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    marked: dict[str, FixedSizeCodec] = field(default_factory=dict)
    before: int = 0
    after: int = 0
    meta: int = 0

    def summary(self) -> str:
        """One line for the log: how many tensors, and bytes before and after. Tied tensors count once."""
        if self.marked:
            return (
                f"{len(self.marked)}/{len(self.quant_state)} params are encoded as they are sent, "
                f"{len(self.codecs)} were encoded now. Before quantization: {self.before / MIB:.2f} MB. "
                f"After quantization: {self.after / MIB:.2f} MB."
            )
        return (
            f"{len(self.codecs)}/{len(self.quant_state)} params. Before quantization: {self.before / MIB:.2f} MB. "
            f"After quantization: {self.after / MIB:.2f} MB with meta: {self.meta / MIB:.2f} MB."
        )


def encode_whole(name: str, codec: Codec, value: Any) -> Array:
    """Encode a tensor (of any shape) on its own: nothing is known of earlier messages. If it is in a GPU's memory, that
    does it, with the same result, and only the codes come to the CPU."""
    if is_on_gpu(value):
        from nvflare_rdma.codecs.on_device import can_encode_on_device, encode_on_device

        if can_encode_on_device(codec):
            return encode_on_device(codec, value)
    values = to_array(value)
    encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
    return encoded[: codec.encode_into(values, encoded)]


def encode_params(
    params: dict[str, Any], policy: Policy, encode: Encode = encode_whole, mark: Mark | None = None
) -> EncodedParams:
    """Encode each tensor with the codec that `policy` has for it; the rest is passed on as it is.

    `params` is not changed. Tensors that are the same view of the same memory (tied weights) are encoded once, share
    their codes, and are named in `EncodedParams.tied`. ``mark``: marks tensors whose codec's sizes are known before;
    they are not encoded then.
    """
    values = flatten(params)
    result = EncodedParams(policy.codec.name)
    flat: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in values.items():
        flat[name], result.quant_state[name], result.source_datatype[name] = value, {}, EXACT
        if has_memory(value):
            other = first.setdefault(identity(value), name)
            if other != name:
                result.tied[name] = other
                flat[name] = flat[other]
                result.quant_state[name] = dict(result.quant_state[other])
                result.source_datatype[name] = result.source_datatype[other]
                continue
        decision, warning = _decide(name, value, policy)
        if mark is not None and isinstance(decision.codec, FixedSizeCodec):
            flat[name] = mark(name, decision.codec, value)
            result.marked[name] = decision.codec
            result.before += value.nbytes
            result.after += decision.codec.encoded_nbytes(math.prod(value.shape))
        elif decision.codec is not None:
            warning = _encode_one(name, value, decision.codec, encode, flat, result)
        if warning:
            result.exact[name] = warning
    _name_codecs(result)
    for name, value in values.items():
        # A tensor that is no wider than the codes keeps its dtype's name, as with FLARE: its dequantizer compares.
        if result.algorithm != MIXED and result.source_datatype[name] == EXACT and is_tensor(value):
            dtype = dtype_name(value)
            codec = next(iter(result.codecs.values()), policy.codec)
            no_wider = dtype in FLOAT_NAMES and isinstance(codec, FixedSizeCodec) and codec.bits >= float_bits(dtype)
            result.source_datatype[name] = dtype if no_wider else EXACT
    result.params = rebuild(params, flat)
    return result


def has_memory(value: Any) -> bool:
    """Whether `value` is a tensor with an address that it can share with another one."""
    if is_torch(value):
        return str(value.layout) == "torch.strided" and value.device.type != "meta" and value.numel() > 0
    return type(value) is np.ndarray and value.size > 0


def _decide(name: str, value: Any, policy: Policy) -> tuple[Decision, str | None]:
    """What the policy says, and why a value that it can't encode deserves a warning, if it does."""
    if not is_tensor(value):
        listed = isinstance(value, list | tuple | dict)
        return Decision(None, "no tensor"), f"a {type(value).__name__}, not a tensor" if listed else None
    dtype = dtype_name(value)
    if not is_encodable(value):
        expected = dtype.startswith(("int", "uint", "bool")) or 0 in value.shape
        reason = None if expected else f"{type(value).__name__} of dtype {dtype} is not a type that can be quantized"
        return Decision(None, dtype), reason
    return policy.decide(name, dtype, tuple(value.shape)), None


def _encode_one(
    name: str, value: Any, codec: Codec, encode: Encode, flat: dict[str, Any], result: EncodedParams
) -> str | None:
    """Put `value`'s codes into `flat` and `result`, or return why it has to travel exact, if that is worth telling."""
    try:
        encoded = encode(name, codec, value)
    except UnrepresentableError as error:
        return str(error)
    if not isinstance(codec, FixedSizeCodec) and encoded.nbytes >= value.nbytes:
        return None
    flat[name], state = to_message(codec, encoded, value)
    result.quant_state[name] = state
    result.source_datatype[name] = dtype_name(value)
    result.codecs[name] = codec
    result.before += value.nbytes
    result.after += flat[name].nbytes
    result.meta += sum(v.nbytes for v in state.values() if is_tensor(v))
    return None


def _name_codecs(result: EncodedParams) -> None:
    """Name the one codec in the message's algorithm, or each tensor's in its state."""
    names = {codec.name for codec in result.codecs.values()}
    if len(names) == 1:
        (result.algorithm,) = names
    elif names:
        result.algorithm = MIXED
        for name, codec in result.codecs.items():
            result.quant_state[name]["codec"] = codec.name
