"""The version, which setup.cfg reads without importing the package."""

from __future__ import annotations

__version__ = "0.2.0"
