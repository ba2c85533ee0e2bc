"""One side of a file stream in a process of its own: stream_peer.py NAME URL FOLDER STALL TYPE. The server streams
FOLDER/source, as quantization type TYPE if that is not "", to site-1 for every line on stdin; site-1 receives to
FOLDER. What happens is appended to FOLDER/NAME.log, a line of JSON each. STALL: what comes after so many parts of the
longest, the server reads only when there is FOLDER/go. Ends with stdin."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from pathlib import Path

from nvflare_rdma.streaming import FileStreamer
from nvflare_rdma.streaming.component import install
from nvflare_rdma.streaming.streams import files
from nvflare_rdma.transfer.files.source import BLOCK_BYTES, FileIdentity, OpenFile
from tests.support.stream_engine import StreamEngine
from tests.support.waiting import eventually

PART = 8 * BLOCK_BYTES


def main() -> None:
    name, url, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    stall, quantization_type = int(sys.argv[4]), sys.argv[5]
    logging.basicConfig(level=logging.INFO)

    def tell(**event) -> None:
        with open(folder / f"{name}.log", "a") as file:
            file.write(json.dumps(event) + "\n")

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(log=record.getMessage())

    class SmallParts(OpenFile):
        def __init__(self, path: str, quantization_type: str) -> None:
            super().__init__(path, quantization_type)
            self.identity = FileIdentity(**{**self.identity.pack(), "part_bytes": PART})

        def read_into(self, memory: memoryview, offset: int) -> None:
            if offset >= stall * PART:
                eventually((folder / "go").exists)
            super().read_into(memory, offset)

    files.OpenFile = SmallParts
    logging.getLogger("nvflare_rdma").addHandler(Lines())
    engine = StreamEngine(name, url)
    install()
    if name != "server":

        def done(stream_ctx, fl_ctx) -> None:
            tell(done=stream_ctx["__RC__"], location=FileStreamer.get_file_location(stream_ctx))

        FileStreamer.register_stream_processing(engine.new_context(), "app", "file", str(folder), done)
        eventually(lambda: engine.cell.core_cell.is_cell_connected("server"))
    tell(ready=True)

    def stream() -> None:
        eventually(lambda: engine.cell.core_cell.is_cell_connected("site-1"))
        code, _ = FileStreamer.stream_file(
            "app",
            "file",
            {},
            ["site-1"],
            str(folder / "source"),
            engine.new_context(),
            quantization_type=quantization_type or None,
        )
        tell(streamed=code)

    for _ in sys.stdin:
        threading.Thread(target=stream, daemon=True).start()
    os._exit(0)


if __name__ == "__main__":
    main()
