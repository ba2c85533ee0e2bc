"""Results that are no tensors until they are added.

A result that comes in few bits is kept as it came, and decoded run by run into the sum that an aggregator makes; what
memory has no room for waits on disk. So a server that waits for many sites never holds their models in full. FLARE
knows nothing of it. It gets tensors (`encoded_tensor`) that do what its aggregators do with them,
`total.add_(v, alpha=weight)` and `v.mul(weight)`, without ever being made as a whole, and that turn into plain ones for
whatever else is done with them.

    `Encoded`         the values of one tensor, which are decoded, or added to a sum, run by run. `Pieces` has them as a
                      transfer brings them, `EncodedParts` as a codec's parts, `Plain` as they are
    `Bytes`           where they are: `InMemory`, or `InSpool`, in a file without a name, which is a `Spool`
    `encoded_tensor`  a torch tensor of them; `plain` gives what it stands for
    `Holdings`        counts what a process holds of them

Needs no FLARE. torch is imported when a tensor is made.
"""

from __future__ import annotations

from nvflare_rdma.accumulate.encoded import Encoded, EncodedParts, Pieces, Plain
from nvflare_rdma.accumulate.holdings import Holdings
from nvflare_rdma.accumulate.spool import Bytes, DiskRoom, InMemory, InSpool, Spool
from nvflare_rdma.accumulate.tensors import encoded_tensor, is_encoded_tensor, plain

__all__ = [
    "Bytes",
    "DiskRoom",
    "Encoded",
    "EncodedParts",
    "Holdings",
    "InMemory",
    "InSpool",
    "Pieces",
    "Plain",
    "Spool",
    "encoded_tensor",
    "is_encoded_tensor",
    "plain",
]
