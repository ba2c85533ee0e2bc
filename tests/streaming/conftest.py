from __future__ import annotations

from tests.support.transfer_fixtures import cell, direct, files, records

__all__ = ["cell", "direct", "files", "records"]
