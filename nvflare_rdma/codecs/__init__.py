"""Codecs: tensors to few bits and back. Needs numpy and numba, neither FLARE nor torch.

What other packages use is here. What encodes on a GPU needs torch, and is loaded when it is asked for.

- `get_codec` gives a `Codec` by name, `warm_up` loads its compiled code beforehand. What a codec is, and what its parts
  are, is in `nvflare_rdma.codecs.base`.
- A `Policy` chooses the codec of each tensor of a model.
- `to_flat`, `from_flat` and the like are the edge between numpy's and torch's tensors and flat arrays.
- `marked` tensors are encoded when they are sent, with the codec that `codec_of` returns, and `piece_notes` knows
  what became of them. `codes_in` knows what codes stand for. `was_decoded` says at their receiver that they came so.
- `estimate_error` and `measure_error` tell a tensor's `RelativeError`: how much of it a codec loses.
- `add_scaled` adds values to a sum, as `FixedSizeCodec.add_into` does without decoding them anywhere first.
- `float32_runs`, `output_runs` and `read_run` go through a tensor within a bounded amount of memory.
- `read_header` tells where the tensors of a safetensors file lie.

>>> import numpy as np
>>> from nvflare_rdma.codecs import get_codec
>>> codec, x = get_codec("normfloat4"), np.linspace(-1, 1, 128, dtype=np.float32)
>>> out = bytearray(codec.encoded_nbytes(x.size))
>>> codec.encode_into(x, out)
72
>>> {name: part.size for name, part in codec.parts(out, x.size).items()}
{'scales': 2, 'codes': 64}
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvflare_rdma.codecs.base import Array, Bytes, Codec, FixedSizeCodec, Float32, Parts, add_scaled
from nvflare_rdma.codecs.blockwise import Blockwise8
from nvflare_rdma.codecs.exact_delta import ExactDelta
from nvflare_rdma.codecs.fidelity import (
    LOSSLESS,
    PieceNotes,
    RelativeError,
    SampledLoss,
    Squares,
    estimate_error,
    lost_by,
    measure_error,
    sample_runs,
    squares_of,
)
from nvflare_rdma.codecs.marks import (
    Codes,
    codec_of,
    codes_in,
    marked,
    note_codes,
    note_decoded,
    piece_notes,
    was_decoded,
)
from nvflare_rdma.codecs.policy import EXACT, Decision, Policy, better_types, role_of
from nvflare_rdma.codecs.registry import CODEC_NAMES, get_codec
from nvflare_rdma.codecs.runs import TILE, float32_runs, output_runs, read_run
from nvflare_rdma.codecs.safetensors_header import StoredTensor, is_storable, make_header, read_header
from nvflare_rdma.codecs.tensors import (
    FLOAT_NAMES,
    MAX_DIMENSIONS,
    NUMPY_DTYPES,
    SAFETENSORS_DTYPES,
    dtype_name,
    float_bits,
    from_flat,
    identity,
    is_encodable,
    is_loadable,
    is_on_gpu,
    is_plain,
    is_tensor,
    is_torch,
    new_flat,
    same_bits,
    to_array,
    to_flat,
    width,
)
from nvflare_rdma.codecs.warming import warm_up

if TYPE_CHECKING:
    from nvflare_rdma.codecs.on_device import can_encode_on_device, encode_on_device

__all__ = [
    "CODEC_NAMES",
    "EXACT",
    "FLOAT_NAMES",
    "LOSSLESS",
    "MAX_DIMENSIONS",
    "NUMPY_DTYPES",
    "SAFETENSORS_DTYPES",
    "TILE",
    "Array",
    "Blockwise8",
    "Bytes",
    "Codec",
    "Codes",
    "Decision",
    "ExactDelta",
    "FixedSizeCodec",
    "Float32",
    "Parts",
    "PieceNotes",
    "Policy",
    "RelativeError",
    "SampledLoss",
    "Squares",
    "StoredTensor",
    "add_scaled",
    "better_types",
    "can_encode_on_device",
    "codec_of",
    "codes_in",
    "dtype_name",
    "encode_on_device",
    "estimate_error",
    "float32_runs",
    "float_bits",
    "from_flat",
    "get_codec",
    "identity",
    "is_encodable",
    "is_loadable",
    "is_on_gpu",
    "is_plain",
    "is_storable",
    "is_tensor",
    "is_torch",
    "lost_by",
    "make_header",
    "marked",
    "measure_error",
    "new_flat",
    "note_codes",
    "note_decoded",
    "output_runs",
    "piece_notes",
    "read_header",
    "read_run",
    "role_of",
    "same_bits",
    "sample_runs",
    "squares_of",
    "to_array",
    "to_flat",
    "warm_up",
    "was_decoded",
    "width",
]

_ON_DEVICE = ("can_encode_on_device", "encode_on_device")

if not TYPE_CHECKING:  # a type checker would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in _ON_DEVICE:
            return getattr(import_module(f"{__name__}.on_device"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
