"""What the two halves of a stream say to each other, and which cell has said it.

FLARE names the cell that a message came from in the message's header. Where FLARE is secure, its server has compared
that name with who has sent the message. What consumes a stream, or hears the replies, gets a message without its
header, with a peer context in which the sender has written what it likes. So what is said travels as a `Said`: FLARE
tells whoever reads a message from its bytes which message that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.utils import fobs

from nvflare_rdma.errors import ProtocolError

PREFIX = "nvflare_rdma."
#: Where the messages of streams, and the replies to them, have what is said.
KEY = "nvflare_rdma"


@dataclass(frozen=True)
class Said:
    """What a cell has said. `cell` is its FQCN, as FLARE has it, where this was received; "" where it is sent, or if
    FLARE does not tell."""

    words: dict[str, Any]
    cell: str = ""


class _SaidDecomposer(fobs.Decomposer):
    def supported_type(self) -> type[Said]:
        return Said

    def decompose(self, target: Said, manager: Any = None) -> dict[str, Any]:
        return target.words

    def recompose(self, data: Any, manager: Any = None) -> Said:
        message = manager.get_fobs_context().get(fobs.FOBSContextKey.MESSAGE) if manager is not None else None
        cell = message.get_header(MessageHeaderKey.ORIGIN) if message is not None else None
        if not isinstance(data, dict):
            raise ProtocolError(f"{cell!r} says a {type(data).__name__} in a stream")
        return Said(data, cell if isinstance(cell, str) else "")


def prepare_to_read() -> None:
    """Have FLARE read and write a `Said` in this process. To be called before one may come; idempotent."""
    fobs.register(_SaidDecomposer)
