"""Moves tensors and files between peers, over links of `nvflare_rdma.channel`. Knows nothing of FLARE.

How a dict of tensors moves from one peer to another:

    sender                                           receiver
    Service(TensorContent(tensors), links)           Pull(links, peer, ask, TensorDestination(land), ...)

                         requests, each with its answer: `ask`
    manifest, and how to get to this side;    <---   "describe"; labels are reserved for what comes of it
    offers the items if there is a link
                                                     opens a link if there is none: dials, or invites the sender to;
    dials if it is invited; offers the items  <---   and then "send": these items, under these labels

                         over the link
    offer: a message with a label             --->   the sink that waits under this label takes it
                                              <---   grant: a chunk may be written to this memory
    write: the chunk, from the item's source  --->   it lands in the tensor's memory, or is decoded into it
                                                     when every chunk is in, the item is whole

                         requests again
    why nothing more will come, if so         <---   "report", every few seconds
    forgets this receiver                     <---   "done"; or "give up" if the receiver has failed

Small tensors are in the manifest and need no link. What is offered before the manifest is here waits for its sink. A
link that breaks is opened again, and what is missing is asked for again. How requests and answers travel is for the
caller to say: `ask` gives the answer of the sender's `Service.answer`, which FLARE's messages carry.

Who is who:

    `PeerLinks`     one cell's links to its peers: it opens them, with tickets and certificates. Its `ExpectedMessages`
                    have the sink that a message is for
    `Junction`      joins connections at a parent's port, for `PeerLinks` whose processes can't be reached straight
    `Service`       serves one content to all its receivers, and answers their requests
    `Content`       what is sent: its items, and a source of bytes for each. `TensorContent`, `files.FileContent`
    `Pull`          gets everything that a peer's service holds into a destination
    `Destination`   where it goes: a sink for each item. `TensorDestination` has a `Place` for each tensor, in memory
                    (`in_memory`) or in a file (`OnDisk`); `files.FileDestination` writes parts of a file
    `Meter`         counts one transfer for a `Ledger`
    `SitePlaces`    bounds how many threads work, or wait, for one site

Files move in the same way; their items are parts (see `nvflare_rdma.transfer.files`).
"""

from __future__ import annotations

from nvflare_rdma.transfer.addresses import are_hosts, listen, own_hosts, site_of
from nvflare_rdma.transfer.arrays import TensorMemory, raw_bytes
from nvflare_rdma.transfer.content import Content, TensorContent
from nvflare_rdma.transfer.encoding import EncodedChunkCache
from nvflare_rdma.transfer.junction import Junction
from nvflare_rdma.transfer.long_waits import LongWaits
from nvflare_rdma.transfer.manifest import SMALL_TOTAL, Item, is_sendable
from nvflare_rdma.transfer.manifest import unpack as unpack_manifest
from nvflare_rdma.transfer.meetings import Place as MeetingPlace
from nvflare_rdma.transfer.notices import Notices
from nvflare_rdma.transfer.patience import AbortedError, EndedError, LostError
from nvflare_rdma.transfer.peers import Identify, PeerLinks
from nvflare_rdma.transfer.pieces import PieceLayout
from nvflare_rdma.transfer.places import EncodedInMemory, InMemory, Land, OnDisk, Place, give, in_memory, store_chunk
from nvflare_rdma.transfer.receiver import Progress, Pull, pull
from nvflare_rdma.transfer.records import Ledger, Meter, Meters, TransferRecord, total
from nvflare_rdma.transfer.requests import StreamRequestRouter
from nvflare_rdma.transfer.routes import RouteKey
from nvflare_rdma.transfer.sender import Relayed
from nvflare_rdma.transfer.service import Service
from nvflare_rdma.transfer.sinks import Destination, TensorDestination
from nvflare_rdma.transfer.waiting import SitePlaces, stream_places, waiting_places

__all__ = [
    "SMALL_TOTAL",
    "AbortedError",
    "Content",
    "Destination",
    "EncodedChunkCache",
    "EncodedInMemory",
    "EndedError",
    "Identify",
    "InMemory",
    "Item",
    "Junction",
    "Land",
    "Ledger",
    "LongWaits",
    "LostError",
    "MeetingPlace",
    "Meter",
    "Meters",
    "Notices",
    "OnDisk",
    "PeerLinks",
    "PieceLayout",
    "Place",
    "Progress",
    "Pull",
    "Relayed",
    "RouteKey",
    "Service",
    "SitePlaces",
    "StreamRequestRouter",
    "TensorContent",
    "TensorDestination",
    "TensorMemory",
    "TransferRecord",
    "are_hosts",
    "give",
    "in_memory",
    "is_sendable",
    "listen",
    "own_hosts",
    "pull",
    "raw_bytes",
    "site_of",
    "store_chunk",
    "stream_places",
    "total",
    "unpack_manifest",
    "waiting_places",
]
