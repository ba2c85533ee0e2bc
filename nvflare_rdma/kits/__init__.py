"""FLARE's start-up kits as they lie on disk: which there are in a folder, what of this package is set in them, and how
to put it in and take it out.

`Wanted` says what is to be set. `enable` and `disable` work out what that changes in one kit and touch nothing;
`write` writes what they have found, for many kits at once, or nothing of it.
"""

from __future__ import annotations

from nvflare_rdma.kits.errors import KitError
from nvflare_rdma.kits.find import ADMIN, CLIENT, RELAY, SERVER, Kit, find_kits
from nvflare_rdma.kits.plan import BACKUP, RECORD, KitPlan, disable, enable
from nvflare_rdma.kits.state import KitState, state_of
from nvflare_rdma.kits.wanted import PLUGIN, Wanted, wanted
from nvflare_rdma.kits.writing import Change, write

__all__ = [
    "ADMIN",
    "BACKUP",
    "CLIENT",
    "PLUGIN",
    "RECORD",
    "RELAY",
    "SERVER",
    "Change",
    "Kit",
    "KitError",
    "KitPlan",
    "KitState",
    "Wanted",
    "disable",
    "enable",
    "find_kits",
    "state_of",
    "wanted",
    "write",
]
