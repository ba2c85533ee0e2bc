"""What is used of pyverbs. Importing it configures the root logger, which is for the program to do: that is undone.

Raises ImportError where there is no pyverbs, or none for this Python.
"""

from __future__ import annotations

import logging

_root = logging.getLogger()
_handlers, _level = _root.handlers[:], _root.level
try:
    import pyverbs.cm_enums as ce
    import pyverbs.enums as e
    from pyverbs.addr import GID, AHAttr, GlobalRoute
    from pyverbs.cmid import CMID, AddrInfo, CMEvent, CMEventChannel, ConnParam
    from pyverbs.cq import CQ, CompChannel
    from pyverbs.device import Context
    from pyverbs.mr import MR
    from pyverbs.pd import PD
    from pyverbs.pyverbs_error import PyverbsError
    from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
    from pyverbs.wr import SGE, RecvWR, SendWR
finally:
    _root.handlers[:] = _handlers
    _root.setLevel(_level)

__all__ = [
    "CMID",
    "CQ",
    "GID",
    "MR",
    "PD",
    "QP",
    "SGE",
    "AHAttr",
    "AddrInfo",
    "CMEvent",
    "CMEventChannel",
    "CompChannel",
    "ConnParam",
    "Context",
    "GlobalRoute",
    "PyverbsError",
    "QPAttr",
    "QPCap",
    "QPInitAttr",
    "RecvWR",
    "SendWR",
    "ce",
    "e",
]
