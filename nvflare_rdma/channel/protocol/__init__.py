"""The receiver-driven chunk protocol: offer, grant, write, done. Nothing here does I/O or looks at a clock."""
