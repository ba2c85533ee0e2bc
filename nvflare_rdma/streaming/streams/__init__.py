"""Moves FLARE's object streams, containers and files, over direct links."""
