"""Codecs: tensors to few bits and back. Needs numpy only, neither FLARE nor torch.

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

from nvflare_rdma.codecs.base import Codec
from nvflare_rdma.codecs.blockwise import Blockwise8, NormalFloat4
from nvflare_rdma.codecs.halves import BFloat16, Float16
from nvflare_rdma.errors import ConfigError

__all__ = ["CODEC_NAMES", "BFloat16", "Blockwise8", "Codec", "Float16", "NormalFloat4", "get_codec"]

_CODECS: dict[str, Callable[[], Codec]] = {
    "float16": Float16,
    "bfloat16": BFloat16,
    "blockwise8": Blockwise8,
    "normfloat4": NormalFloat4,
}
_NOT_BUILT = ("int8", "float4", "adaquant")

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
    if key in _CODECS:
        return _build(key)
    allowed = ", ".join(CODEC_NAMES)
    if key in _NOT_BUILT:
        raise ConfigError(f"quantization_type={name!r} is not part of this version; use one of: {allowed}")
    raise ConfigError(f"quantization_type={name!r} is unknown; use one of: {allowed}")
