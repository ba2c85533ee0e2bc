"""Base models: what the last message of a stream left at its receivers, for messages that are differences from it.

Server and site each keep a model per stream; it is used only if both have the same one, told by its digest.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from nvflare_rdma.codecs import Array
from nvflare_rdma.filters.points import kept_in_run

HELD = "nvflare_rdma.held"  # public context property of a client: the digest of the model it holds, by stream
TOPIC = "nvflare_rdma.base"  # asked by a client before it sends a difference: do you still hold this model?
_ASK_TIMEOUT = 10.0  # seconds; a server that doesn't answer costs a full message, no more
_PROP = "nvflare_rdma.bases"
_creation = threading.Lock()


@dataclass(frozen=True)
class Base:
    """A model that both sides may hold.

    Attributes:
        digest: tells it from all other models.
        tensors: flat arrays by name (uint16 for bfloat16), not to be changed.
        shapes: the tensors' own shapes, of which this side knows them.
    """

    digest: str
    tensors: Mapping[str, Array]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Base:
        """Return the base of these tensors. The digest is xxh3-128 over names, dtypes, sizes and values."""
        state = xxhash.xxh3_128()
        for name in sorted(tensors, key=str):  # FLARE's filters take numbers for names, too
            array = tensors[name]
            state.update(f"{name}\0{array.dtype.str}\0{array.size}\0".encode())
            state.update(array.data.cast("B"))
        return cls(state.hexdigest(), tensors, {} if shapes is None else shapes)

    def sized(self, name: str) -> int:
        """Return how many values the tensor called `name` has, 0 if there is none."""
        found = self.tensors.get(name)
        return 0 if found is None else found.size

    def tensor(self, name: str, like: Array) -> Array | None:
        """Return the tensor called `name` if it has the dtype and size of `like`."""
        found = self.tensors.get(name)
        return found if found is not None and found.dtype == like.dtype and found.size == like.size else None

    def for_sending(self, name: str, like: Array, shape: tuple[int, ...]) -> Array | None:
        """Return the tensor called `name` to send another one of this shape as the difference from: an adapter that has
        got another shape is another one, even if it has as many values."""
        return self.tensor(name, like) if self.shapes.get(name, shape) == shape else None


class Bases:
    """The base models of one process in one job, by stream.

    A stream has one current base. A server also keeps those that it promised a site to decode its result with, until
    that result comes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: dict[str, Base] = {}
        self._promised: dict[tuple[str, str], Base] = {}
        self.answering = False  # whether clients can ask for them

    def set(self, stream: str, base: Base | None) -> None:
        """Make `base` the stream's current one. With None the stream has no base any more."""
        with self._lock:
            if base is None:
                self._current.pop(stream, None)
            else:
                self._current[stream] = base

    def current(self, stream: str) -> Base | None:
        """Return the base that the stream's last message left."""
        with self._lock:
            return self._current.get(stream)

    def find(self, stream: str, digest: Any, site: str = "") -> Base | None:
        """Return the base with this digest if it is the current one or the one promised to `site`."""
        if not isinstance(digest, str):  # a peer's, which may be anything, and refuse to be compared
            return None
        with self._lock:
            for base in (self._current.get(stream), self._promised.get((stream, site))):
                if base is not None and base.digest == digest:
                    return base
        return None

    def promise(self, stream: str, site: str, digest: Any) -> bool:
        """Keep the base with this digest for the result of `site`. Return False if it isn't here (any more)."""
        base = self.find(stream, digest, site)
        with self._lock:
            self._promised.pop((stream, site), None)
            if base is not None:
                self._promised[stream, site] = base
        return base is not None

    def fulfil(self, stream: str, site: str) -> None:
        """Stop keeping what was promised to `site`: its result came, or will not come."""
        with self._lock:
            self._promised.pop((stream, site), None)


def bases_of(fl_ctx: FLContext) -> Bases:
    """Return the base models that this process's filters share."""
    return kept_in_run(_PROP, Bases, fl_ctx)


def tell_held(stream: str, base: Base | None, fl_ctx: FLContext) -> None:
    """Tell the server which model this client holds, with the next task request."""
    held = dict(fl_ctx.get_prop(HELD) or {})
    held.pop(stream, None)
    if base is not None:
        held[stream] = base.digest
    fl_ctx.set_prop(HELD, held, private=False, sticky=True)


def held_by_peer(stream: str, fl_ctx: FLContext) -> str | None:
    """Return the digest of the model that the site which asks for a task says it holds, or None."""
    peer = fl_ctx.get_peer_context()
    held = peer.get_prop(HELD) if peer is not None else None
    digest = held.get(stream) if isinstance(held, dict) else None
    return digest if isinstance(digest, str) else None


def answer_clients(fl_ctx: FLContext) -> None:
    """Let the server answer clients that ask whether it holds a model. Once per run."""
    bases, engine = bases_of(fl_ctx), fl_ctx.get_engine()

    def answer(topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        peer = fl_ctx.get_peer_context()
        site = peer.get_identity_name() if peer is not None else ""
        promised = bases.promise(str(request.get("stream")), site, request.get("digest"))
        reply = make_reply(ReturnCode.OK)
        reply["held"] = promised
        return reply

    with _creation:
        if not bases.answering:
            engine.register_aux_message_handler(topic=TOPIC, message_handle_func=answer)
            bases.answering = True


def server_holds(stream: str, base: Base, fl_ctx: FLContext) -> bool:
    """Ask the server whether it holds `base` and will until this site's result has come."""
    engine = fl_ctx.get_engine()
    if engine is None:
        return False
    request = Shareable()
    request["stream"], request["digest"] = stream, base.digest
    replies = engine.send_aux_request(
        targets=None, topic=TOPIC, request=request, timeout=_ASK_TIMEOUT, fl_ctx=fl_ctx, optional=True
    )
    return any(isinstance(r, Shareable) and r.get("held") is True for r in (replies or {}).values())
