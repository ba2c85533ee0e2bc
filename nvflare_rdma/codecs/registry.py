"""The codecs by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from nvflare_rdma.codecs.adaquant import AdaQuant
from nvflare_rdma.codecs.base import Codec
from nvflare_rdma.codecs.blockwise import Blockwise8
from nvflare_rdma.codecs.e4m3_scales import NormalFloat4E4M3
from nvflare_rdma.codecs.exact_delta import ExactDelta
from nvflare_rdma.codecs.fourbit import DoubleQuantized, Float4, NormalFloat4
from nvflare_rdma.codecs.halves import BFloat16, Float16
from nvflare_rdma.codecs.linear import Float8E4M3, Int2, Int8, Ternary
from nvflare_rdma.codecs.lossless import Lossless
from nvflare_rdma.codecs.topk import TopK2
from nvflare_rdma.errors import ConfigError

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
    "normfloat4_e4m3": NormalFloat4E4M3,
    "int2": Int2,
    "ternary": Ternary,
    "topk2": lambda: TopK2("topk2", 64),
    "topk2_128": lambda: TopK2("topk2_128", 128),
    "adaquant": AdaQuant,
    "lossless": Lossless,
    "exact_delta": ExactDelta,
}

CODEC_NAMES = tuple(_CODECS)


@cache
def _build(name: str) -> Codec:
    return _CODECS[name]()


def get_codec(name: str) -> Codec:
    """Return the codec called `name` (any case). Codecs hold no state of a tensor: all callers share one object.

    Raises:
        ConfigError: no such codec; the message names the value and what is allowed.
    """
    key = name.lower() if isinstance(name, str) else name
    if isinstance(key, str) and key in _CODECS:
        return _build(key)
    allowed = ", ".join(CODEC_NAMES)
    raise ConfigError(f"codec {name!r} is unknown; use one of: {allowed}")
