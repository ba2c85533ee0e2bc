"""FLARE's decomposers of torch tensors and numpy arrays, whose items move over a link where there is one.

    sender     serialize -> `to_downloadable` makes a FLARE Downloadable that also answers direct requests
    receiver   deserialize -> `download`: the reference says that the sender has this package: `receiver.Pull`,
               then FLARE's own `download_object`, which finds everything delivered and does the confirming;
               or, if there is no direct way, does the moving as well

So FLARE's transactions, budgets, confirmations and callbacks see a transfer as they always do, and a receiver
without this package is served in FLARE's way. See `nvflare.fuel.utils.fobs.decomposers.via_downloader`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nvflare.apis.signal import Signal
from nvflare.app_common.decomposers.numpy_decomposers import NumpyArrayDecomposer
from nvflare.app_common.np.np_downloader import ArrayDownloadable
from nvflare.fuel.f3.streaming.cacheable import ItemConsumer
from nvflare.fuel.f3.streaming.download_service import ProduceRC, download_object, request_download_chunk
from nvflare.fuel.f3.streaming.transfer_outcome import DownloadStatus
from nvflare.fuel.utils.fobs import FOBSContextKey

from nvflare_rdma.codecs import dtype_name, is_loadable, is_torch
from nvflare_rdma.errors import RdmaError, TransferError
from nvflare_rdma.flare_compat import (
    MessageForDownload,
    PrefixedReferences,
    ResultLost,
    abortable_download,
    add_download_progress,
    cancel_download,
    download_logged_as,
    sender_of_result,
)
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.fallback import download_by_fallback, finish
from nvflare_rdma.streaming.progress import DirectProgress
from nvflare_rdma.streaming.relay import RelayConsumer, produce
from nvflare_rdma.streaming.requests import PlainRequests, RequestFunction, answer_seconds, request_function
from nvflare_rdma.transfer import (
    AbortedError,
    EndedError,
    Item,
    Land,
    Meter,
    Meters,
    PeerLinks,
    Pull,
    Service,
    TensorContent,
    TensorDestination,
    in_memory,
    unpack_manifest,
)

log = get_logger(__name__)

#: A reference that begins with this is to tensors whose sender answers direct requests.
REF_PREFIX = "rdma1-"
#: Where requests and answers are in the state that FLARE's download messages carry.
STATE_KEY = "nvflare_rdma"


class Served:
    """A mixin for a FLARE `CacheableObject`, before it, that answers direct requests. All others are FLARE's to
    answer."""

    def serve(self, tensors: Mapping[str, Any], cell: Any) -> None:
        """Answer requests for `tensors` (FLARE's item id -> tensor) that reach `cell`. To be called first."""
        self._ref_id = ""
        names = {dtype_name(each) for each in tensors.values() if is_torch(each)}
        self._not_loadable = sorted(name for name in names if not is_loadable(name))
        ours = shared()
        meters = Meters(cell.get_fqcn() if cell is not None else "", ledger=ours.ledger)
        content = TensorContent(tensors, cache=ours.encoded_chunks)
        self._service = Service(content, functools.partial(ours.links.of, cell), self._moved, meters, ours.notices)
        ours.services.add(self._service)

    def set_transaction(self, tx_id: str, ref_id: str) -> None:
        """FLARE's hook: the object belongs to this transaction and has this reference."""
        super().set_transaction(tx_id, ref_id)  # type: ignore[misc]
        self._ref_id = ref_id

    def produce(self, state: dict[str, Any] | None, requester: str) -> tuple[str, Any, dict[str, Any]]:
        """FLARE's hook: the answer to a message of `requester`, direct request or not."""
        if state and STATE_KEY in state:
            return ProduceRC.OK, [], {STATE_KEY: self._service.answer(state[STATE_KEY], requester)}
        if not state and self._service.has_served(requester):
            return ProduceRC.EOF, None, {}
        meters = self._service.meters
        if not state:
            if meters.find(requester) is None:  # it did not ask directly before
                log.log(
                    shared().notices.level("sent", requester, ""),
                    "tensors go to %s on FLARE's own path, as later ones will: it asks for no other way, because its "
                    "part of the job has no RdmaTransfer, or because it found no direct way, which its log says",
                    requester,
                )
            meters.begin(requester).fall_back("the receiver asked on FLARE's own path")
        if (relayed := self._service.relayed(requester)) is not None:
            answer = produce(relayed, state)
        else:
            if not state:
                self._service.say_what_is_not_encoded(requester)
                self._say_what_can_not_be_loaded(requester)
            answer = super().produce(state, requester)  # type: ignore[misc]
        if (meter := meters.find(requester)) is not None:
            meter.wire_bytes += sum(map(len, answer[1] or ()))
        return answer

    def _say_what_can_not_be_loaded(self, requester: str) -> None:
        """Log which tensors FLARE's own path doesn't bring: what the receiver says of it names no tensor."""
        if self._not_loadable:
            log.error(
                "tensors of dtype %s will not reach %s: it takes FLARE's own path, where the safetensors library can't "
                "load them; give its part of the job RdmaTransfer, or send them as uint8 (tensor.view(torch.uint8))",
                ", ".join(self._not_loadable),
                requester,
            )

    def downloaded_to_one(self, to_receiver: str, status: str) -> None:
        """FLARE's hook: a receiver has everything, or will not have it."""
        failure = "" if status == DownloadStatus.SUCCESS else "the receiver did not get it on FLARE's own path"
        self._service.ended(to_receiver, failure)
        super().downloaded_to_one(to_receiver, status)  # type: ignore[misc]

    def release(self) -> None:
        """FLARE's hook: nobody will ask any more."""
        self._service.close()
        super().release()  # type: ignore[misc]

    def _moved(self, receiver: str, nbytes: int, count: int) -> None:
        add_download_progress(self._ref_id, receiver, nbytes, count)


class ServedArrays(Served, ArrayDownloadable):
    """FLARE's `ArrayDownloadable` (numpy arrays), which also answers direct requests."""


class _Delivered(ItemConsumer):
    """Consumes a download of which everything is here already: FLARE only has to confirm it."""

    def consume_items(self, items: list[Any], result: Any) -> Any:
        # The link broke before the sender had heard that they arrived.
        log.warning("received %d tensors again on FLARE's own path; duplicates ignored", len(items))


@dataclass(frozen=True)
class Landing:
    """Where a message's tensors are received. `land` makes the place of each, which takes `nbytes` of memory; `give`
    makes what the application is given from what the places gave, by item id."""

    land: Land
    give: Callable[[Any], Any] = lambda items: items
    nbytes: Callable[[Item], int] = lambda item: item.nbytes


class DirectDecomposer(PrefixedReferences, MessageForDownload):
    """A mixin for a `ViaDownloaderDecomposer`, before it, that moves items over links. `served` is the class of its
    downloadable objects, which has `Served`."""

    reference_prefix = REF_PREFIX
    served: Callable[..., Any]

    def to_downloadable(self, items: dict[str, Any], max_chunk_size: int, fobs_ctx: dict[str, Any]) -> Any:
        """FLARE's hook on the sending side: the object from which receivers download `items`."""
        downloadable = self.served(items, max_chunk_size)
        downloadable.serve(items, fobs_ctx.get(FOBSContextKey.CELL))
        return downloadable

    def download(  # noqa: PLR0913 - the signature is FLARE's
        self,
        from_fqcn: str,
        ref_id: str,
        per_request_timeout: float,
        cell: Any,
        secure: bool = False,
        optional: bool = False,
        abort_signal: Any = None,
        progress_cb: Callable[..., None] | None = None,
        message: Any = None,
        **others: Any,
    ) -> tuple[str | None, Any]:
        """FLARE's hook on the receiving side. Returns an error or None, and the items by id.

        Raises:
            ResultLost: `message` brings a server a site's result, and the site's process that sent it has ended.
        """
        links = shared().links.of(cell) if ref_id.startswith(REF_PREFIX) else None
        common = {"from_fqcn": from_fqcn, "ref_id": ref_id, "per_request_timeout": per_request_timeout, "cell": cell}
        common |= {"secure": secure, "optional": optional}
        flares = functools.partial(super().download, **common, **others)  # type: ignore[misc]
        meter = Meter("received", cell.get_fqcn(), from_fqcn, ledger=shared().ledger)

        def fall_back(reason: str, progress_cb: Callable[..., None] | None, abort: Any) -> tuple[str | None, Any]:
            return download_by_fallback(meter, reason, functools.partial(flares, abort_signal=abort), progress_cb)

        if links is None:
            direct = ref_id.startswith(REF_PREFIX)
            reason = "this process has no data links" if direct else "the sender answers no direct requests"
            _say_fallback(from_fqcn, reason if direct else f"{reason}, because its part of the job has no RdmaTransfer")
            return fall_back(reason, progress_cb, abort_signal)
        meter.budget = links.budget.watch()

        progress = DirectProgress(ref_id, progress_cb)
        with (
            abortable_download(cell, from_fqcn, ref_id, abort_signal) as signal,
            self.landing(cell, from_fqcn, others) as landing,
        ):
            ask = _download_request_function(signal, **common)
            destination = TensorDestination(landing.land)
            pull = Pull(links, from_fqcn, ask, destination, lambda: signal.triggered, progress.moved, meter)
            failure: str | None = None
            try:
                items = landing.give(pull.run(confirmed=True))
            except AbortedError as error:
                log.warning("%s", error)
                cancel_download(cell, from_fqcn, ref_id, secure, optional)
                progress.finish(state="aborted")
                failure = str(signal.value or error)
                finish(meter, failure, pull.tensors)
                return failure, None
            except EndedError as error:
                # FLARE's own path would ask the same process, for forty minutes.
                failure = str(error)
                log.error("tensors from %s will not come: %s", from_fqcn, failure)
                progress.finish(state="failed")
                finish(meter, failure, pull.tensors)
                if _nobody_waits(sender_of_result(message), from_fqcn, links):
                    raise ResultLost(failure) from error
                return failure, None
            except (RdmaError, MemoryError) as error:
                _say_fallback(from_fqcn, error)
                if any(item.needs_relay for item in pull.tensors):
                    take = functools.partial(download_object, progress_cb=progress.go_on, abort_signal=signal)
                    meter.fall_back(str(error))
                    return _download_encoded(ask, landing, functools.partial(take, **common), meter)
                failure, items = fall_back(str(error), progress.go_on, signal)
                if not failure and items is None:
                    failure = "the sender takes them for delivered"
                return failure, items
            shared().tensor_memory.keep_for(map(landing.nbytes, pull.tensors))
            delivered = _Delivered()
            with download_logged_as(meter.wire_bytes, meter.seconds):
                download_object(consumer=delivered, progress_cb=progress.finish, abort_signal=signal, **common)
            finish(meter, delivered.error, pull.tensors)
            return delivered.error, items

    @contextlib.contextmanager
    def landing(self, cell: Any, sender: str, others: dict[str, Any]) -> Iterator[Landing]:
        """Where the tensors of one message of `sender` are received: in memory, unless a subclass says otherwise."""
        yield Landing(in_memory(shared().tensor_memory.take))


def _nobody_waits(submitter: str, source: str, links: PeerLinks) -> bool:
    """Whether nobody waits for an answer to a result of which `source`, which has ended, has the tensors: the process
    that sent it, if any did, has ended, too. A trainer's result is sent by its job process."""
    if not submitter:
        return False
    return submitter == source or (source.startswith(f"{submitter}.") and links.has_ended(submitter))


def _say_fallback(peer: str, reason: object) -> None:
    log.log(
        shared().notices.level("received", peer, reason), "tensors from %s come on FLARE's own path: %s", peer, reason
    )


def _download_encoded(
    ask: RequestFunction, landing: Landing, take: Callable[..., None], meter: Meter
) -> tuple[str | None, Any]:
    """Download tensors through FLARE's messages as they would come over a link, encoded or not; `take` is FLARE's
    download."""
    failure: str | None = None
    items, result = [], None
    try:
        answer = ask({"do": "relay"})
        if not isinstance(answer, Mapping) or "manifest" not in answer:
            raise TransferError(f"the sender can't relay: {answer}")
        items = unpack_manifest(answer["manifest"])
        consumer = RelayConsumer(items, landing.land)
        take(consumer=consumer)
        failure, meter.wire_bytes = consumer.error, meter.wire_bytes + consumer.nbytes
        result = None if failure else landing.give(consumer.result)
    except (RdmaError, OSError, MemoryError) as error:
        failure = str(error)
    finish(meter, failure, items)
    return failure, result


def known_as(original: type) -> Callable[[type], type]:
    """A class decorator that gives a decomposer the name of FLARE's `original`.

    FLARE writes a decomposer's class into its messages, where a peer without this package has to know it.
    """

    def named(cls: type) -> type:
        cls.__module__, cls.__qualname__ = original.__module__, original.__qualname__
        return cls

    return named


@known_as(NumpyArrayDecomposer)
class RdmaArrayDecomposer(DirectDecomposer, NumpyArrayDecomposer):
    """FLARE's `NumpyArrayDecomposer`, whose arrays move over links."""

    served = ServedArrays


def torch_decomposer() -> Any:
    """The decomposer of torch tensors. The call imports torch."""
    from nvflare_rdma.streaming.torch_decomposer import RdmaTensorDecomposer

    return RdmaTensorDecomposer()


def _download_request_function(
    signal: Signal, *, cell: Any, from_fqcn: str, per_request_timeout: float, **common: Any
) -> RequestFunction:
    """A function that sends requests to a sender in the state of FLARE's download messages, until `signal` is
    triggered: then it raises `AbortedError`."""
    prompt = {**common, "from_fqcn": from_fqcn, "cell": PlainRequests(cell), "abort_signal": signal}

    def send(request: dict[str, Any]) -> Any:
        seconds = min(per_request_timeout, answer_seconds(request))
        reply = request_download_chunk(state={STATE_KEY: request}, per_request_timeout=seconds, **prompt)
        if signal.triggered:
            raise AbortedError(f"the transfer from {from_fqcn} was aborted")
        return reply

    ask_again = request_function(from_fqcn, send)

    def ask(request: dict[str, Any]) -> Any:
        payload = ask_again(request)
        state = payload.get("state") if isinstance(payload, dict) else None
        return state.get(STATE_KEY) if isinstance(state, dict) else None

    return ask
