"""Saving a job's model without holding up its rounds. `BackgroundSave` is what a job names."""

from __future__ import annotations

from nvflare_rdma.persistors.background import BackgroundSave

__all__ = ["BackgroundSave"]
