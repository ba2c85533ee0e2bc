"""The Client API's own process (`launch_external_process=True`), which loads no components of the job.

FLARE starts the trainer from the site's job process, with its environment, and gives it a cell below that process's.
A process with a cell imports what lies in the folders of `comm_driver_path`. So the job process adds a folder to that
path, whose one file installs the transfer, and hands on what the trainer's cell does not know: how the site reaches
the server, its certificates and whose others' are, and its settings. The command, and the script, stay as they are.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nvflare.client.cell.bootstrap import BOOTSTRAP_FILE_ENV_VAR

from nvflare_rdma.flare_compat import CellConnections, cell_connections
from nvflare_rdma.runtime import shared
from nvflare_rdma.settings import settings_environment

_DRIVER_PATH = "NVFLARE_COMM_DRIVER_PATH"
#: JSON of the site's `CellConnections`. No NVFLARE_RDMA_ name: those are settings.
_SITE = "RDMA_TRANSFER_SITE"
_FOLDER = str(Path(__file__).parents[1] / "trainer_plugin")


def hand_on(cell: Any, patience: float | None = None) -> None:
    """Have trainers that this process starts from now on install the transfer, too, with the job's own `patience` if it
    has one. Each call is undone by one `take_back`."""
    site = cell_connections(cell)
    credentials = {name: value for name, value in site.credentials.items() if isinstance(value, str)}

    def handed() -> dict[str, str]:
        path = os.environ.get(_DRIVER_PATH, "")
        folders = [folder for folder in path.split(os.pathsep) if folder and folder != _FOLDER]
        return {
            **settings_environment(patience),  # the site's configuration files are not the trainer's
            _DRIVER_PATH: os.pathsep.join([*folders, _FOLDER]),
            _SITE: json.dumps(asdict(replace(site, credentials=credentials))),
        }

    shared().environment.add(handed)


def take_back() -> None:
    """Undo one `hand_on`. The last one restores the environment."""
    shared().environment.remove()


def is_trainer() -> bool:
    """Whether FLARE has started this process as a Client API trainer."""
    return BOOTSTRAP_FILE_ENV_VAR in os.environ


def inherited_site() -> CellConnections | None:
    """How this trainer's site is connected, as the site's job process has handed it on; None if this process is no
    trainer, or nothing was handed on."""
    text = os.environ.get(_SITE) if is_trainer() else None
    return CellConnections(**json.loads(text)) if text else None
