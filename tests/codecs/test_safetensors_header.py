"""Where tensors of safetensors files lie."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvflare_rdma.codecs.safetensors_header import read_header


def read(content: bytes):
    def read_into(memory: memoryview, offset: int) -> None:
        memory[:] = content[offset : offset + len(memory)]

    return read_header(len(content), read_into)


def made(header, data: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(first: int, last: int, dtype: str = "U8", shape=None) -> dict:
    return {"dtype": dtype, "shape": [last - first] if shape is None else shape, "data_offsets": [first, last]}


def test_files_of_the_library():
    dtypes = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.arange(24).reshape(2, 3, 4).to(dtype) for dtype in [*dtypes, torch.float8_e4m3fn]}
    tensors |= {"empty": torch.empty(0, 5), "scalar": torch.tensor(3.0)}
    content = safetensors.torch.save(tensors, {"format": "pt"})
    found = read(content)
    assert {tensor.name for tensor in found} == set(tensors)
    for tensor in found:
        sent = tensors[tensor.name]
        assert (tensor.dtype, tensor.shape) == (str(sent.dtype).removeprefix("torch."), tuple(sent.shape))
        assert content[tensor.start :][: tensor.nbytes] == bytes(sent.reshape(-1).view(torch.uint8).numpy())


def test_a_dtype_that_is_not_known_is_bytes():
    (tensor,) = read(made({"x": entry(0, 5, "F4", [10])}, 5))
    assert (tensor.dtype, tensor.nbytes) == ("F4", 5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        bytes(7) + b"\1",
        (5).to_bytes(8, "little") + b"{}",
        made(b"{}", 1),
        made(b"{"),
        made(b"\xff\xfe"),
        made(b"[" * 100_000),
        made([1]),
        made({"x": 5}),
        made({"x": {}}),
        made({"x": entry(0, 4)}, 3),
        made({"x": entry(0, 4)}, 5),
        made({"x": entry(1, 5)}, 5),
        made({"x": entry(4, 0)}, 4),
        made({"x": entry(0, 4, "F32", [2])}, 4),
        made({"x": entry(0, 4, 5)}, 4),
        made({"x": entry(0, 4, "U8", [-1, -4])}, 4),
        made({"x": entry(0, 4, "U8", [4.0])}, 4),
        made({"x": entry(0, 4, "U8", [True, 4])}, 4),
        made({"x": entry(0, 4, "U8", [1] * 100 + [4])}, 4),
        made({"x": entry(0, 4, "U8", [1 << 70, 0])}, 4),
        made({"x": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, 4),
        made({"x": entry(0, 4), "y": entry(2, 6)}, 6),
        made({"x": entry(0, 4), "y": entry(0, 4)}, 4),
        made({"x": entry(0, 4), "y": entry(5, 6)}, 6),
    ],
    ids=lambda content: str(content[:40]),
)
def test_files_that_are_none(content):
    with pytest.raises(ValueError, match=r"it has|its|begins|is|of dtype"):
        read(content)


def test_a_header_larger_than_any_is_not_read():
    with pytest.raises(ValueError, match="its header would be 100000001 bytes long"):
        read_header(1 << 40, lambda memory, _: memory.__setitem__(slice(None), (100_000_001).to_bytes(8, "little")))


@given(st.binary(max_size=300), st.integers(0, 20))
def test_garbled_files_are_an_error_or_add_up(text, data):
    for content in (text, made(text, data), made({"x": entry(0, data), "y": text.decode("latin-1")}, data)):
        try:
            found = read(content)
        except ValueError:
            continue
        assert sum(tensor.nbytes for tensor in found) == len(content) - 8 - int.from_bytes(content[:8], "little")
