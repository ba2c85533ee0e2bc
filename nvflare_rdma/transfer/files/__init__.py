"""Moves files from disk to disk, in parts that are verified and resumed one by one.

The sender opens an `OpenFile` and serves its `FileContent`; the receiver calls `pull_file`. The items of the message
are the file's parts. Besides the requests of all transfers, the receiver asks for

    "digests"   digests of parts that have come, as the sender has read them
    "compare"   digests of parts that an earlier transfer has left here, which the sender reads now

What has come is under a hidden name until the file is whole (`partial_file`); `forget` removes what will not be gone on
with.
"""

from __future__ import annotations

from nvflare_rdma.transfer.files.layout import plan
from nvflare_rdma.transfer.files.partial_file import forget
from nvflare_rdma.transfer.files.source import FileIdentity, OpenFile, codec_for_files
from nvflare_rdma.transfer.files.transfer import FileContent, FileDestination, FileTarget, pull_file

__all__ = [
    "FileContent",
    "FileDestination",
    "FileIdentity",
    "FileTarget",
    "OpenFile",
    "codec_for_files",
    "forget",
    "plan",
    "pull_file",
]
