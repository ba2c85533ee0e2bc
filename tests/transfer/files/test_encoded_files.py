"""Safetensors files, encoded tensor by tensor on the way."""

from __future__ import annotations

import logging
import math
import os
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext

from nvflare_rdma.codecs import estimate_error, get_codec
from nvflare_rdma.errors import ConfigError, IntegrityError, ProtocolError, SourceError, TransferError
from nvflare_rdma.streaming import FileRetriever
from nvflare_rdma.transfer import manifest
from nvflare_rdma.transfer.arrays import to_bytes
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.source import OpenFile
from nvflare_rdma.transfer.files.transfer import pull_file
from nvflare_rdma.transfer.pieces import PIECE_VALUES, PieceLayout
from nvflare_rdma.transfer.receiver import AbortedError
from nvflare_rdma.transfer.records import Meter
from tests.support.file_transfers import as_received
from tests.support.tcp_pair import DEADLINE, in_parallel
from tests.support.waiting import eventually

MIB = 1 << 20


def tensors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)

    def values(*shape: int) -> torch.Tensor:
        return scale * torch.randn(shape, generator=random)

    return {
        "wide": values(1200, 1001),  # three parts, and no whole pieces
        "half": values(300, 401).half(),
        "brain": values(700, 701).bfloat16(),
        "double": values(200, 200).double(),
        "steps": torch.arange(400_000),
        "bias": values(1000),
        "scalar": torch.tensor(5.0),
        "empty": torch.empty(0, 3),
        "eighth": values(100, 300).to(torch.float8_e4m3fn),
    }


def stored(scale: float = 1.0, **more: torch.Tensor) -> bytes:
    return safetensors.torch.save({**tensors(scale), **more}, {"made by": "test"})


@pytest.fixture
def encoded(files):
    """encoded(codec, content) -> Files"""

    def make(codec: str = "normfloat4", content: bytes | None = None, **kinds):
        it = files(content or stored(), quantization_type=codec, **kinds)
        it.content = as_received(it.content, codec)
        return it

    return make


@pytest.mark.parametrize(
    ("codec", "fabrics"),
    [("normfloat4", ("tcp",)), ("int8", ("shm", "tcp")), ("ternary", ("tcp",)), ("float16", ("tcp",))],
)
def test_what_appears_has_decoded_values_and_all_else_exact(codec, fabrics, encoded, cell):
    it, site = encoded(codec, fabrics=fabrics), cell("site-1", fabrics=fabrics)
    meter = Meter("received", "site-1", "server", "file")
    path = it.pull(site, meter=meter)
    got, sent = safetensors.torch.load_file(path), tensors()
    for name in ("double", "steps", "bias", "scalar", "empty", "eighth"):
        assert bytes(to_bytes(got[name])) == bytes(to_bytes(sent[name])), name
    assert [got[name].dtype for name in sent] == [tensor.dtype for tensor in sent.values()]
    items = [part.item for part in it.sent.parts.values()]
    assert meter.wire_bytes == sum(item.sent_nbytes for item in items) < it.file.identity.size
    assert {item.cut.codec.name for item in items if item.cut} == {codec}


def test_a_file_larger_than_the_budget_in_little_memory(encoded, cell):
    it, site = encoded(budget=4 * MIB, fabrics=("tcp",)), cell("site-1", budget=4 * MIB, fabrics=("tcp",))
    it.pull(site)
    for side in (it.channels, site):
        context = side._shared.context
        assert 0 < context.pool._busiest <= 4 * MIB < it.file.identity.size
        assert context.budget.peak <= context.budget.limit


def test_receivers_at_once(encoded, cell):
    it = encoded()
    sites = [cell(f"site-{i}", ports=None) for i in range(2)]
    in_parallel(*(lambda site=site: it_pulls(it, site) for site in sites))


def it_pulls(it, site) -> None:
    path = it.folder / f"whole-{site.name}"
    pull_file(site, "server", it.ask(site.name), it.target(site, path))
    assert path.read_bytes() == it.content


def broken(value: float = math.nan) -> bytes:
    wide = tensors()["wide"]
    wide[0, 7] = value  # in the first of its three parts
    return stored(broken=wide)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_can_not_be_carried_travels_exact(value, encoded, cell, caplog):
    it = encoded(content=broken(value))
    part = next(part for part in it.sent.parts.values() if part.tensor == "broken")
    it.pull(cell("site-1"))
    assert it.asked()[1:] == [[int(part.item.name)]]
    it.requests.clear()
    it.pull(cell("site-2"), name="another")  # is told at once
    assert len(it.asked()) == 1
    assert [line for line in caplog.messages if "sent exact" in line] == [
        f"model.bin: {part.item.shape[0]} values of tensor broken are sent exact: normfloat4 can't carry NaN or Inf: "
        "its block would be lost"
    ]


def test_a_file_goes_in_a_codec_that_can_not_carry_the_sample_alone(encoded, cell):
    values = torch.zeros(1 << 17).half()
    values[: 58 * 64] = torch.finfo(torch.half).max
    it = encoded("normfloat4_dq", safetensors.torch.save({"near": values}))
    it.pull(cell("site-1"))
    assert not any(part.unrepresentable for part in it.sent.parts.values())


# -- what is signed off -----------------------------------------------------------------------------------------


def sent(records, count=1):
    eventually(lambda: sum(each.direction == "sent" for each in records) == count, DEADLINE)
    return [each for each in records if each.direction == "sent"]


def error_of(path, content: bytes) -> float:
    """The largest relative error of a tensor of a file as it arrived."""
    got, had = safetensors.torch.load_file(path), safetensors.torch.load(content)
    errors = [
        (tensor.double() - got[name].double()).norm() / tensor.double().norm()
        for name, tensor in had.items()
        if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) and tensor.numel() and name != "scalar"
    ]
    return float(max(errors))


def test_the_record_says_what_left(encoded, cell, records, caplog):
    caplog.set_level(logging.INFO)
    it = encoded()
    for number in (1, 2):
        path = it.pull(cell(f"site-{number}"), name=f"whole-{number}")
    one, other = sent(records, 2)
    assert (one.peer, one.kind, one.items) == ("site-1", "file", 1)
    encoded_ones = {part.tensor for part in it.sent.parts.values() if part.item.cut}
    assert one.codecs == f"{len(encoded_ones)} normfloat4, {len(tensors()) - len(encoded_ones)} exact"
    assert one.relative_error == pytest.approx(error_of(path, it.source.read_bytes()), rel=0.1)
    assert one.error_from == "sample"
    assert len(one.digest) == 32
    assert other.digest == one.digest
    line = next(line for line in caplog.messages if line.startswith("sent the file model.bin to site-1: "))
    assert f"{len(encoded_ones)} in normfloat4" in line
    assert "relative error at most 0.0" in line
    assert line.endswith(f"digest {one.digest}")


def test_what_was_read_of_a_part_that_travels_exact_is_not_in_the_error(encoded, cell, records):
    """Its first pieces are encoded before the last one says that it can't be, and would lose the most."""
    values = tensors()["wide"].reshape(-1)
    it = encoded(content=safetensors.torch.save({"w": values}))
    first = next(part for part in it.sent.parts.values() if part.tensor).item.shape[0]
    values[:first:64] = 50.0
    values[first - 1] = math.nan
    it = encoded(content=safetensors.torch.save({"w": values}))
    part, read = next(part for part in it.sent.parts.values() if part.tensor), it.file.read_into
    last = part.source(True)._start + 4 * (first - PIECE_VALUES)

    def read_last_of_all(memory, at):
        if at == last:
            eventually(lambda: any(run < first for run in part._loss._lost), DEADLINE)
        return read(memory, at)

    it.file.read_into = read_last_of_all
    it.pull(cell("site-1"))
    (record,) = sent(records)
    rest = estimate_error(get_codec("normfloat4"), values[first:])
    assert record.relative_error == pytest.approx(rest.value, rel=0.05)


def test_another_file_another_type_or_none_is_another_receipt(encoded, files, cell, records):
    found = set()
    changed = tensors() | {"steps": tensors()["steps"] + 1}  # which travels exact
    kinds = [
        ({}, "normfloat4"),
        ({"codec": "int8"}, "int8"),
        ({"content": safetensors.torch.save(changed)}, "normfloat4"),
    ]
    for number, (kind, name) in enumerate(kinds):
        encoded(**kind).pull(cell(f"site-{number}"), name=f"whole-{number}")
        record = sent(records, number + 1)[-1]
        assert name in record.codecs
        found.add(record.digest)
    assert len(found) == len(kinds)
    files(stored()).pull(cell("site-9"), name="as it is")
    record = sent(records, len(kinds) + 1)[-1]
    assert (record.codecs, record.relative_error, record.digest) == ("", None, "")


def test_small_tensors_are_measured(encoded, cell, records):
    values = torch.randn(8192, generator=torch.Generator().manual_seed(1))
    it = encoded(content=safetensors.torch.save({"w": values}))
    path = it.pull(cell("site-1"))
    (record,) = sent(records)
    assert record.relative_error == pytest.approx(error_of(path, it.source.read_bytes()), rel=1e-6)
    assert record.error_from == "whole"


# -- going on ------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(encoded, cell, monkeypatch):
    """interrupted() -> Files, and a site that has all of the file, but not under its name."""

    def make():
        it, site = encoded(content=broken()), cell("site-1")
        with monkeypatch.context() as patch:
            patch.setattr(PartialFile, "finish", lambda *args: (_ for _ in ()).throw(AbortedError("enough")))
            with pytest.raises(AbortedError):
                it.pull(site)
        it.requests.clear()
        return it, site

    return make


def numbers(it, tensor: str) -> list[int]:
    """Of its parts; of those that have bytes of any, if it is ""."""
    return [int(name) for name, part in it.sent.parts.items() if part.tensor == tensor]


def test_an_interrupted_transfer_goes_on_from_what_is_there(interrupted):
    it, site = interrupted()
    it.open()  # also the sender begins anew, and does not know what has to travel exact
    it.pull(site)
    assert it.asked() == []
    assert [part for parts in it.asked("compare") for part in parts] == list(range(len(it.sent.parts)))


def test_what_goes_on_is_signed_off_as_a_whole(interrupted, cell, records):
    it, site = interrupted()
    it.open()  # streamed again
    records.clear()
    it.pull(site)
    it.pull(cell("site-2"), name="at once")
    resumed, at_once = sent(records, 2)
    assert resumed.digest == at_once.digest != ""
    assert resumed.codecs == at_once.codecs
    assert resumed.wire_bytes < at_once.wire_bytes


def test_what_is_here_is_compared_on_both_sides(interrupted, monkeypatch):
    it, site = interrupted()
    damaged = [numbers(it, "brain")[0], numbers(it, "")[1]]
    starts = {number: it.sent.parts[str(number)]._exact._start for number in [*damaged, *numbers(it, "wide")]}
    with open(next(it.folder.glob(".*.rdma-part")), "r+b") as file:
        for number in damaged:
            file.seek(starts[number] + 1000)
            file.write(b"damaged")
    changed = numbers(it, "wide")[1]
    announced = it.file.identity
    with open(it.source, "r+b") as file:  # where no sample is
        file.seek(starts[changed] + 300_000)
        file.write(bytes(4000))
    os.utime(it.source, ns=(announced.mtime_ns, announced.mtime_ns))
    it.content = as_received(it.source.read_bytes(), "normfloat4")
    it.open()
    assert it.file.identity == announced
    it.pull(site)
    assert it.asked() == [sorted([*damaged, changed])]


@pytest.mark.parametrize("other", ["", "int8"])
def test_parts_of_another_type_are_not_mixed(other, interrupted):
    it, site = interrupted()
    it.quantization_type = other
    source = it.source.read_bytes()
    it.content = as_received(source, other) if other else source
    it.open()
    path = it.folder / "whole"
    pull_file(site, "server", it.ask(site.name), it.target(site, path))
    assert path.read_bytes() == it.content
    assert it.asked("compare") == []
    assert len(list(it.folder.glob(".*"))) == 2  # the others are left for those who go on with them


# -- what can not be -----------------------------------------------------------------------------------------


def test_what_is_no_safetensors_file_is_refused_before_anything_is_sent(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(SourceError) as caught:
        OpenFile(str(path), "normfloat4")
    assert str(caught.value).startswith(
        f"{path} can't be encoded as normfloat4: it is no safetensors file, as its header "
    )
    assert str(caught.value).endswith("; leave out quantization_type to send it as it is")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("zip", "codec 'zip' is unknown; use one of"),
        (
            "lossless",
            "quantization_type 'lossless' can't be used for files, .*; use one of: float16, bfloat16, .*, ternary$",
        ),
        ("adaquant", "'adaquant' can't be used for files"),
        ("topk2", "'topk2' can't be used for files, as it leaves most values out; use one of: .*, ternary$"),
    ],
)
def test_types_that_files_are_not_sent_as(kind, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        OpenFile(str(tmp_path), kind)
    with pytest.raises(ConfigError, match=why):
        FileRetriever(str(tmp_path), quantization_type=kind)


def test_who_only_receives_gives_nobody_what_lies_in_its_current_folder(tmp_path, monkeypatch):
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "client.key").write_text("secret")
    monkeypatch.chdir(tmp_path)  # as a job's process is in the folder of its site's kit
    asked = {"file_name": "startup/client.key"}
    assert FileRetriever("").validate_request(asked, FLContext()) == (ReturnCode.BAD_REQUEST_DATA, None)
    assert FileRetriever(str(tmp_path)).validate_request(asked, FLContext())[0] == ReturnCode.OK


def test_machines_of_another_byte_order_send_files_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    (tmp_path / "model").write_bytes(b"anything")
    with pytest.raises(ConfigError, match="'int8' is for files on little-endian machines only"):
        OpenFile(str(tmp_path / "model"), "int8")
    OpenFile(str(tmp_path / "model"))


def test_a_source_that_changes(encoded, cell):
    it, site = encoded(), cell("site-1")
    read = it.file.read_into

    def change(memory: memoryview, at: int) -> None:
        os.utime(it.source, ns=(1, 1))
        read(memory, at)

    it.file.read_into = change
    with pytest.raises(TransferError, match=f"{it.source} changed while it was sent"):
        it.pull(site)
    assert not list(it.folder.iterdir())


def test_digests_that_differ(encoded, cell):
    it = encoded()

    def ask(request: dict) -> dict:
        answer = it.ask("site-1")(request)
        return {"digests": [b"0" * 16 for _ in answer["digests"]]} if request["do"] == "digests" else answer

    with pytest.raises(IntegrityError, match="differs from what server has read"):
        it.pull(cell("site-1"), ask)
    assert not list(it.folder.iterdir())


@pytest.mark.parametrize("lie", ["another codec", "another codec later", "other parts later", "other file"])
def test_answers_that_lie(lie, encoded, cell):
    it, described = encoded(content=broken()), []

    def ask(request: dict) -> dict:
        answer = it.ask("site-1")(request)
        if "manifest" not in answer:
            return answer
        described.append(answer)
        items = manifest.unpack(answer["manifest"])
        if lie == ("another codec" if len(described) == 1 else "another codec later"):
            items = [
                replace(item, cut=item.cut and PieceLayout.choose(get_codec("int8"), item.cut.n)) for item in items
            ]
        elif lie == "other parts later" and len(described) == 2:
            items = [replace(item, position=n) for n, item in enumerate([*items[1:], items[0]])]
        elif lie == "other file":
            answer["file"] = {**answer["file"], "quantization_type": "int8"}
        return {**answer, "manifest": manifest.pack(items)}

    with pytest.raises(ProtocolError):
        it.pull(cell("site-1"), ask)
    assert not (it.folder / "whole").exists()
    assert len(described) == (2 if lie.endswith("later") else 1)
