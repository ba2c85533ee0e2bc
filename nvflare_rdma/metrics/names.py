"""Names of files in a job's run folder, for those who write them and those who read them."""

#: Folder and name.
TRANSFERS_FILE = ("nvflare_rdma", "transfers.jsonl")
