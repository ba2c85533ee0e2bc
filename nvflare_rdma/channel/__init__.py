"""The receiver-driven chunk protocol. Its core does no I/O: time and bytes come in as arguments."""
