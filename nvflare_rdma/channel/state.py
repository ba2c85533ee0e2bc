"""Every state of a connection and of a transfer, and every legal transition, in one place.

A pair that is not in a table is illegal. Whether that is the peer's fault (`ProtocolError`) or this side's
(`LocalProtocolError`) depends on where the input came from, and is said by the input.
"""

from __future__ import annotations

from enum import Enum, auto

from nvflare_rdma.errors import LocalProtocolError, ProtocolError


class Role(Enum):
    ACTIVE = auto()
    PASSIVE = auto()


class Phase(Enum):
    """A connection. CHOOSING: the passive side picks a fabric; DIALLING: the active side opens its rails."""

    GREETING = auto()
    CHOOSING = auto()
    DIALLING = auto()
    OPEN = auto()
    CLOSED = auto()


class Send(Enum):
    """A message on its sender. CONFIRMED: the peer has it all, but a local write has not been reported yet."""

    OFFERED = auto()
    WRITING = auto()
    WRITTEN = auto()
    CONFIRMED = auto()
    DONE = auto()
    FAILED = auto()


class Receive(Enum):
    """A message on its receiver. OFFERED: it waits for memory."""

    OFFERED = auto()
    LANDING = auto()
    DONE = auto()
    FAILED = auto()


class Input(Enum):
    """What can happen. The value tells whether the peer caused it."""

    def __init__(self, number: int, remote: bool) -> None:
        self.remote = remote

    HELLO = (1, True)
    OPEN = (2, True)
    RAILS = (3, True)
    TRAFFIC = (4, True)
    CHOSEN = (5, False)
    DIALLED = (6, False)
    SUBMIT = (7, False)
    CLOSE = (8, False)
    GRANT = (9, True)
    ALL_WRITTEN = (10, False)
    DONE = (11, True)
    REFUSE = (12, True)
    ACCEPTED = (13, False)
    REFUSED = (14, False)
    ALL_LANDED = (15, False)


PHASE: dict[tuple[Role, Phase, Input], Phase] = {
    (Role.ACTIVE, Phase.GREETING, Input.HELLO): Phase.CHOOSING,
    (Role.ACTIVE, Phase.CHOOSING, Input.OPEN): Phase.DIALLING,
    (Role.ACTIVE, Phase.DIALLING, Input.DIALLED): Phase.OPEN,
    (Role.PASSIVE, Phase.GREETING, Input.HELLO): Phase.CHOOSING,
    (Role.PASSIVE, Phase.CHOOSING, Input.CHOSEN): Phase.DIALLING,
    (Role.PASSIVE, Phase.DIALLING, Input.RAILS): Phase.OPEN,
    **{(role, Phase.OPEN, happening): Phase.OPEN for role in Role for happening in (Input.TRAFFIC, Input.SUBMIT)},
    # Traffic is legal only when open: the active side is open before it says RAILS and the passive side when
    # it hears it, so neither can see a well-behaved peer's traffic earlier.
    **{(role, state, Input.CLOSE): Phase.CLOSED for role in Role for state in Phase},
}

SEND: dict[tuple[Send, Input], Send] = {
    (Send.OFFERED, Input.GRANT): Send.WRITING,
    (Send.WRITING, Input.GRANT): Send.WRITING,
    (Send.WRITING, Input.ALL_WRITTEN): Send.WRITTEN,
    (Send.WRITING, Input.DONE): Send.CONFIRMED,
    (Send.CONFIRMED, Input.ALL_WRITTEN): Send.DONE,
    (Send.WRITTEN, Input.DONE): Send.DONE,
    (Send.OFFERED, Input.REFUSE): Send.FAILED,
}

RECEIVE: dict[tuple[Receive, Input], Receive] = {
    (Receive.OFFERED, Input.ACCEPTED): Receive.LANDING,
    (Receive.OFFERED, Input.REFUSED): Receive.FAILED,
    (Receive.LANDING, Input.ALL_LANDED): Receive.DONE,
}


def illegal(what: str, state: Enum, happening: Input) -> ProtocolError | LocalProtocolError:
    """The exception for an input that ``state`` does not allow."""
    kind = ProtocolError if happening.remote else LocalProtocolError
    return kind(f"{what}: {happening.name} is not allowed in state {state.name}")
