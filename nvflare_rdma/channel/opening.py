"""How a link comes to rails: the passive side picks a fabric, the active side dials, and both know what is agreed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvflare_rdma.channel.context import LinkContext
from nvflare_rdma.channel.control_rail import ControlRail
from nvflare_rdma.channel.controllers import Controller, make_controller
from nvflare_rdma.channel.protocol import MIN_CHUNK_BYTES, events, wire
from nvflare_rdma.channel.protocol.limits import MAX_UNIT_BYTES
from nvflare_rdma.channel.rails import FabricChooser, RailOwner, RailSet
from nvflare_rdma.errors import FabricError, ProtocolError
from nvflare_rdma.fabric import Fabric


@dataclass(slots=True)
class Opening:
    """Rails that are offered, or were dialled. `name` is "" for the control stream; `count` rails are open."""

    rails: RailSet
    name: str
    controller: Controller
    sealed: bool
    checked: bool
    same_host: bool = False
    """Whether the bytes stay in memory of one host, see `Fabric`."""
    offer: Mapping[str, Any] = field(default_factory=dict)
    count: int = 0
    reason: str = ""
    answer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether data can move: over rails, or on the control stream."""
        return self.count > 0 or not self.name


class RailOpener:
    """Opens the rails of one link. `owner` is whom they report to, `key` what this side seals with (empty if the
    control stream is not TLS: then nothing is sealed), and `send_on_control` how a chunk goes on the control stream
    (see `ControlRail`)."""

    def __init__(
        self,
        owner: RailOwner,
        name: str,
        site: str,
        context: LinkContext,
        fabrics: Mapping[str, Fabric],
        key: bytes,
        send_on_control: Callable[[int, int, memoryview], None],
    ) -> None:
        self.passed_over = ""
        """Why there is nothing better than what was chosen last."""
        self._because = ""
        self._owner = owner
        self._name, self._site, self._log = name, site, owner.log
        self._context = context
        self._fabrics = fabrics
        own = {n: context.unavailable.get(n, "not part of this process") for n in context.order}
        #: The reason why this side can't use a fabric, "" if it can.
        self._own = {n: reason or ("" if n in fabrics else "not part of this link") for n, reason in own.items()}
        self._key = key
        self._secure = bool(key)
        self._send_on_control = send_on_control
        self._chooser = FabricChooser(context.order, self._own, context.host, time.monotonic)
        self._controllers: dict[str, Controller] = {}

    def hello(self) -> wire.Hello:
        """What this side tells the peer about itself when the connection opens."""
        context, limits = self._context, self._context.limits
        return wire.Hello(
            self._own,
            limits.max_message_bytes,
            limits.inline_bytes,
            limits.max_writes,
            self._key,
            context.host,
            context.integrity,
            # Encoded and sealed, a chunk takes twice its length.
            max(context.sending.share_bytes // 2, MAX_UNIT_BYTES),
        )

    def choose(self, wanted: events.ChooseFabric) -> Opening:
        """Pick a fabric, on the passive side, and offer its rails.

        Raises:
            FabricUnavailable: there is no fabric that both sides allow. ProtocolError: only one side seals.
        """
        peer = wanted.peer
        self._check_keys(peer)
        rails = RailSet(self._owner, self._context.rail_places, self._site)
        name, self.passed_over, offer = self._chooser.offer(self._fabrics, rails, peer, wanted.reason, wanted.opened)
        self._log.info(
            "%s: fabric %s%s", self._name, name or "none", f" ({self.passed_over})" if self.passed_over else ""
        )
        rails.fabric = name or "control"
        fabric = self._fabrics[name] if name else None
        if fabric is None:
            rails.endpoint = ControlRail(self._send_on_control)
        sealed = self._seals(fabric)
        needed = not self._secure and (fabric is None or fabric.checked)
        checked = not sealed and _is_checked(needed, self._context.integrity, peer.integrity)
        return Opening(rails, name, self.controller(name), sealed, checked, self._is_same_host(name), offer)

    def dial(self, peer: wire.Hello, offered: events.OpenRails) -> Opening:
        """Open the rails that the peer offers, on the active side. Blocks. It is no error if they can't be opened: the
        passive side chooses something else.

        Raises:
            ProtocolError: what the peer chose is not what the two sides can agree on.
        """
        name = offered.fabric
        self._check_keys(peer)
        if not name:
            self._chooser.require_tcp()
        elif self._own.get(name, "unknown"):
            raise ProtocolError(f"the peer chose the fabric {name!r}, which this side did not offer")
        fabric = self._fabrics[name] if name else None
        if fabric is not None and fabric.same_host and not self._context.host == peer.host != "":
            raise ProtocolError(f"the peer chose {name}, which needs one host, but it is on another one")
        if offered.sealed != self._seals(fabric):
            raise ProtocolError(f"the peer {'seals' if offered.sealed else 'does not seal'} its chunks over {name!r}")
        if self._context.integrity == "on" and not (offered.checked or offered.sealed or self._secure):
            raise ProtocolError("the peer does not check its chunks, though rdma_integrity=on here")
        self.passed_over = self._chooser.explain(
            name, peer, {other for other, made in self._fabrics.items() if made.same_host}, self.passed_over
        )
        self._because = f" ({self.passed_over})" if self.passed_over else ""  # the passive side has said so
        rails = RailSet(self._owner, self._context.rail_places, self._site)
        rails.fabric = name or "control"
        same_host = self._is_same_host(name)
        opening = Opening(rails, name, self.controller(name), offered.sealed, offered.checked, same_host)
        if fabric is None:
            rails.endpoint = ControlRail(self._send_on_control)
            return opening
        try:
            rails.endpoint = fabric.connect(offered.offer, rails)
            opening.count, opening.answer = rails.endpoint.rails, rails.endpoint.answer
        except FabricError as error:
            self.passed_over = opening.reason = str(error)
            self._log.warning("%s: fabric %s can't be used: %s", self._name, name, error)
        return opening

    def start(self, rails: RailSet, event: events.Opened) -> None:
        """Both sides agree that rails are open: have them carry chunks. Those that are not open here are in
        `rails.broken` afterwards."""
        for rail in range(max(event.rails, 1)):
            rails.start(rail)
        if event.rails:
            self._log.info("%s: data goes over %s, %d rails%s", self._name, rails.fabric, event.rails, self._because)
        else:
            why = event.reason or self.passed_over
            self._log.warning("%s: no rail, data goes over the control stream, which is slower: %s", self._name, why)
        if event.answer:
            reason = "not opened here"
            try:
                rails.endpoint.accept(event.answer)
            except FabricError as failure:
                reason = str(failure)
            for rail in range(rails.endpoint.rails, event.rails):
                rails.broken[rail] = FabricError(f"{rails.fabric} rail {rail}: {reason}")

    def rule_out(self, name: str, reason: str) -> None:
        """See `FabricChooser.rule_out`."""
        self._chooser.rule_out(name, reason)

    def controller(self, name: str) -> Controller:
        """Return a fabric's controller. It is a fixed one where there is nothing to adapt to: in memory of the same
        host, and on the control stream."""
        if name not in self._controllers:
            context = self._context
            kind = context.controller if name and not self._is_same_host(name) else "fixed"
            # What is on its way to a receiver never exceeds the memory that it may use.
            limit = context.budget.limit
            wanted = context.chunk_bytes * (context.same_host_factor if self._is_same_host(name) else 1)
            chunk = min(wanted, max(limit // 4, MIN_CHUNK_BYTES))
            self._controllers[name] = make_controller(kind, chunk, context.depth, limit)
        return self._controllers[name]

    def _is_same_host(self, name: str) -> bool:
        return bool(name) and self._fabrics[name].same_host

    def _check_keys(self, peer: wire.Hello) -> None:
        if bool(peer.seal_key) != self._secure:
            raise ProtocolError("one side seals its chunks and the other does not")

    def _seals(self, fabric: Fabric | None) -> bool:
        """Whether chunks are sealed. On the control stream TLS does it; memory of the same host needs no seal."""
        return self._secure and fabric is not None and not fabric.same_host


def _is_checked(needed: bool, own: str, peer: str) -> bool:
    """Whether chunks carry a checksum: if a side wants it, else not if a side does not, else if it is `needed`."""
    if "on" in (own, peer):
        return True
    return needed and "off" not in (own, peer)
