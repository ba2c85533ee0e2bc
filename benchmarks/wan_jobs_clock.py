"""A FLARE component that writes down when rounds begin and tasks are worked on: jobs of `wan_jobs.py` take it along."""

from __future__ import annotations

import json
import time

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_event_type import AppEventType

_EVENTS = (
    AppEventType.ROUND_STARTED,
    EventType.BEFORE_TASK_EXECUTION,
    EventType.AFTER_TASK_EXECUTION,
    EventType.END_RUN,
)


class Clock(FLComponent):
    """Logs a line of JSON for each event: its name, the task's, and the seconds of the clock that all processes of a
    machine share."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type in _EVENTS:
            line = {"event": event_type, "task": fl_ctx.get_prop(FLContextKey.TASK_NAME), "at": time.monotonic()}
            self.log_info(fl_ctx, f"CLOCK {json.dumps(line)}")
