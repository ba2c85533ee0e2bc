"""A builder for `nvflare provision`: start-up kits that have this package's settings from the beginning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvflare.lighter.constants import PropKey
from nvflare.lighter.ctx import ProvisionContext
from nvflare.lighter.entity import Participant, Project
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.spec import Builder

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.kits import ADMIN, SERVER, Change, Kit, enable, find_kits, wanted, write

__all__ = ["RdmaBuilder"]


class RdmaBuilder(Builder):
    """Does in `project.yml` what `nvflare-rdma enable` does with kits that are there. Put it before
    `StaticFileBuilder`, right after `WorkspaceBuilder`: FLARE lets builders finish in reverse order, and this one needs
    what that one has written. Kits whose `local` folder FLARE signs are signed again.

    Args:
        fabrics: `rdma_fabrics`.
        memory_budget: bytes, or a text such as "4GiB": `rdma_memory_budget_bytes`.
        data_port: the port, or the range, of the server's `ParentDoor`; FLARE's own port takes `upgrade_driver`.
        patience: `rdma_patience`.
        upgrade_driver: whether the driver takes over FLARE's schemes tcp and stcp; takes `driver_path`.
        driver_path: the driver's folder on the hosts, or in the images, of the federation; None leaves the driver out.
        sites: the names of the participants that have this package; None stands for all.

    Raises:
        ConfigError: a value is wrong.
    """

    def __init__(
        self,
        fabrics: str | None = None,
        memory_budget: str | int | None = None,
        data_port: str | int | None = None,
        patience: str | float | None = None,
        upgrade_driver: bool = False,
        driver_path: str | None = None,
        sites: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if upgrade_driver and not driver_path:
            raise ConfigError(
                "RdmaBuilder: upgrade_driver needs driver_path, the folder that `nvflare-rdma driver-path` prints "
                "on the federation's hosts"
            )
        self._wanted = wanted(fabrics, memory_budget, data_port, patience, upgrade_driver, driver_path)
        self._sites = sites

    def initialize(self, project: Project, ctx: ProvisionContext) -> None:
        """FLARE's hook: see that the names are those of participants."""
        known = {participant.name for participant in project.get_all_participants()}
        if unknown := sorted(set(self._sites or ()) - known):
            raise ConfigError(
                f"RdmaBuilder: sites has {unknown[0]!r}, which is none of the participants {sorted(known)}"
            )

    def finalize(self, project: Project, ctx: ProvisionContext) -> None:
        """FLARE's hook: change the kits, once all of their files are there."""
        changes: list[Change] = []
        signed = False
        for participant in project.get_all_participants():
            if self._sites is not None and participant.name not in self._sites:
                continue
            kit = _kit(participant, ctx)
            if kit.role == ADMIN:
                continue
            plan = enable(kit, self._wanted, bool(self._wanted.ports) and kit.role == SERVER, new=True)
            changes.extend(plan.changes)
            signed = signed or kit.signed is not None
            for note in plan.notes:
                ctx.info(f"RdmaBuilder: {kit.name}: {note}")
        write(changes)
        if signed:
            SignatureBuilder().build(project, ctx)


def _kit(participant: Participant, ctx: ProvisionContext) -> Kit:
    """A kit in the making, in a folder that FLARE moves away in the end."""
    if not ctx.get_wip_dir():
        raise _misplaced("after WorkspaceBuilder")
    folder = Path(ctx.get_ws_dir(participant))
    if participant.get_prop(PropKey.COMM_CONFIG_ARGS) and not (folder / "local" / "comm_config.json").exists():
        raise _misplaced("before StaticFileBuilder")  # which has yet to write it
    (kit,) = find_kits(folder)
    return kit


def _misplaced(where: str) -> ConfigError:
    return ConfigError(f"RdmaBuilder has to stand {where} among the builders of project.yml")
