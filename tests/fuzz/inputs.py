"""What nobody should send, made from a random generator."""

from __future__ import annotations

import random
import struct
from typing import Any

import numpy as np

INTEGERS = (
    *(0, 1, 2, 3, 7, 64, 100, 255, 256, 1000, 65535, 65536, 1 << 20),
    *((1 << bits) + more for bits in (31, 32, 48, 62, 63, 64) for more in (-1, 0)),
    *(-1, -2, -(1 << 31), -(1 << 63), 1 << 200),
)
FLOATS = (0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324)
WORDS = (
    *("", "x", "0", "-1", "..", "/", "a/b", "\0", "a\nb", "\u00e9" * 50, "\ud800", "x" * 300),
    *("float32", "bfloat16", "uint8", "bool", "int8", "normfloat4", "lossless", "adaquant", "mixed"),
)
ARRAY_DTYPES = ("u1", "f4", "f2", "u2", ">f4", "U3", "O", "M8[s]")


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A value of any kind that a message can have."""
    deeper = depth < 4
    match rng.randrange(12):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2 | 3:
            return rng.choice(INTEGERS)
        case 4:
            return rng.choice(FLOATS)
        case 5:
            return rng.choice(WORDS)
        case 6:
            return rng.randbytes(rng.choice((0, 1, 16, 31, 32, 33, 1000)))
        case 7 | 8 if deeper:
            return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 9 if deeper:
            return tuple(anything(rng, depth + 1) for _ in range(rng.randrange(3)))
        case 10 if deeper:
            return {rng.choice((*WORDS, 5, None)): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    return np.zeros(rng.choice((0, 1, 5)), rng.choice(ARRAY_DTYPES))


def change_one(rng: random.Random, fields: dict[str, Any]) -> Any:
    """The fields with another value in one of them; or something else altogether."""
    if rng.random() < 0.15:
        return anything(rng)
    changed = dict(fields)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(list(fields))
        if rng.random() < 0.1:
            changed.pop(key, None)
        else:
            changed[key] = anything(rng)
    return changed


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes that are not quite what they were."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(damaged) + 1)
        match rng.randrange(7):
            case 0 if at < len(damaged):
                damaged[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(damaged):
                damaged[at] = rng.choice((0x00, 0x01, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xFF))
            case 2:
                del damaged[at : at + rng.choice((1, 4, 100))]
            case 3:
                damaged[at:at] = rng.randbytes(rng.choice((1, 4, 9)))
            case 4:
                damaged[at : at + 4] = struct.pack("!I", rng.choice(INTEGERS) & 0xFFFFFFFF)
            case 5:
                damaged[at : at + 8] = struct.pack(rng.choice("<>") + "Q", rng.choice(INTEGERS) & (1 << 64) - 1)
            case 6:
                del damaged[at:]
    return bytes(damaged)


def packable(value: Any, other: type = bytes) -> Any:
    """What msgpack has a form for; with `other` as str, what JSON has one for."""
    match value:
        case dict():
            return {_word(str(key)): packable(v, other) for key, v in value.items()}
        case list() | tuple():
            return [packable(v, other) for v in value]
        case str():
            return _word(value)
        case int() if other is bytes and not -(1 << 63) <= value < 1 << 64:
            return 1 << 63
        case None | bool() | int() | float():
            return value
        case bytes() if other is bytes:
            return value
    return repr(value)


def _word(text: str) -> str:
    return text.encode(errors="replace").decode()
