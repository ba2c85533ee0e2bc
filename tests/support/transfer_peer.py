"""The other side of a transfer, as a process that can be killed: transfer_peer.py serve|send|pull OWN_PATH PATH

`serve` is the cell "server", which answers calls at OWN_PATH and never sends all of it. `send` is the cell "site-1",
which does the same with torch tensors. `pull` is the cell "site-1",
which pulls what answers at PATH. Both end with their standard input.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from nvflare_rdma.transfer import Service, TensorContent, in_memory, pull
from tests.support.calls import Server, call
from tests.support.data_channels import Cells

#: More than a sender offers ahead of what has arrived.
TENSORS = {f"t{i}": np.full(2 << 20, i, np.uint8) for i in range(60)}


def in_torch() -> dict[str, Any]:
    """The same bytes, as floating-point numbers."""
    import torch

    return {name: torch.from_numpy(value.view(np.float32)) for name, value in TENSORS.items()}


def main() -> None:
    what, own, other = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    links = Cells()("server" if what == "serve" else "site-1")
    if what != "pull":
        tensors = TENSORS if what == "serve" else in_torch()
        held = threading.Event()
        service = Service(TensorContent(tensors), lambda: links, lambda *moved: held.wait() and None)
        Server(own, lambda do, key, request, receiver: service.answer(request, receiver))
    else:
        new = in_memory(lambda nbytes: memoryview(bytearray(nbytes)))
        arguments = links, "server", lambda request: call(other, "ask", "", request, "site-1"), new
        threading.Thread(target=pull, args=arguments, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
