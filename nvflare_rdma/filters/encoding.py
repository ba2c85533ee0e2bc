"""A model's tensors to codes, with the metadata that FLARE's quantization filters use.

Metadata (source: `nvflare.app_opt.pt.quantization.quantizer`), per tensor name:

- ``source_datatype``: the dtype's name, or ``bool`` for whatever travels exact: FLARE's dequantizer leaves those be;
- ``quant_state``: ``{}`` for exact tensors and the 16-bit types; ``absmax`` and ``code`` for blockwise8; for
  float4 and normfloat4 what bitsandbytes' ``QuantState.as_dict`` gives, except that ``shape`` is a list: FLARE's
  serializer spends 126 bytes on a tuple of two and 9 on a list.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvflare_rdma.codecs import FixedSizeCodec
from nvflare_rdma.codecs.tensors import (
    FLOAT_NAMES,
    dtype_name,
    float_bits,
    from_flat,
    identity,
    is_encodable,
    is_tensor,
    is_torch,
    to_array,
)
from nvflare_rdma.errors import UnrepresentableError

EXACT = "bool"  # the source_datatype that makes FLARE's dequantizer skip a tensor
MIB = 1 << 20
FOUR_BIT_NAMES = {"float4": "fp4", "normfloat4": "nf4"}  # what bitsandbytes calls them


@dataclass
class EncodedParams:
    """What `encode_params` made.

    Attributes:
        params: a new dict, codes in place of the tensors that were encoded.
        quant_state, source_datatype: FLARE's metadata.
        exact: tensors that travel exact for a reason worth a warning, and the reason.
    """

    params: dict[str, Any] = field(default_factory=dict)
    quant_state: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_datatype: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    encoded: int = 0
    before: int = 0
    after: int = 0
    meta: int = 0

    def summary(self) -> str:
        """One line for the log: how many tensors, and bytes before and after."""
        return (
            f"{self.encoded}/{len(self.params)} params. Before quantization: {self.before / MIB:.2f} MB. "
            f"After quantization: {self.after / MIB:.2f} MB with meta: {self.meta / MIB:.2f} MB."
        )


def encode_params(params: dict[str, Any], codec: FixedSizeCodec) -> EncodedParams:
    """Encode what `codec` can carry of `params`; the rest is passed on as it is. `params` is not changed.

    Tensors that are the same view of the same memory (tied weights) are encoded once and share their codes.
    """
    result = EncodedParams()
    done: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}
    for name, value in params.items():
        result.params[name], result.quant_state[name] = value, {}
        reason = _reason_for_exact(value, codec)
        if reason is None:
            key = identity(value)
            try:
                if key not in done:
                    done[key] = _encode(value, codec)
                result.params[name], state = done[key]
                result.quant_state[name] = dict(state)
                result.encoded += 1
                result.after += result.params[name].nbytes
                result.meta += sum(v.nbytes for v in state.values() if is_tensor(v))
            except UnrepresentableError as error:
                reason = str(error)
        if is_tensor(value):
            result.before += value.nbytes if reason is None else 0
        if reason:
            result.exact[name] = reason
        # A tensor that is no wider than the codes keeps its dtype's name, as with FLARE: its dequantizer compares.
        narrow = is_tensor(value) and dtype_name(value) in FLOAT_NAMES and codec.bits >= float_bits(dtype_name(value))
        result.source_datatype[name] = dtype_name(value) if reason is None or narrow else EXACT
    return result


def _reason_for_exact(value: Any, codec: FixedSizeCodec) -> str | None:
    """None if `value` is to be encoded; else why not, "" if that needs no telling."""
    if not is_tensor(value):
        return f"a {type(value).__name__}, not a tensor" if isinstance(value, dict | list | tuple) else ""
    name = dtype_name(value)
    if not is_encodable(value):
        expected = name.startswith(("int", "uint", "bool")) or 0 in value.shape
        return "" if expected else f"{type(value).__name__} of dtype {name} is not a type that can be quantized"
    n = int(np.prod(value.shape, dtype=object))
    if codec.bits >= float_bits(name) or codec.encoded_nbytes(n) * 8 >= n * float_bits(name):
        return ""
    return None


def _encode(value: Any, codec: FixedSizeCodec) -> tuple[Any, dict[str, Any]]:
    """Codes and quant_state of one encodable tensor, in its own framework."""
    in_torch = is_torch(value)
    values = to_array(value)
    encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
    codec.encode_into(values, encoded)
    parts = codec.parts(encoded, values.size)
    codes = parts["codes"]
    shape = tuple(value.shape)
    if codec.name == "bfloat16":
        return from_flat(codes, "bfloat16", shape, True) if in_torch else codes.reshape(shape), {}
    if codec.name == "float16":
        return from_flat(codes, "float16", shape, in_torch), {}
    absmax = from_flat(parts["scales"], "float32", (parts["scales"].size,), in_torch)
    table = shared_table(codec, in_torch)
    if codec.name == "blockwise8":
        return from_flat(codes, "uint8", shape, in_torch), {"absmax": absmax, "code": table}
    state = {
        "quant_type": FOUR_BIT_NAMES[codec.name],
        "absmax": absmax,
        "blocksize": codec.block_size,
        "quant_map": table,
        "dtype": dtype_name(value),
        "shape": list(shape),
    }
    return from_flat(codes, "uint8", (codes.size, 1), in_torch), state


_tables: dict[tuple[str, bool], Any] = {}


def shared_table(codec: Any, in_torch: bool) -> Any:
    """The codec's code table, one object per framework: FLARE's download path sends one object once per message."""
    key = (codec.name, in_torch)
    if key not in _tables:
        _tables.setdefault(key, from_flat(codec.table.copy(), "float32", codec.table.shape, in_torch))
    return _tables[key]
