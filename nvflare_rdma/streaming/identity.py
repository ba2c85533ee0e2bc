"""Whose certificate a peer has to show on a link: FLARE's own rules say it, those of its cells' connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from nvflare.fuel.hci.security import get_certificate_common_name

from nvflare_rdma.errors import TlsError
from nvflare_rdma.flare_compat import cell_connections, identity_resolver
from nvflare_rdma.transfer import Identify

#: A certificate that names cells in this way is theirs and of the cells below them only. FLARE 2.10 issues such for
#: each job (NVFlare pull request 5263).
_CELL_URI = "https://nvidia.com/nvflare/v1/cell/"


def identifier(identities: Mapping[str, str]) -> Identify:
    """What checks the certificates of peers, given what a FLARE cell knows of certificates: a map from a cell's name,
    which stands for all names below it, too, to a common name. Other cells have their site's name in their certificate.

    The cell's own name is in the map. To FLARE a cell below this one is an entity of its own; on data links it is a
    trainer, which has this cell's certificate.
    """
    resolve = identity_resolver(identities)

    def identify(peer: str, certificate: Mapping[str, Any]) -> None:
        # Not the resolver's `require_match`, which takes any certificate of a cell that is called as an admin client's
        # are: those have no links.
        expected, shown = resolve(peer), get_certificate_common_name(dict(certificate))
        if not shown or shown != expected:
            raise TlsError(f"{peer!r} has the certificate of {expected!r}, but who is there shows that of {shown!r}")
        cells = _cells_named_in(certificate)
        if cells and not any(peer == cell or peer.startswith(f"{cell}.") for cell in cells):
            raise TlsError(
                f"who is there as {peer!r} shows a certificate that is for {', '.join(map(repr, cells))} only"
            )

    return identify


def name_in_certificate(cell: Any, name: str) -> str:
    """Whose the cell is that is called `name`, as far as `cell` knows: the common name that its certificate has or
    would have. By FLARE's rule that is the first part of the name, unless `auth_identity_map` says otherwise."""
    return identity_resolver(cell_connections(cell).identities)(name)


def _cells_named_in(certificate: Mapping[str, Any]) -> list[str]:
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "URI"]
    return [unquote(name.removeprefix(_CELL_URI)) for name in names if name.startswith(_CELL_URI)]
