"""Whose certificate a peer has to show on a data channel: by FLARE's own rules, those of its cells' connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.fuel.f3.cellnet.identity import CellIdentityResolver
from nvflare.fuel.hci.security import get_certificate_common_name

from nvflare_rdma.errors import TlsError
from nvflare_rdma.transfer import Identify


def identities_of(core_cell: Any) -> dict[str, str]:
    """What a FLARE cell knows of certificates: a cell's name, which stands for all names below it, too -> common name.

    The cell's own is among them. To FLARE a cell below this one is an entity of its own; on data channels it is a
    trainer, which has this cell's certificate.
    """
    resolver = core_cell.identity_resolver
    return {**resolver.prefix_identity_map, **resolver.exact_identity_map}


def identifier(identities: Mapping[str, str]) -> Identify:
    """``identities``: see `identities_of`. Other cells have their site's name in their certificate."""
    resolver = CellIdentityResolver(prefix_identity_map=dict(identities))

    def identify(peer: str, certificate: Mapping[str, Any]) -> None:
        # Not the resolver's `require_match`, which takes any certificate of a cell that is called as an admin client's
        # are: those have no data channels.
        expected, shown = resolver.resolve(peer), get_certificate_common_name(dict(certificate))
        if not shown or shown != expected:
            raise TlsError(f"{peer!r} has the certificate of {expected!r}, but who is there shows that of {shown!r}")

    return identify
