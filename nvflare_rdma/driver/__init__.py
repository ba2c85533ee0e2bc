"""The F3 driver: a thin adapter from FLARE's Connection to the channel."""
