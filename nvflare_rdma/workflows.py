"""Which messages with models a job has, told from its controllers and executors: quantization needs to know.

FLARE applies filters to the tasks that the server hands out, and to their results. In a workflow that the sites
control, sites hand each other tasks, which FLARE does not filter. In Collab there are no tasks with models at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from nvflare.apis.job_def import SERVER_SITE_NAME

from nvflare_rdma.errors import ConfigError

_COLLAB = "nvflare.collab."


def sites_with_peers(apps: Mapping[str, Any], sites: Sequence[str]) -> list[str]:
    """Those of the sites that send models to each other (swarm, and cyclic that the sites control)."""
    return [site for site in sites if _peer_controllers(apps, site)]


def sends_tasks(apps: Mapping[str, Any]) -> bool:
    """Whether the server hands out tasks with models: it has a workflow that the sites don't control, or none yet."""
    from nvflare.app_common.ccwf.server_ctl import ServerSideController

    server = apps.get(SERVER_SITE_NAME)
    workflows = [] if server is None else [workflow.controller for workflow in server.app_config.workflows]
    return not workflows or any(not isinstance(controller, ServerSideController) for controller in workflows)


def check_tasks(apps: Mapping[str, Any], sites: Sequence[str], tasks: Sequence[str]) -> str:
    """Check that there will be messages with models of each of the tasks.

    Returns:
        What keeps tasks from having any, and which tasks there are: the sites have no executor for them, or none yet.
        "" if nothing does. Where the sites control all workflows, no task of the server has a model, whatever its name.

    Raises:
        ConfigError: there can't be any, whatever the tasks are; the message says why.
    """
    executors = [each for site in sites if site in apps for each in apps[site].app_config.executors]
    if any(type(each.executor).__module__.startswith(_COLLAB) for each in executors):
        raise ConfigError(
            "add_quantization has no effect on a Collab job: models travel in calls there, to which FLARE applies no "
            "filters; leave it out (add_transfer works)"
        )
    if not executors:
        return ""  # they may come later
    if not sends_tasks(apps):
        if not sites_with_peers(apps, sites):
            raise ConfigError(
                "add_quantization has no effect on this job: the sites control all of its workflows, FLARE applies no "
                "filters to what they send each other, and none of them is a swarm or cyclic one; leave it out"
            )
        return ""
    known = sorted({task for each in executors for task in each.tasks})
    strange = [task for task in tasks if not any(fnmatchcase(task, pattern) for pattern in known)]
    if not strange:
        return ""
    return (
        f"tasks={list(tasks)!r}: the sites have no executor for {', '.join(strange)}, so nothing would be quantized; "
        f"name some of: {', '.join(known)}"
    )


def _peer_controllers(apps: Mapping[str, Any], site: str) -> list[Any]:
    from nvflare.app_common.ccwf.client_ctl import ClientSideController
    from nvflare.app_common.ccwf.cse_client_ctl import CrossSiteEvalClientController

    executors = [each.executor for each in apps[site].app_config.executors] if site in apps else []
    return [
        executor
        for executor in executors
        if isinstance(executor, ClientSideController) and not isinstance(executor, CrossSiteEvalClientController)
    ]
