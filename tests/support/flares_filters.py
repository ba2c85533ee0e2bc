"""FLARE's own filters, made where a test needs them: they load bitsandbytes, which takes seconds."""

from __future__ import annotations

from typing import Any

from tests.support import bitsandbytes_here


def flares_quantizer(quantization_type: str) -> Any:
    bitsandbytes_here.functional()
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    return ModelQuantizer(quantization_type)


def flares_dequantizer() -> Any:
    bitsandbytes_here.functional()
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer

    return ModelDequantizer()
