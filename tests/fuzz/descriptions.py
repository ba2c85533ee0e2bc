"""Fuzz targets: what a peer says of its tensors and files, and asks for."""

from __future__ import annotations

import json
import random
import struct
import tempfile
from functools import cache
from pathlib import Path

import msgpack
import numpy as np

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.safetensors_header import read_header
from nvflare_rdma.errors import ProtocolError, StorageError
from nvflare_rdma.transfer import Item, Service, TensorContent, manifest
from nvflare_rdma.transfer.addresses import parse_invitation
from nvflare_rdma.transfer.files import FileContent, FileIdentity, OpenFile
from nvflare_rdma.transfer.files.layout import Layout
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, PartDigests
from nvflare_rdma.transfer.pieces import PieceLayout
from tests.fuzz.inputs import INTEGERS, anything, change_one, damage, packable
from tests.fuzz.target import Show, target

_INVITATION = {"hosts": ["127.0.0.1"], "port": 5, "ticket": bytes(32)}
_IDENTITY = {
    "name": "x",
    "size": 8 * BLOCK_BYTES,
    "mtime_ns": 1,
    "content": "0" * 32,
    "part_bytes": 4 * BLOCK_BYTES,
    "quantization_type": "int8",
}
_TENSORS = {
    "__metadata__": {"a": "b"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I8", "shape": [0], "data_offsets": [24, 24]},
    "c": {"dtype": "X9", "shape": [9], "data_offsets": [24, 30]},
}


@cache
def _good_manifest() -> bytes:
    cut = PieceLayout.choose(get_codec("int8"), 120_000)
    return manifest.pack(
        [
            Item("w", True, "float32", (3, 40_000), None, cut),
            Item("b", False, "int64", (5,), bytes(40)),
            Item("c", True, "bfloat16", (1 << 20,)),
            Item.bundle([Item("d", True, "float32", (3,)), Item("e", False, "int8", (5, 7))]),
            Item.bundle([Item("f", True, "float32", (3,))]),
        ]
    )


@target(ProtocolError)
def manifests(rng: random.Random, show: Show) -> None:
    """What a sender says that there is."""
    if rng.random() < 0.5:
        data = damage(rng, _good_manifest())
    else:
        rows = msgpack.unpackb(_good_manifest())
        for _ in range(rng.choice((1, 1, 2))):
            row = rng.choice(rows)
            row[rng.randrange(len(row))] = packable(anything(rng))
        if rng.random() < 0.1:
            rows.append(packable(anything(rng)))
        data = msgpack.packb(rows)
    show(data)
    for item in manifest.unpack(data, bundles=rng.random() < 0.8):
        assert 0 <= item.nbytes < 1 << 48
        assert 0 <= item.sent_nbytes < 1 << 49
        assert item.content is None or len(item.content) == item.nbytes


@target(ProtocolError)
def invitations(rng: random.Random, show: Show) -> None:
    """How to get to a peer."""
    invitation = change_one(rng, _INVITATION)
    show(invitation)
    found = parse_invitation(invitation)
    for hosts, port in ((found.hosts, found.port), *((way.hosts, way.port) for way in found.through)):
        assert all(type(host) is str for host in hosts)
        assert 0 <= port < 65536
    assert len(found.ticket) == 32


@target(ProtocolError)
def files(rng: random.Random, show: Show) -> None:
    """Which file a sender has, and in which parts."""
    described = change_one(rng, _IDENTITY) if rng.random() < 0.7 else _IDENTITY
    show(described)
    identity = FileIdentity.unpack(described)
    json.dumps(identity.pack()).encode()
    assert Path(identity.key("x")).name == identity.key("x")
    assert Path(identity.name).name == identity.name
    items = []
    for number in range(rng.randrange(4)):
        values = rng.choice((1, BLOCK_BYTES, 2 * BLOCK_BYTES, 4 * BLOCK_BYTES))
        dtype, torch = rng.choice((("uint8", False), ("float32", True), ("bfloat16", True)))
        cut = rng.choice((None, PieceLayout.choose(get_codec("int8"), values)))
        items.append(Item(str(number), torch, dtype, (values,), None, cut))
    show(items)
    layout = Layout(identity, items)
    assert sum(map(layout.nbytes, range(len(layout)))) == identity.size


@target(ValueError)
def safetensors(rng: random.Random, show: Show) -> None:
    """The header of a file."""
    header = {name: dict(entry) for name, entry in _TENSORS.items()}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(header))
        entry = header[name]
        if isinstance(entry, dict) and rng.random() < 0.8:
            entry[rng.choice(list(entry) or ["dtype"])] = packable(anything(rng), str)
        else:
            header[name] = packable(anything(rng), str)
    text = json.dumps(header).encode()
    if rng.random() < 0.4:
        text = damage(rng, text)
    if rng.random() < 0.02:
        text = b"[" * 100_000
    length = len(text) if rng.random() < 0.8 else rng.choice(INTEGERS) & (1 << 64) - 1
    content = struct.pack("<Q", length) + text + bytes(rng.choice((30, 30, 0, 24)))
    show(content[:1000])

    def read_into(memory: memoryview, offset: int) -> None:
        memory[:] = content[offset : offset + len(memory)]

    for tensor in read_header(len(content), read_into):
        assert 0 <= tensor.start <= tensor.start + tensor.nbytes <= len(content)


#: Removed when the process ends.
_place = tempfile.TemporaryDirectory(prefix="fuzz-")


def _folder(name: str) -> Path:
    folder = Path(_place.name) / name
    folder.mkdir(exist_ok=True)
    return folder


@cache
def _services() -> tuple[Service, Service]:
    folder = _folder("service")
    (folder / "file").write_bytes(bytes(1 << 20))
    tensors = TensorContent({"a": np.zeros(100_000), "b": np.ones(3)})
    return Service(tensors, lambda: None), Service(FileContent(OpenFile(str(folder / "file"))), lambda: None)


@target()
def requests(rng: random.Random, show: Show) -> None:
    """What a receiver asks of a service, which answers everything."""
    known = ("describe", "send", "report", "relay", "done", "give up", "digests", "compare")
    request = {
        "do": rng.choice(known),
        "first": 1,
        "items": rng.choice(([0], [], [0, 1])),
        "invitation": rng.choice((None, _INVITATION)),
        "channel": True,
    }
    asked = change_one(rng, request)
    show(asked)
    service = rng.choice(_services())
    if isinstance(asked, dict) and rng.random() < 0.2:
        service.answer({"do": "relay"}, "site-1")
        relayed = service.relayed("site-1")
        if relayed is not None:
            _ask_piece(rng, relayed)
    assert isinstance(service.answer(asked, "site-1"), dict)


def _ask_piece(rng: random.Random, relayed: object) -> None:
    try:
        relayed.piece(rng.choice(INTEGERS), rng.choice(INTEGERS), rng.random() < 0.5, 2 << 20)  # type: ignore[attr-defined]
    except ProtocolError:
        return


@target(StorageError)
def journals(rng: random.Random, show: Show) -> None:
    """What an earlier transfer left on a disk that is not to be trusted."""
    folder, parts = _folder("journals"), 3
    identity = FileIdentity("n", parts * BLOCK_BYTES, 1, "0" * 32, BLOCK_BYTES)
    layout = Layout(identity, [Item(str(n), False, "uint8", (BLOCK_BYTES,)) for n in range(parts)])
    block = memoryview(bytes(BLOCK_BYTES))
    digest = _digest(block)
    partial = PartialFile(str(folder), layout, "o")
    for part in range(parts):
        partial.write(part, 0, block)
        partial.add(part, digest, digest)
    partial.keep()
    (journal,) = folder.glob(".*journal")
    (data,) = folder.glob(".*part")
    journal.write_bytes(damage(rng, journal.read_bytes()))
    show(journal.read_bytes())
    if rng.random() < 0.3:
        data.write_bytes(damage(rng, data.read_bytes()))
    again = PartialFile(str(folder), layout, "o")
    content = data.read_bytes()
    try:
        for part, (_, kept) in again._whole.items():
            assert _digest(memoryview(content)[part * BLOCK_BYTES :][:BLOCK_BYTES]) == kept, "a part is taken for whole"
    finally:
        again.discard()


def _digest(block: memoryview) -> bytes | None:
    digests = PartDigests(len(block))
    digests.add(0, block)
    return digests.whole()
