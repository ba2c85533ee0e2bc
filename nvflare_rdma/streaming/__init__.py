"""FLARE's large-object machinery on the channel."""
