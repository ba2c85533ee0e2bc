"""Every state of a connection, of its rails and of a transfer, and every legal transition, in one place.

A pair that is not in a table is illegal. Whether that is the peer's fault (`ProtocolError`) or this side's
(`LocalProtocolError`) depends on where the input came from, and is said by the input.
"""

from __future__ import annotations

from enum import Enum, auto

from nvflare_rdma.errors import LocalProtocolError, ProtocolError


class Role(Enum):
    """A side of a connection. The active side dials, the passive side has a door."""

    ACTIVE = auto()
    PASSIVE = auto()


class Phase(Enum):
    """States of a connection. It is OPENING until rails are open, or it is agreed to do without."""

    GREETING = auto()
    OPENING = auto()
    OPEN = auto()
    CLOSED = auto()


class RailState(Enum):
    """States of a connection's rails. While CHOOSING, the passive side picks a fabric; while DIALLING, the active side
    opens its rails; when they are DOWN, the active side waits a moment before it asks for new ones."""

    CHOOSING = auto()
    DIALLING = auto()
    UP = auto()
    DOWN = auto()


class Send(Enum):
    """States of a message on its sender. When it is CONFIRMED, the peer has it all, but the end of a local write has
    not been reported yet."""

    OFFERED = auto()
    WRITING = auto()
    CONFIRMED = auto()
    DONE = auto()
    FAILED = auto()


class Receive(Enum):
    """States of a message on its receiver. While it is OFFERED, it waits for memory."""

    OFFERED = auto()
    LANDING = auto()
    DONE = auto()
    FAILED = auto()


class Input(Enum):
    """What can happen. The value tells whether the peer caused it."""

    def __init__(self, number: int, remote: bool) -> None:
        self.remote = remote

    HELLO = (1, True)
    READY = (2, False)  # the rails are up for the first time
    TRAFFIC = (3, True)
    SUBMIT = (4, False)
    CLOSE = (5, False)
    OPEN = (6, True)
    CHOSEN = (7, False)
    RAILS = (8, True)
    NO_RAILS = (9, True)
    DIALLED = (10, False)
    DIALLED_NONE = (11, False)
    ALL_DOWN = (12, False)
    REOPEN = (13, True)
    RETRY = (14, False)
    GRANT = (15, True)
    DONE = (16, True)
    WRITES_ENDED = (17, False)
    REFUSE = (18, True)
    WITHDRAWN_HERE = (19, False)
    ACCEPTED = (20, False)
    REFUSED_HERE = (21, False)
    ALL_LANDED = (22, False)
    WITHDRAW = (23, True)
    RAIL_UP = (24, True)
    RAIL_UP_HERE = (25, False)
    MORE_RAILS = (26, True)


PHASE: dict[tuple[Phase, Input], Phase] = {
    (Phase.GREETING, Input.HELLO): Phase.OPENING,
    (Phase.OPENING, Input.READY): Phase.OPEN,
    # The active side is open before it says RAILS and the passive side when it hears it, so neither can see a
    # well-behaved peer's traffic earlier.
    (Phase.OPEN, Input.TRAFFIC): Phase.OPEN,
    (Phase.OPEN, Input.SUBMIT): Phase.OPEN,
    **{(state, Input.CLOSE): Phase.CLOSED for state in Phase},
}

RAILS: dict[tuple[Role, RailState, Input], RailState] = {
    (Role.ACTIVE, RailState.CHOOSING, Input.OPEN): RailState.DIALLING,
    (Role.ACTIVE, RailState.DIALLING, Input.DIALLED): RailState.UP,
    # None could be opened: the passive side chooses another fabric.
    (Role.ACTIVE, RailState.DIALLING, Input.DIALLED_NONE): RailState.CHOOSING,
    (Role.ACTIVE, RailState.UP, Input.RAIL_UP_HERE): RailState.UP,
    (Role.ACTIVE, RailState.UP, Input.MORE_RAILS): RailState.UP,
    # The peer does not know yet that no rail is left.
    (Role.ACTIVE, RailState.DOWN, Input.MORE_RAILS): RailState.DOWN,
    (Role.ACTIVE, RailState.CHOOSING, Input.MORE_RAILS): RailState.CHOOSING,
    (Role.ACTIVE, RailState.UP, Input.ALL_DOWN): RailState.DOWN,
    (Role.ACTIVE, RailState.DOWN, Input.RETRY): RailState.CHOOSING,
    (Role.PASSIVE, RailState.CHOOSING, Input.CHOSEN): RailState.DIALLING,
    (Role.PASSIVE, RailState.DIALLING, Input.RAILS): RailState.UP,
    (Role.PASSIVE, RailState.DIALLING, Input.NO_RAILS): RailState.CHOOSING,
    (Role.PASSIVE, RailState.UP, Input.RAIL_UP): RailState.UP,
    # The peer does not know yet that all others are gone, and this one with them.
    (Role.PASSIVE, RailState.DOWN, Input.RAIL_UP): RailState.DOWN,
    (Role.PASSIVE, RailState.UP, Input.ALL_DOWN): RailState.DOWN,
    # Either side may notice first.
    (Role.PASSIVE, RailState.UP, Input.REOPEN): RailState.CHOOSING,
    (Role.PASSIVE, RailState.DOWN, Input.REOPEN): RailState.CHOOSING,
}

SEND: dict[tuple[Send, Input], Send] = {
    (Send.OFFERED, Input.GRANT): Send.WRITING,
    (Send.WRITING, Input.GRANT): Send.WRITING,
    (Send.WRITING, Input.DONE): Send.CONFIRMED,
    (Send.CONFIRMED, Input.WRITES_ENDED): Send.DONE,
    **{
        (state, happening): Send.FAILED
        for state in (Send.OFFERED, Send.WRITING)
        for happening in (Input.REFUSE, Input.WITHDRAWN_HERE)
    },
}

RECEIVE: dict[tuple[Receive, Input], Receive] = {
    (Receive.OFFERED, Input.ACCEPTED): Receive.LANDING,
    (Receive.LANDING, Input.ALL_LANDED): Receive.DONE,
    **{
        (state, happening): Receive.FAILED
        for state in (Receive.OFFERED, Receive.LANDING)
        for happening in (Input.REFUSED_HERE, Input.WITHDRAW)
    },
}


def illegal(what: str, state: Enum, happening: Input) -> ProtocolError | LocalProtocolError:
    """The exception for an input that `state` does not allow."""
    kind = ProtocolError if happening.remote else LocalProtocolError
    return kind(f"{what}: {happening.name} is not allowed in state {state.name}")
