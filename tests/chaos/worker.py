"""A worker of a chaos run: it serves tensors and files to the others, pulls theirs, and looks at everything that comes.

It says "ready" when others may ask it. Told to "end" it pulls nothing more and says "pulled", told to "rest" it looks
whether anything is held and says "looked", and with the next word it ends. Told to "leave" it closes its links in the
middle of everything, and ends. What it finds is in the run's folder at once (`Journal`), also if it is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import ssl
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nvflare_rdma.channel import ChannelLimits
from nvflare_rdma.errors import RdmaError, TlsError, TransferError
from nvflare_rdma.fabric import MAX_RAILS, factories, probe, tcp
from nvflare_rdma.runtime import Runtime, Shared, make_context
from nvflare_rdma.settings import Settings
from nvflare_rdma.transfer import Item, LostError, PeerLinks, Place, Service, TensorContent, in_memory, pull
from nvflare_rdma.transfer.files import FileContent, FileIdentity, FileTarget, forget, pull_file
from tests.chaos import content
from tests.support.calls import Server, call
from tests.support.link_process import resources, tls_context

#: Shorter than a user's, so that what would take minutes to be given up is seen many times.
STALL_SECONDS, HANDSHAKE_SECONDS = 6.0, 5.0
#: No pull may take longer, of the time that its process is not stopped: three attempts in vain, each with requests that
#: nobody answers, an address that says nothing, and a stall.
DEADLINE = 200.0
#: After this nothing may be held any more that nobody uses.
REST_SECONDS = 3 * STALL_SECONDS + HANDSHAKE_SECONDS
PULLERS = 3
#: Requests that may be sent again when no answer came, as FLARE's messages are.
_TRIES = 2
_FILES = range(2 * PULLERS)


@dataclass(frozen=True)
class Config:
    """What a worker is told."""

    folder: str
    seed: str
    number: int
    life: int
    workers: int
    fabrics: tuple[str, ...]
    secure: bool
    budget: int

    def path(self, what: str, number: int) -> Path:
        """Of a file that belongs to a worker."""
        return Path(self.folder) / f"{what}-{number}"


def name_of(number: int) -> str:
    """A worker's, which its certificate has, too."""
    return "server" if number == 0 else f"site-{number}"


def has_door(number: int) -> bool:
    """Half of them have none, and invite nobody."""
    return number % 2 == 0


def files_of(name: str, folder: Path) -> dict[str, str]:
    """Paths of a worker's certificates and keys, as `Authority.issue` has written them."""
    return dict(json.loads((folder / f"{name}.json").read_text()))


class Journal:
    """A line of JSON for each pull that has ended, and for each violation."""

    def __init__(self, config: Config) -> None:
        self._life = config.life
        self._fd = os.open(config.path("journal", config.number), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)

    def write(self, outcome: str, detail: str = "") -> None:
        line = {"life": self._life, "outcome": outcome, "detail": detail}
        os.write(self._fd, (json.dumps(line) + "\n").encode())

    def violation(self, detail: str) -> None:
        self.write("violation", detail)


class FullDisk(Place):
    """Where nothing can be stored."""

    def write(self, offset: int, data: memoryview) -> None:
        raise OSError(28, "no space left, says this run")

    def finish(self) -> Any:
        raise OSError(28, "no space left, says this run")


class Worker:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.folder)
        self.name = name_of(config.number)
        self.rng = random.Random(f"{config.seed}/{config.number}/{config.life}")
        self.journal = Journal(config)
        self.lock = threading.Lock()
        self.services: dict[str, Service] = {}
        #: Of each pull that is going on: at how many seconds of `running` it began, and what it is.
        self.pulls: dict[int, tuple[float, str]] = {}
        self.running = 0.0
        """Seconds that this process was not stopped."""
        self.over = threading.Event()
        self.received = config.path("received", config.number)
        self.runtime = self._make_runtime()
        self.links = PeerLinks(
            self.name,
            self.runtime,
            self._tls,
            self._identify,
            ("127.0.0.1", 0),
            (0, 0) if has_door(config.number) else None,
        )

    def _make_runtime(self) -> Runtime:
        settings = Settings(
            rdma_fabrics=self.config.fabrics,
            rdma_chunk_bytes=self.rng.choice((64, 256, 1024)) * 1024,
            rdma_memory_budget_bytes=self.config.budget,
            rdma_rails=self.rng.choice((1, 2, 4)),
            rdma_controller=self.rng.choice(("adaptive", "fixed")),
        )
        tcp.rails_for_round_trip = lambda seconds: MAX_RAILS  # the way is short, and rails are to join all the same
        available = probe(settings.fabric_options)
        context = make_context(settings, available)
        limits = replace(context.limits, stall_timeout=STALL_SECONDS, handshake_timeout=HANDSHAKE_SECONDS)
        assert isinstance(limits, ChannelLimits)
        made = factories(settings.fabric_options, available)
        runtime = Runtime(settings, replace(context, limits=limits), made, Shared())
        runtime.shared.encoded_chunks.limit = self.config.budget // 16
        return runtime

    def _tls(self, server_side: bool) -> ssl.SSLContext | None:
        return tls_context(files_of(self.name, self.folder), server_side) if self.config.secure else None

    @staticmethod
    def _identify(peer: str, certificate: Mapping[str, Any]) -> None:
        shown = {key: value for field in certificate["subject"] for key, value in field}.get("commonName")
        if shown != peer:
            raise TlsError(f"{shown!r} is there, and not {peer!r}")

    # -- serving -------------------------------------------------------------------------------------------

    def answer(self, do: str, *what: Any) -> Any:
        """Answer a call of another worker, or of the run."""
        match do:
            case "open":
                return self._open_service(*what)
            case "close":
                with self.lock:
                    service = self.services.pop(what[0], None)
                if service is not None:
                    service.close()
                return None
            case "ask":
                key, request, receiver = what
                with self.lock:
                    service = self.services.get(key)
                return {"refused": "it is over"} if service is None else service.answer(request, receiver)
        raise ValueError(do)

    def _open_service(self, kind: str, seed: int) -> tuple[str, dict[str, Any] | None]:
        if kind == "file":
            file = content.open_source(seed, self.folder)
            service, identity = Service(FileContent(file), lambda: self.links), file.identity.pack()
        else:
            tensors = TensorContent(content.to_send(seed), cache=self.runtime.shared.encoded_chunks)
            service, identity = Service(tensors, lambda: self.links), None
        with self.lock:
            key = f"{self.config.life}/{len(self.services)}/{self.rng.getrandbits(60)}"
            self.services[key] = service
        return key, identity

    # -- pulling -------------------------------------------------------------------------------------------

    def pull_all(self, puller: int) -> None:
        """Pull one thing after the other, until it is over."""
        rng = random.Random(f"{self.config.seed}/{self.config.number}/{self.config.life}/{puller}")
        peers = [n for n in range(self.config.workers) if n != self.config.number]
        peers = [n for n in peers if has_door(n) or has_door(self.config.number)]
        while not self.over.is_set():
            kind = rng.choice(("tensors", "tensors", "tensors", "file"))
            # One at a time receives a file: what two receive at once has names of its own, and is not gone on with.
            seed = rng.randrange(1, 10**6) if kind == "tensors" else rng.choice(_FILES[puller::PULLERS])
            self._pull(rng, rng.choice(peers), kind, seed)

    def _pull(self, rng: random.Random, peer: int, kind: str, seed: int) -> None:
        me, what = threading.get_ident(), f"{kind} {seed} from {name_of(peer)}"
        with self.lock:
            self.pulls[me] = self.running, what
        key = ""
        try:
            key, identity = self._call(peer, "open", kind, seed)
            ask = self._ask_function(rng, peer, key)
            if identity is None:
                wrong = self._pull_tensors(rng, peer, seed, ask)
            else:
                wrong = self._pull_file(rng, peer, seed, ask, FileIdentity.unpack(identity))
            if wrong:
                self.journal.violation(f"WRONG {what}: {wrong}")
            else:
                self.journal.write("right")
        except (RdmaError, MemoryError, OSError) as error:
            self.journal.write("error", f"{type(error).__name__}: {error}")
            self.over.wait(0.3)  # who was killed takes some seconds to be there again
        except BaseException:  # noqa: BLE001 - that is what is looked for
            self.journal.violation(f"UNEXPECTED {what}: {traceback.format_exc()}")
        finally:
            with self.lock:
                began, _ = self.pulls.pop(me)
            if (took := self.running - began) > DEADLINE:
                self.journal.violation(f"SLOW {what}: it took {took:.0f} s")
            with contextlib.suppress(Exception):
                self._call(peer, "close", key)

    def _pull_tensors(self, rng: random.Random, peer: int, seed: int, ask: Callable[[Any], Any]) -> str:
        new = in_memory(lambda nbytes: memoryview(bytearray(nbytes)))
        full = rng.random() < 0.05

        def land(item: Item) -> Place:
            return FullDisk() if full and item.nbytes > 50_000 else new(item)

        got = pull(self.links, name_of(peer), ask, land, self._abort_function(rng))
        return content.difference(got, content.expected(seed))

    def _pull_file(
        self, rng: random.Random, peer: int, seed: int, ask: Callable[[Any], Any], identity: FileIdentity
    ) -> str:
        path = self.received / f"whole-{seed}"
        target = FileTarget(identity, str(self.received), str(path), self.name, name_of(peer))
        pull_file(self.links, name_of(peer), ask, target, self._abort_function(rng))
        right = path.read_bytes() == content.source(seed, self.folder).read_bytes()
        path.unlink()
        return "" if right else "its bytes differ"

    def _abort_function(self, rng: random.Random) -> Callable[[], bool]:
        """Some are not wanted any more after a while."""
        until = time.monotonic() + (rng.uniform(0.05, 3.0) if rng.random() < 0.1 else 10**6)
        return lambda: time.monotonic() > until

    def _call(self, peer: int, *what: Any) -> Any:
        try:
            return call(self.config.path("worker", peer), *what)
        except TimeoutError as error:
            raise LostError(f"{name_of(peer)} did not answer {what[0]!r}") from error
        except (OSError, EOFError) as error:
            raise TransferError(f"{name_of(peer)} can't be asked: {error!r}") from error

    def _ask_function(self, rng: random.Random, peer: int, key: str) -> Callable[[dict[str, Any]], Any]:
        """As FLARE's messages bring requests and answers; half of the doors are reached through the proxy."""

        def ask(request: dict[str, Any]) -> Any:
            asked = dict(request)
            if asked.get("invitation"):
                asked["invitation"] = self._through_proxy(rng, asked["invitation"])
            once = request["do"] in ("send", "report")
            for left in reversed(range(1 if once else _TRIES)):
                try:
                    answer = self._call(peer, "ask", key, asked, self.name)
                    break
                except LostError:
                    if not left:
                        raise
            if isinstance(answer, dict) and answer.get("invitation"):
                answer["invitation"] = self._through_proxy(rng, answer["invitation"])
            return answer

        return ask

    def _through_proxy(self, rng: random.Random, invitation: dict[str, Any]) -> dict[str, Any]:
        if rng.random() < 0.4:
            return invitation
        with contextlib.suppress(OSError, EOFError):
            return {**invitation, "port": call(self.folder / "proxy", invitation["port"])}
        return invitation

    # -- what is looked at ---------------------------------------------------------------------------------

    def watch(self) -> None:
        """Count the time that this process has run, and see what hangs."""
        last, seen = time.monotonic(), set[str]()
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            self.running += min(now - last, 1.0)
            last = now
            with self.lock:
                late = {what for began, what in self.pulls.values() if self.running - began > DEADLINE}
            for what in late - seen:
                self.journal.violation(f"HANGS {what}")
                faulthandler.dump_traceback()
            seen |= late

    def look_at_rest(self, before: dict[str, int]) -> None:
        """See whether anything is held when nobody does anything any more, and after the links are closed."""
        with self.lock:
            services, self.services = list(self.services.values()), {}
        for service in services:
            service.close()
        context = self.links._context
        self._settled("bytes of the budget", lambda: context.budget.in_use)
        self._settled("requests for the budget", lambda: len(context.budget._waiting))
        self._settled("sinks", lambda: len(self.links.expected))
        self._settled("threads that offer", lambda: _threads("rdma-offers"))
        self._settled("bytes of slots", lambda: context.pool.used_bytes)
        for link in [link for links in list(self.links._links.values()) for link in links]:
            inbox, outbox = link._inbox, link._outbox
            for part in (inbox._arriving, inbox._waiting, inbox._landings, outbox._messages, outbox._reads):
                self._settled(f"messages of {link.name}", lambda part=part: len(part))
        self.links.close()
        self._settled("links", lambda: len(self.links._links))
        self._settled("threads", lambda: _threads("rdma"))
        self._settled("descriptors", lambda: max(resources()["descriptors"] - before["descriptors"], 0))
        for seed in _FILES:  # what was not gone on with, as by a worker that was killed
            identity = content.open_source(seed, self.folder).identity
            for peer in map(name_of, range(self.config.workers)):
                forget(str(self.received), identity, self.name, peer)
        if left := sorted(path.name for path in self.received.iterdir()):
            self.journal.violation(f"HELD files: {left}")

    def _settled(self, what: str, held: Callable[[], object]) -> None:
        end = time.monotonic() + REST_SECONDS
        while found := held():
            if time.monotonic() > end:
                self.journal.violation(f"HELD {what}: {found}")
                faulthandler.dump_traceback()
                return
            time.sleep(0.05)
            gc.collect()

    def work(self, told: Connection) -> None:
        """Work, as `told` says."""
        self.received.mkdir(exist_ok=True)
        for whole in self.received.glob("whole-*"):  # by a worker that was killed before it had looked at it
            whole.unlink()
        threading.Thread(target=self.watch, name="watch", daemon=True).start()
        Server(self.config.path("worker", self.config.number), self.answer)
        before = resources()
        pullers = [threading.Thread(target=self.pull_all, args=(n,), name=f"pull-{n}") for n in range(PULLERS)]
        told.send("ready")
        for puller in pullers:
            puller.daemon = True
            puller.start()
        leaves = told.recv() == "leave"
        self.over.set()
        if leaves:
            self.links.close()
            return
        for puller in pullers:
            puller.join(DEADLINE)
            if puller.is_alive():
                self.journal.violation(f"HANGS {puller.name} did not end")
                faulthandler.dump_traceback()
        told.send("pulled")
        told.recv()
        self.look_at_rest(before)
        told.send("looked")
        told.recv()


def _threads(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


def start(config: Config, told: Connection) -> None:
    """What the process of a worker does; see `Worker.work`. It ends at once, whatever is still going on in it."""
    log = os.open(config.path("log", config.number), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.dup2(log, sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {config.life} %(levelname)s %(message)s")
    code = 0
    try:
        Worker(config).work(told)
    except EOFError:  # the run is gone
        pass
    except BaseException:  # noqa: BLE001 - it is in the log
        traceback.print_exc()
        code = 1
    os._exit(code)
