"""The one place that knows which FLARE this package was written against.

Everything that reaches behind FLARE's public interface calls `require_flare` first, so that another FLARE gives
a clear message instead of an AttributeError deep inside it.
"""

import re
from importlib.metadata import PackageNotFoundError, version

from nvflare_rdma.errors import UnsupportedVersionError

_KNOWN = (2, 9)


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
