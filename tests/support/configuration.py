"""FLARE's configuration, which it reads once per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.utils.config_service import ConfigService


@contextmanager
def read_anew() -> Iterator[None]:
    """Without settings of the environment; what is read in it is forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("NVFLARE_")]:
            patch.delenv(name)
        yield
    ConfigService.reset()
    CommConfigurator.reset()
