"""The values of `quantization_type`: the codecs whose codes fit into FLARE's quantization metadata."""

from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, get_codec
from nvflare_rdma.errors import ConfigError

QUANTIZATION_TYPES = ("float16", "bfloat16", "blockwise8", "float4", "normfloat4")


def codec_of(quantization_type: str) -> FixedSizeCodec:
    """The codec of a `quantization_type`, in any case.

    Raises:
        ConfigError: no such type; the message names the value and what is allowed.
    """
    key = quantization_type.lower() if isinstance(quantization_type, str) else quantization_type
    if key not in QUANTIZATION_TYPES:
        problem = "is not a type that the filters send" if key in (*CODEC_NAMES, "adaquant") else "is unknown"
        raise ConfigError(
            f"quantization_type={quantization_type!r} {problem}; use one of: {', '.join(QUANTIZATION_TYPES)}"
        )
    codec = get_codec(key)
    assert isinstance(codec, FixedSizeCodec)
    return codec
