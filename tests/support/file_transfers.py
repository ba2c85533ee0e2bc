"""A file in one cell, pulled by others: what tests of `FileContent` and `pull_file` share."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from nvflare_rdma.codecs import get_codec
from nvflare_rdma.codecs.tensors import FLOAT_NAMES, dtype_name
from nvflare_rdma.transfer.files.layout import Layout, plan
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, FileIdentity, OpenFile
from nvflare_rdma.transfer.files.transfer import FileContent, FileTarget, pull_file
from nvflare_rdma.transfer.manifest import INLINE_BYTES
from nvflare_rdma.transfer.pieces import PIECE_VALUES
from nvflare_rdma.transfer.records import Meters
from nvflare_rdma.transfer.service import Service
from tests.support.data_channels import ANY_PORT, shared
from tests.support.encoded import as_encoded

PART = 8 * BLOCK_BYTES


def as_received(content: bytes, codec: str, part: int = PART) -> bytes:
    """What appears of a safetensors file that travels encoded: parts with values that are not finite are exact."""
    end, found = 8 + int.from_bytes(content[:8], "little"), bytearray(content)
    header = json.loads(content[8:end])
    for name, tensor in safetensors.torch.load(content).items():
        if dtype_name(tensor) not in FLOAT_NAMES or tensor.nbytes <= INLINE_BYTES:
            continue
        if get_codec(codec).encoded_nbytes(tensor.numel()) >= tensor.nbytes:
            continue
        place, flat = end + header[name]["data_offsets"][0], tensor.reshape(-1)
        longest = part // flat.itemsize // PIECE_VALUES * PIECE_VALUES
        for values in flat.split(longest):
            if values.isfinite().all():
                found[place : place + values.nbytes] = as_encoded(values, codec).tobytes()
            place += values.nbytes
    assert len(found) == len(content)
    return bytes(found)


class Files:
    """The cell "server" holds a file, others pull it."""

    def __init__(self, cell, folder: Path, content: bytes, quantization_type="", ports=ANY_PORT, **kinds) -> None:
        self.source, self.folder = folder / "model.bin", folder / "received"
        self.folder.mkdir(exist_ok=True)
        self.source.write_bytes(content)
        self.quantization_type = quantization_type
        self.content = content
        """What is expected."""
        self.channels = cell("server", ports=ports, **kinds)
        self.requests: list[dict] = []
        self.open()

    def open(self) -> None:
        self.file = OpenFile(str(self.source), self.quantization_type)
        self.file.identity = FileIdentity(**{**self.file.identity.pack(), "part_bytes": PART})
        self.sent = FileContent(self.file)
        meters = Meters("server", "file", shared.ledger)
        self.service = Service(self.sent, lambda: self.channels, meters=meters)

    def ask(self, receiver: str):
        def ask(request: dict) -> dict:
            self.requests.append(request)
            return self.service.answer(request, receiver)

        return ask

    def pull(self, site, ask=None, name: str = "whole", **kinds) -> Path:
        path = self.folder / name
        asks = ask or self.ask(site.name)
        pull_file(site, "server", asks, self.target(site, path), **kinds)
        assert path.read_bytes() == self.content
        assert sorted(p.name for p in self.folder.iterdir() if p.name.startswith(".")) == []
        return path

    def target(self, site, path: Path) -> FileTarget:
        return FileTarget(self.file.identity, str(self.folder), str(path), site.name, "server")

    def partial(self, owner: str) -> PartialFile:
        identity = self.file.identity
        items = [item for item, _ in plan(identity, self.file.tensors)]
        return PartialFile(str(self.folder), Layout(identity, items), owner, "server")

    def asked(self, what: str = "send") -> list:
        kinds = (what, "describe") if what == "send" else (what,)  # what is missing may be asked for with either
        asked = [request.get("items") for request in self.requests if request["do"] in kinds]
        return [items for items in asked if items is not None]
