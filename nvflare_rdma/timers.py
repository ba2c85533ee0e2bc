"""FLARE's timers that end a job, or a transfer, while a site can't be reached; docs/outages.md has the table.

One rule lengthens them: each takes as long as it would without an outage, and as long as transfers wait besides
(`rdma_patience`). What a job can't set, a site's own configuration has; `too_short` finds what ends first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import SERVER_SITE_NAME

#: In a job's config_fed_server.json, or config_fed_client.json: what FLARE takes if it is not there, in seconds.
ON_SERVER = {"dead_client_grace_period": 60.0, "streaming_idle_timeout": 600.0}
ON_CLIENTS = {"max_runner_sync_timeout": 60.0, "streaming_idle_timeout": 600.0}
#: A site's job process can't see how a result of its trainer's moves: it hands it in again after this time.
_HAND_IN, _HAND_IN_SECONDS = "submit_task_result_timeout", 300.0
#: There, too, but lengthened only where the job has them: without them FLARE takes the ones above, or none.
_IF_GIVEN = (
    *("np_min_download_timeout", "tensor_min_download_timeout"),
    *("streaming_receiver_acquire_timeout", "streaming_receiver_idle_timeout", _HAND_IN),
)
#: Arguments of a job's controllers and executors, which all have an attribute of that name, or with an underscore
#: before it. 0 and None are no limit.
_ARGUMENTS = {
    "CyclicController": ("task_assignment_timeout",),
    "ServerSideController": ("max_status_report_interval", "progress_timeout"),
    "ClientSideController": ("learn_task_ack_timeout", "final_result_ack_timeout"),
    "CrossSiteEvalClientController": ("get_model_timeout",),
    "ClientAPIExecutor": ("heartbeat_timeout",),
}
#: The server's parent says after so long that a site is dead, unless its fed_server.json has another time.
HEART_BEAT, _HEART_BEAT_SECONDS = "heart_beat_timeout", 600.0


def lengthen(apps: Mapping[str, Any], patience: float) -> None:
    """Lengthen the timers in the apps of a `FedJob` (by site), so that a site may be away for `patience` seconds."""
    for site, app in apps.items():
        config, common = app.app_config, ON_SERVER if site == SERVER_SITE_NAME else ON_CLIENTS
        given = config.additional_params
        if any(_has_trainer(component) for component in _components(config)):
            common = common | {_HAND_IN: _HAND_IN_SECONDS}
        present = {name: given[name] for name in (*common, *_IF_GIVEN) if given.get(name) is not None}
        config.add_params({name: value + patience for name, value in {**common, **present}.items()})
        for component in _components(config):
            # FLARE refuses a time for trainers where there are none.
            if type(component).__name__ != "ClientAPIExecutor" or _has_trainer(component):
                _lengthen_arguments(component, patience)


def _components(config: Any) -> Iterable[Any]:
    yield from config.components.values()
    yield from (each.controller for each in getattr(config, "workflows", ()))
    yield from (each.executor for each in getattr(config, "executors", ()))


def _has_trainer(component: Any) -> bool:
    mode = vars(component).get("_execution_mode")
    return type(component).__name__ == "ClientAPIExecutor" and mode != "in_process"


def _lengthen_arguments(component: Any, patience: float) -> None:
    # By name, since to import them all takes long, and some take torch.
    for name in {name for cls in type(component).__mro__ for name in _ARGUMENTS.get(cls.__name__, ())}:
        attribute = name if name in vars(component) else f"_{name}"
        if value := vars(component).get(attribute):
            setattr(component, attribute, value + patience)


def too_short(patience: float, server: bool, value: Callable[[str, float], float], startup: Path | None) -> list[str]:
    """The timers of this side of a job that would end a transfer, or the job, before its patience does, and what they
    are set to. `value` gives what FLARE takes for a name and a default, `startup` is the server's fed_server.json."""
    found = []
    for name, default in (ON_SERVER if server else ON_CLIENTS).items():
        seconds = value(name, default)
        text = f"{name}={seconds:g}"
        if name == "dead_client_grace_period":  # it begins when the parent has missed the site
            parent = _heart_beat(startup)
            seconds, text = seconds + parent, f"{HEART_BEAT}={parent:g} and {text}"
        if seconds < patience:
            found.append(text)
    return found


def _heart_beat(startup: Path | None) -> float:
    try:
        assert startup is not None
        return float(json.loads(startup.read_text())["servers"][0][HEART_BEAT])
    except (AssertionError, OSError, ValueError, LookupError, TypeError):
        return _HEART_BEAT_SECONDS
