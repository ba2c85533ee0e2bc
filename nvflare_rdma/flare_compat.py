"""The one place that knows which FLARE this package was written against.

Everything that reaches behind FLARE's public interface calls `require_flare` first, so that another FLARE gives
a clear message instead of an AttributeError deep inside it.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nvflare_rdma.errors import UnsupportedVersionError

_KNOWN = (2, 9)

#: Public context property of a run on a side that has `nvflare_rdma.streaming.RdmaTransfer`.
TRANSFER_PROP = "nvflare_rdma.transfer"


def require_flare(feature: str) -> None:
    """Raise `UnsupportedVersionError` unless FLARE 2.9 is installed; `feature` is what needs it."""
    try:
        installed = version("nvflare")
    except PackageNotFoundError:
        raise UnsupportedVersionError(
            f"{feature} needs NVIDIA FLARE 2.9, which is not installed. Install it: pip install 'nvflare>=2.9,<2.10'"
        ) from None
    parts = re.match(r"(\d+)\.(\d+)", installed)
    if parts is None or (int(parts[1]), int(parts[2])) != _KNOWN:
        raise UnsupportedVersionError(
            f"{feature} uses internals of NVIDIA FLARE 2.9, but {installed} is installed. "
            "Install a matching one (pip install 'nvflare>=2.9,<2.10') or a newer nvflare-rdma."
        )


def replace_decomposer(decomposer: Any) -> None:
    """Have FLARE use ``decomposer`` for its type and data, in place of the one it knows, in this process.

    `fobs.register` keeps the first for a type, and FLARE registers its own early. The caller has checked the version.
    """
    from nvflare.fuel.utils.class_loader import get_class_name
    from nvflare.fuel.utils.fobs import fobs

    name = get_class_name(decomposer.supported_type())
    fobs.register(decomposer)  # what else that does
    fobs._decomposers[name] = decomposer
    for dot in decomposer.supported_dots():
        fobs._dot_handlers[dot] = decomposer
