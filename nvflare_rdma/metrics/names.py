"""Names of files in a job's run folder, for those who write them and those who read them."""

#: Folder in the run folder, and name of the file in it.
from __future__ import annotations

TRANSFERS_FILE = ("nvflare_rdma", "transfers.jsonl")
