"""A server and two sites, one of which, site-2, meddles with what the server streams to site-1: stream_strangers.py
FOLDER. What came of it is in FOLDER/results.json."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

from nvflare.apis.shareable import Shareable
from nvflare.apis.streaming import ObjectProducer
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.private.stream_runner import TOPIC_STREAM_REQUEST, HeaderKey

from nvflare_rdma.streaming import requests
from nvflare_rdma.streaming.component import install
from nvflare_rdma.streaming.streams.files import _StreamedFile
from nvflare_rdma.streaming.streams.messages import KEY, PREFIX, Said, prepare_to_read
from nvflare_rdma.transfer.files import OpenFile, plan
from nvflare_rdma.transfer.files.layout import Layout
from nvflare_rdma.transfer.files.partial_file import PartialFile
from nvflare_rdma.transfer.files.source import PartDigests
from tests.support.stream_cells import Job
from tests.support.waiting import eventually

DICT = {"ContainerStreamer.type": "dict", "ContainerStreamer.size": 3, PREFIX + "portions": 1}
HONEST, STRANGER = "site-1", "site-2"


class Says(ObjectProducer):
    """Says these messages to one target, and has the states that it answers with. `between` is called after the
    first."""

    def __init__(self, *messages, between=lambda: None) -> None:
        self.messages, self.between, self.states = list(messages), between, []

    def produce(self, stream_ctx, fl_ctx):
        if len(self.states) == 1:
            self.between()
        return (Shareable({KEY: self.messages.pop(0)}), 10.0) if self.messages else (None, 0.0)

    def process_replies(self, replies, stream_ctx, fl_ctx):
        (reply,) = replies.values()
        self.states.append((reply.get(KEY) or {}).get("state") or reply.get_return_code())


def start(stream: str) -> dict:
    return {"do": "start", "stream": stream, "peer": "server", "timeout": 12.0}


class Strangers:
    def __init__(self, folder: Path) -> None:
        self.job = Job(folder)
        self.job.register()
        self.asked: list = []
        answer = requests._answer

        def recording(message):
            self.asked.append([message.get_header(MessageHeaderKey.DESTINATION), self.origin(message)])
            return answer(message)

        requests._answer = recording
        install()
        prepare_to_read()
        path = folder / "data.bin"
        path.write_bytes(os.urandom(10_000))
        self.path = path
        self.stranger = self.job.sites[STRANGER]

    @staticmethod
    def origin(message) -> str:
        return message.get_header(MessageHeaderKey.ORIGIN)

    def offer(self, engine) -> str:
        made = _StreamedFile(OpenFile(str(self.path)), engine.cell)
        return requests.open_stream(engine.cell, made.service, [HONEST])

    def say(self, engine, says: Says, topic: str = "container", context: dict = DICT) -> list:
        # FLARE does not wait until the receiver has heard of the end of the stream before.
        eventually(lambda: not self.job.sites[HONEST].streamer.tx_table)
        engine.stream_objects(PREFIX + "app", topic, dict(context), [HONEST], says, engine.new_context())
        return says.states

    def asks_for_what_others_were_offered(self) -> dict:
        name = self.offer(self.job.server)
        asked = {"do": "describe", "channel": False}
        found = {
            site: requests.stream_request_function(engine.cell, "server", name, False)(asked)
            for site, engine in self.job.sites.items()
        }
        return {site: answer.get("refused") or sorted(answer) for site, answer in found.items()}

    def names_another_cell(self) -> dict:
        """A stream of the stranger's, with the name of one that the server offers."""
        name = self.offer(self.job.server)
        self.offer(self.stranger)  # so that it hears what it is asked
        self.asked.clear()
        says = Says(Said(start(name)), *[Said({"do": "wait"})] * 2)
        states = self.say(self.stranger, says)
        eventually(lambda: self.asked)
        return {"states": states, "asked": sorted({tuple(it) for it in self.asked})}

    def speaks_in_a_stream_of_the_servers(self) -> dict:
        said: list = []

        def meddle() -> None:
            (tx_id,) = self.job.sites[HONEST].streamer.tx_table
            for words in ({"do": "end", "gone": True}, {"do": "more", "what": [[0, "a", 1]]}, {"do": "hello"}):
                for message in (Said(words), words):
                    request = Shareable({KEY: message})
                    headers = {HeaderKey.TX_ID: tx_id, HeaderKey.SEQ: 7}
                    headers |= {HeaderKey.CHANNEL: PREFIX + "app", HeaderKey.TOPIC: "container"}
                    for key, value in headers.items():
                        request.set_header(key, value)
                    context = self.stranger.new_context()
                    reply = self.stranger.send_aux_request([HONEST], TOPIC_STREAM_REQUEST, request, 10.0, context)
                    state = reply[HONEST].get(KEY)
                    said.append(state["state"] if isinstance(state, dict) else reply[HONEST].get_return_code())

        name = self.offer(self.job.server)
        says = Says(Said(start(name)), *[Said({"do": "wait"})] * 2, between=meddle)
        return {"states": self.say(self.job.server, says), "stranger": said}

    def offers_a_file_of_which_the_server_has_sent_some(self) -> dict:
        """It says that it is the same file, and ends the stream as if that was gone."""
        folder, identity = self.job.folder / HONEST, OpenFile(str(self.path)).identity
        begun = PartialFile(str(folder), Layout(identity, [item for item, _ in plan(identity)]), HONEST, "server")
        data = memoryview(self.path.read_bytes())
        digests = PartDigests(len(data))
        digests.add(0, data)
        begun.write(0, 0, data)
        begun.add(0, digests.whole(), digests.whole())
        begun.keep()

        def hidden() -> list:
            return sorted(path.name for path in folder.glob(".*"))

        before = hidden()
        context = {"FileStreamer.file_size": identity.size, "Streamer.file_name": identity.name}
        context[PREFIX + "file"] = identity.pack()
        says = Says(Said(start("nobody's")), Said({"do": "end", "gone": True}))
        self.say(self.stranger, says, "file", context)
        return {"before": before, "after": hidden()}

    def says_nothing_of_who_it_is(self) -> list:
        return self.say(self.stranger, Says(start(self.offer(self.job.server))))


def main() -> None:
    folder = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    it = Strangers(folder)
    results = {}
    for what in (
        it.asks_for_what_others_were_offered,
        it.names_another_cell,
        it.speaks_in_a_stream_of_the_servers,
        it.offers_a_file_of_which_the_server_has_sent_some,
        it.says_nothing_of_who_it_is,
    ):
        it.job.lines.take()
        results[what.__name__] = what()
        results[what.__name__ + "_log"] = it.job.lines.take()
    (folder / "results.json").write_text(json.dumps(results))
    os._exit(0)  # FLARE's threads would hold the process


if __name__ == "__main__":
    main()
