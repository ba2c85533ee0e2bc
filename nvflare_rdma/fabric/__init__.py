"""How bytes get into a peer's memory. No protocol, no FLARE, no torch."""
