"""Fuzz targets: encoded bytes, and the metadata of encoded models."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import torch

from nvflare_rdma.codecs import CODEC_NAMES, Policy, get_codec
from nvflare_rdma.errors import CodecError
from nvflare_rdma.filters.decoding import Metadata, decode_params
from nvflare_rdma.filters.encoding import EncodedParams, TensorEncoder, encode_params
from tests.fuzz.inputs import anything, damage
from tests.fuzz.target import Show, target

_CANARY = 128
_SIZES = (0, 1, 2, 3, 63, 64, 65, 255, 257, 2048, 4097, 16_385, 70_000)


@target(CodecError)
def codecs(rng: random.Random, show: Show) -> None:
    """Bytes that are to be decoded: no more is written than is asked for."""
    codec, size, dtype = get_codec(rng.choice(CODEC_NAMES)), rng.choice(_SIZES), rng.choice(("f4", "f2", "u2"))
    values = (np.random.default_rng(rng.getrandbits(32)).standard_normal(size) * 0.1).astype("f4")
    if dtype == "f2":
        values = values.astype("f2")
    elif dtype == "u2":
        values = (values.view("u4") >> 16).astype("u2")
    room = np.zeros(codec.encoded_nbytes(size), np.uint8)
    encoded = room[: codec.encode_into(values, room)].tobytes()
    damaged = damage(rng, encoded)
    if rng.random() < 0.5:  # of the right length
        damaged = (damaged + bytes(len(encoded)))[: len(encoded)]
    count = rng.choice((size, size, size, max(size - 1, 0), size + 1))
    frame = np.full((count + 2 * _CANARY) * 2, 7, rng.choice((dtype, dtype, "f4")))
    frame = frame[:: rng.choice((1, 2))]
    out = frame[_CANARY:][:count]
    show(codec.name, size, dtype, count, out.dtype, damaged[:300])
    try:
        codec.decode_into(damaged, out)
    finally:
        assert (frame[:_CANARY] == 7).all(), "it wrote before its memory"
        assert (frame[_CANARY + count :] == 7).all(), "it wrote behind its memory"


@cache
def _encoded(codec: str, of_torch: bool) -> EncodedParams:
    values = np.linspace(-0.3, 0.4, 3000, dtype=np.float32).reshape(30, 100)

    def tensor() -> Any:
        return torch.from_numpy(values.copy()) if of_torch else values.copy()

    return encode_params({"w": tensor(), "b": np.ones(5, np.int64), "s": tensor()}, Policy(codec), TensorEncoder())


#: What may come in place of codes.
_CODES = (
    lambda rng, codes: anything(rng),
    lambda rng, codes: codes[:-1],
    lambda rng, codes: codes.reshape(-1)[::2],
    lambda rng, codes: np.zeros(3000),
    lambda rng, codes: np.zeros((), np.uint8),
    lambda rng, codes: np.zeros(3000, ">f4"),
    lambda rng, codes: np.ma.masked_array(np.zeros(3, np.uint8)),
    lambda rng, codes: torch.zeros(3, 3).to_sparse().to(torch.uint8),
    lambda rng, codes: torch.zeros(4, dtype=torch.uint8, device="meta"),
)
_KEYS = (
    *("codec", "shape", "dtype", "absmax", "code", "blocksize", "norm", "offset", "delta", "nested_absmax"),
    *("quantization_level", "compressed_tensor", "new_dtype", "tensor_shape"),
)


@target(CodecError)
def dequantizer(rng: random.Random, show: Show) -> None:
    """A model that came encoded, with metadata that does not fit."""
    made = _encoded(rng.choice(CODEC_NAMES), rng.random() < 0.5)
    values, sources, tied = dict(made.values), dict(made.source_datatype), dict(made.tied)
    states: dict[str, Any] = {name: dict(state) for name, state in made.quant_state.items()}
    algorithm: Any = made.algorithm
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(("w", "s"))
        match rng.randrange(8):
            case 0:
                algorithm = rng.choice((anything(rng), "mixed", rng.choice(CODEC_NAMES)))
            case 1:
                sources[name] = rng.choice((anything(rng), "float32", "float16", "bfloat16", "bool", "float64"))
            case 2:
                states[name] = anything(rng)
            case 3 | 4 if isinstance(states.get(name), dict):
                states[name][rng.choice([*states[name], *_KEYS])] = anything(rng)
            case 5:
                values[name] = rng.choice(_CODES)(rng, made.values[name])
            case 6:
                tied[rng.choice(("w", "b", "x", "s"))] = rng.choice((anything(rng), "w", "b"))
            case 7:
                rng.choice((sources, states)).pop(name, None)
    show(algorithm, sources, states, tied, type(values["w"]), type(values["s"]))
    decode_params(values, Metadata(algorithm, states, sources, anything(rng) if rng.random() < 0.02 else tied))
