"""A file's sender or receiver is killed in the middle (SIGKILL), started again, and goes on: real processes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.support.file_transfers import as_received
from tests.support.processes import SMALL, WITHOUT_TORCH, background, free_port
from tests.support.stream_peer import PART
from tests.support.waiting import eventually

PARTS, STALL = 12, 8
DEADLINE = 150.0


class Pair:
    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.quantization_type = ""
        self.url = f"tcp://127.0.0.1:{free_port()}"

    def start(self, name: str) -> subprocess.Popen[bytes]:
        known = len(self.told(name, "ready"))
        log = self.folder / f"{name}-{known}.err"
        arguments = [name, self.url, str(self.folder), str(STALL), self.quantization_type]
        process = self._stack.enter_context(
            background(SMALL / "stream_peer.py", *arguments, log=log, NVFLARE_RDMA_FABRICS="tcp", **WITHOUT_TORCH)
        )
        eventually(lambda: len(self.told(name, "ready")) > known, DEADLINE)
        return process

    def told(self, name: str, what: str) -> list:
        path = self.folder / f"{name}.log"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if what in line]

    def journal(self) -> int:
        """Parts that are whole, as the journal says."""
        found = [path.read_text().count("\n") - 1 for path in self.folder.glob(".*.rdma-journal")]
        return found[0] if found else 0


@pytest.fixture
def pair(tmp_path):
    with contextlib.ExitStack() as stack:
        yield Pair(tmp_path, stack)


def stream(server: subprocess.Popen[bytes]) -> None:
    server.stdin.write(b"stream\n")
    server.stdin.flush()


def encodable() -> bytes:
    """Half of it, which comes first; the rest travels as it is."""
    values = torch.randn(PARTS // 2 * PART // 4)
    return safetensors.torch.save({"weights": values, "zeros": torch.zeros(PARTS // 2 * PART, dtype=torch.uint8)})


# The receiver has what is encoded in another form than it came, so that is killed where it matters most.
@pytest.mark.parametrize(("victim", "kind"), [("server", ""), ("site-1", "normfloat4")])
def test_a_killed_side_goes_on_from_what_is_on_disk(victim, kind, pair):
    content, parts = (encodable(), PARTS + 1) if kind else (os.urandom(PARTS * PART - 7), PARTS)
    (pair.folder / "source").write_bytes(content)
    pair.quantization_type = kind
    sides = {name: pair.start(name) for name in ("server", "site-1")}
    stream(sides["server"])
    eventually(lambda: pair.journal() >= STALL - 2, DEADLINE)
    assert not pair.told("site-1", "done")
    sides[victim].kill()
    sides[victim].wait()
    sides[victim] = pair.start(victim)
    there = pair.journal()
    assert there >= STALL - 2
    (pair.folder / "go").touch()
    stream(sides["server"])
    eventually(lambda: {"streamed": "OK"} in pair.told("server", "streamed"), DEADLINE)
    done = [event for event in pair.told("site-1", "done") if event["done"] == "OK"]
    expected = as_received(content, kind, PART) if kind else content
    assert [Path(event["location"]).read_bytes() == expected for event in done] == [True]
    said = [event["log"] for event in pair.told("site-1", "log")]
    assert [line for line in said if f"{there} of {parts} parts are here already" in line], said
    assert not [line for line in said if "will be sent again" in line]
    assert not list(pair.folder.glob(".*"))
