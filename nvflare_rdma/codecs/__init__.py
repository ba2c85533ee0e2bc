"""Codecs: tensors to few bits and back. Needs numpy and numba, neither FLARE nor torch.

>>> import numpy as np
>>> from nvflare_rdma.codecs import get_codec
>>> codec, x = get_codec("normfloat4"), np.linspace(-1, 1, 128, dtype=np.float32)
>>> out = bytearray(codec.encoded_nbytes(x.size))
>>> codec.encode_into(x, out)
72
>>> {name: part.size for name, part in codec.parts(out, x.size).items()}
{'scales': 2, 'codes': 64}
"""

from collections.abc import Callable
from functools import cache

from nvflare_rdma.codecs.adaquant import AdaQuant
from nvflare_rdma.codecs.base import Codec, FixedSizeCodec
from nvflare_rdma.codecs.blockwise import Blockwise8
from nvflare_rdma.codecs.fourbit import DoubleQuantized, Float4, NormalFloat4
from nvflare_rdma.codecs.halves import BFloat16, Float16
from nvflare_rdma.codecs.linear import Float8E4M3, Int2, Int8, Ternary
from nvflare_rdma.codecs.lossless import Lossless
from nvflare_rdma.errors import ConfigError

__all__ = ["CODEC_NAMES", "Blockwise8", "Codec", "FixedSizeCodec", "get_codec"]

_CODECS: dict[str, Callable[[], Codec]] = {
    "float16": Float16,
    "bfloat16": BFloat16,
    "float8_e4m3": Float8E4M3,
    "int8": Int8,
    "blockwise8": Blockwise8,
    "float4": Float4,
    "normfloat4": NormalFloat4,
    "float4_dq": lambda: DoubleQuantized(Float4()),
    "normfloat4_dq": lambda: DoubleQuantized(NormalFloat4()),
    "int2": Int2,
    "ternary": Ternary,
    "adaquant": AdaQuant,
    "lossless": Lossless,
}

CODEC_NAMES = tuple(_CODECS)


@cache
def _build(name: str) -> Codec:
    return _CODECS[name]()


def get_codec(name: str) -> Codec:
    """The codec called `name` (any case). Codecs hold no state of a tensor: all callers share one object.

    Raises:
        ConfigError: no such codec; the message names the value and what is allowed.
    """
    key = name.lower() if isinstance(name, str) else name
    if isinstance(key, str) and key in _CODECS:
        return _build(key)
    allowed = ", ".join(CODEC_NAMES)
    raise ConfigError(f"codec {name!r} is unknown; use one of: {allowed}")
