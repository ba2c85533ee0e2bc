"""FLARE's `FileStreamer`, whose files go from disk to disk over links: see `sender` and `transfer.files`."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import uuid
from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReturnCode, Shareable
from nvflare.apis.streaming import StreamableEngine
from nvflare.app_common.streamers import file_retriever as flare_retriever
from nvflare.app_common.streamers import file_streamer as flare
from nvflare.fuel.utils.validation_utils import check_positive_int, check_positive_number

from nvflare_rdma.codecs import warm_up
from nvflare_rdma.errors import IntegrityError, ProtocolError, RdmaError, StorageError
from nvflare_rdma.logs import get_logger
from nvflare_rdma.runtime import shared
from nvflare_rdma.streaming.streams import sender
from nvflare_rdma.streaming.streams.messages import PREFIX
from nvflare_rdma.streaming.streams.receiver import Receiving, register
from nvflare_rdma.transfer import AbortedError, Meter, Meters, PeerLinks, Service
from nvflare_rdma.transfer.files import (
    FileContent,
    FileIdentity,
    FileTarget,
    OpenFile,
    codec_for_files,
    forget,
    plan,
    pull_file,
)

log = get_logger(__name__)

_CHUNK_TIMEOUT = 5.0
_IDENTITY = PREFIX + "file"


class FileStreamer(flare.FileStreamer):
    """Streams files, with the methods, arguments, callbacks and results of FLARE's.

    What arrives is compared with what was read (xxh3-128 of each part), and appears under its name, a random one in
    `dest_dir` as FLARE's, when all of it is on disk. If the transfer is interrupted, also by the end of a process,
    the next one of the same file (name, size, time of change, samples of its content) from the same site to the same
    `dest_dir` goes on from what is there under a hidden name, as far as the sender has the same. Too little room on the
    disk is an error before bytes move, and nothing is left of the file.
    """

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    @staticmethod
    def register_stream_processing(
        fl_ctx: FLContext,
        channel: str,
        topic: str,
        dest_dir: str | None = None,
        stream_done_cb: Any = None,
        chunk_consumed_cb: Any = None,
        **cb_kwargs: Any,
    ) -> None:
        """See FLARE's. `chunk_consumed_cb` is called for the stream's messages: every few seconds, and at the end."""
        folder = dest_dir if dest_dir else tempfile.gettempdir()
        flare.FileStreamer.register_stream_processing(
            fl_ctx, channel, topic, folder, stream_done_cb, chunk_consumed_cb, **cb_kwargs
        )
        callbacks = {"stream_done_cb": stream_done_cb, "consumed_cb": chunk_consumed_cb, **cb_kwargs}
        make = functools.partial(FileReceiving, folder=folder)
        register(fl_ctx.get_engine(), channel, topic, make, callbacks)

    @staticmethod
    def stream_file(  # noqa: PLR0913 - the signature is FLARE's
        channel: str,
        topic: str,
        stream_ctx: Any,
        targets: list[str],
        file_name: str,
        fl_ctx: FLContext,
        chunk_size: int | None = None,
        chunk_timeout: float | None = None,
        optional: bool = False,
        secure: bool = False,
        quantization_type: str | None = None,
    ) -> tuple[str, Any]:
        """See FLARE's. `chunk_size` is that of FLARE's own path; over a link, receivers choose. A chunk's timeout is
        that of a message; the file may take as long as it moves.

        Args:
            quantization_type: a codec's name, as `nvflare_rdma.filters.ModelQuantizer` takes it: the tensors of a
                safetensors file travel encoded, and what appears has the same header and size, and their decoded
                values. Tensors that the codec can't carry, those of up to 16 KiB, and all on FLARE's own path, travel
                exact. None: the file as it is.

        Raises:
            SourceError: it can't be read, or encoded. ConfigError: an unknown type, or one whose sizes are not known
                before (`lossless`, `adaquant`).
        """
        if not os.path.isfile(file_name):
            raise ValueError(f"file {file_name} is not a valid file")
        if chunk_size:
            check_positive_int("chunk_size", chunk_size)
        if not chunk_timeout:
            chunk_timeout = _CHUNK_TIMEOUT
        check_positive_number("chunk_timeout", chunk_timeout)
        if not isinstance(fl_ctx.get_engine(), StreamableEngine):
            raise RuntimeError(f"engine must be StreamableEngine but got {type(fl_ctx.get_engine())}")
        file = OpenFile(file_name, quantization_type or "")
        _warm_up(file.identity)
        stream_ctx = stream_ctx if stream_ctx else {}
        stream_ctx[flare.KEY_FILE_SIZE] = file.identity.size
        stream_ctx[flare.KEY_FILE_NAME] = file.identity.name

        def fallback(to: Any) -> Any:
            if quantization_type:
                log.warning(
                    "%s goes exact, not as %s: FLARE's own path has nothing that decodes", file_name, quantization_type
                )
            return flare.FileStreamer.stream_file(
                channel, topic, stream_ctx, to, file_name, fl_ctx, chunk_size, chunk_timeout, optional, secure
            )

        call = sender.StreamCall(
            fl_ctx,
            channel,
            topic,
            stream_ctx,
            extra={_IDENTITY: file.identity.pack()},
            targets=targets,
            what=file_name,
            timeout=chunk_timeout,
            optional=optional,
            secure=secure,
        )
        code, replies = sender.stream(call, lambda cell: _StreamedFile(file, cell), fallback)
        return code, replies if code == flare.ReturnCode.OK else False


def _warm_up(identity: FileIdentity) -> None:
    if identity.codec is not None:
        warm_up([identity.codec])


class _StreamedFile(sender.StreamedObject):
    def __init__(self, file: OpenFile, cell: Any) -> None:
        self._file = file
        ours = shared()
        meters = Meters(cell.get_fqcn(), "file", ours.ledger)
        self.service = Service(
            FileContent(file), functools.partial(ours.links.of, cell), meters=meters, notices=ours.notices
        )

    @property
    def broken(self) -> str:
        return self._file.broken


class FileReceiving(Receiving):
    """Receives a file into `folder`, under a name of its own."""

    kind = "file"

    def __init__(self, stream_ctx: dict[str, Any], site: str, sender_site: str, folder: str) -> None:
        self._identity = FileIdentity.unpack(stream_ctx.pop(_IDENTITY, None))
        announced = stream_ctx.get(flare.KEY_FILE_NAME), stream_ctx.get(flare.KEY_FILE_SIZE)
        if announced != (self._identity.name, self._identity.size):
            raise ProtocolError(f"a stream of {announced} offers {self._identity}")
        _warm_up(self._identity)
        self.size = 1, self._identity.size
        self._site, self._sender_site = site, sender_site
        self._folder = folder
        # As with FLARE's streams, callbacks know where the file will be.
        self._path = stream_ctx[flare.KEY_FILE_LOCATION] = os.path.join(folder, str(uuid.uuid4()))

    def run(
        self,
        links: PeerLinks,
        peer: str,
        ask: Callable[[dict[str, Any]], Any],
        aborted: Callable[[], bool],
        meter: Meter,
    ) -> None:
        """See `Receiving`."""
        target = FileTarget(self._identity, self._folder, self._path, self._site, self._sender_site)
        pull_file(links, peer, ask, target, aborted, meter)

    def may_fall_back(self, error: Exception) -> bool:
        """See `Receiving`. There is no use in it if the disk is full, or the data wrong."""
        hopeless = isinstance(error, StorageError | IntegrityError | ProtocolError | AbortedError)
        return isinstance(error, RdmaError) and not hopeless

    def dismiss(self) -> None:
        """See `Receiving`."""
        forget(self._folder, self._identity, self._site, self._sender_site)

    def undo(self) -> None:
        """See `Receiving`."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


class FileRetriever(flare_retriever.FileRetriever):
    """Gets a file from another site's `source_dir` into this one's `dest_dir`; as FLARE's.

    Args:
        source_dir: whose files others may ask for, also those in its subfolders; "" if this site only receives. FLARE
            takes that for the current folder, which in a job is that of the site's kit, with its keys.
        quantization_type: how this site sends files: see `FileStreamer.stream_file`.

    Raises:
        ConfigError: a type that files can't be sent as.
    """

    __module__ = "nvflare_rdma.streaming"  # the public name, which FLARE writes into exported jobs

    def __init__(  # noqa: PLR0913 - the signature is FLARE's
        self,
        source_dir: str,
        topic: str | None = None,
        stream_msg_optional: bool = False,
        stream_msg_secure: bool = False,
        dest_dir: str | None = None,
        chunk_size: int | None = None,
        chunk_timeout: float | None = None,
        quantization_type: str | None = None,
    ) -> None:
        if quantization_type:
            codec_for_files(quantization_type)
        super().__init__(source_dir, topic, stream_msg_optional, stream_msg_secure, dest_dir, chunk_size, chunk_timeout)
        self.quantization_type = quantization_type

    def register_stream_processing(
        self, channel: str, topic: str, fl_ctx: FLContext, stream_done_cb: Any, **cb_kwargs: Any
    ) -> None:
        """See FLARE's."""
        FileStreamer.register_stream_processing(fl_ctx, channel, topic, self.dest_dir, stream_done_cb, **cb_kwargs)

    def validate_request(self, request: Shareable, fl_ctx: FLContext) -> tuple[str, Any]:
        """See FLARE's. A file that can't be encoded is refused here, or who asks would wait for it."""
        if not self.source_dir:
            self.log_error(fl_ctx, "bad request: this site sends no files, as its source_dir is empty")
            return ReturnCode.BAD_REQUEST_DATA, None
        code, path = super().validate_request(request, fl_ctx)
        if code == ReturnCode.OK and self.quantization_type:
            file = OpenFile(path, self.quantization_type)
            plan(file.identity, file.tensors)
        return code, path

    def do_stream(
        self, target: str, request: Shareable, fl_ctx: FLContext, stream_ctx: Any, validated_data: Any
    ) -> Any:
        """See FLARE's."""
        return FileStreamer.stream_file(
            channel=self.stream_channel,
            topic=self.topic,
            stream_ctx=stream_ctx,
            targets=[target],
            file_name=validated_data,
            fl_ctx=fl_ctx,
            chunk_size=self.chunk_size,
            chunk_timeout=self.chunk_timeout,
            optional=self.stream_msg_optional,
            secure=self.stream_msg_secure,
            quantization_type=self.quantization_type,
        )
