"""Holds site-3's results back on their way to the server, after FLARE has asked there whether they are still wanted."""

from __future__ import annotations

import time
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ServerCommandNames
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey

DEADLINE = 120.0


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    end = time.monotonic() + DEADLINE
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come")
        time.sleep(0.02)


class HoldBack(FLComponent):
    """Of the site that is named, all but the last: each leaves when another site has its task of the next round."""

    def __init__(self, folder: str, site: str, rounds: int) -> None:
        super().__init__()
        self.folder, self.site, self.rounds = folder, site, rounds
        self._round = 0

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN and fl_ctx.get_identity_name() == self.site:
            core = fl_ctx.get_engine().get_cell().core_cell
            core.add_outgoing_request_filter("*", "*", self._hold)  # it goes out as a byte stream

    def _hold(self, message) -> None:
        result = message.get_header(StreamHeaderKey.TOPIC) == ServerCommandNames.SUBMIT_UPDATE
        if not result or message.get_header(StreamHeaderKey.SEQUENCE):
            return
        folder, this = Path(self.folder), self._round
        self._round += 1
        (folder / f"held-{this}").touch()
        if self._round < self.rounds:
            wait_for(folder / f"site-1-has-{self._round}")
