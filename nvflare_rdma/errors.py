"""The package's one exception hierarchy.

Messages name the thing, the value, the reason and the fix. `RdmaError` subclasses also derive from the
built-in that a caller of FLARE's own component would expect, so that existing `except ValueError` code
keeps working.
"""

from __future__ import annotations

from nvflare_rdma.logs import escaped


class RdmaError(Exception):
    """Base of every error that nvflare-rdma raises on purpose. Its text is escaped: it may name what a peer has sent,
    and somebody will log it."""

    def __str__(self) -> str:
        return escaped(super().__str__())


class ConfigError(RdmaError, ValueError):
    """A setting, URL, argument or job config is wrong. Raised before anything is changed."""


class FabricError(RdmaError, OSError):
    """A fabric (the means of moving bytes) failed: a rail broke, a device or socket call was refused."""


class FabricUnavailable(FabricError):  # noqa: N818 - a public name of the first release
    """A fabric can't be used here; the message says why and what would make it usable."""


class UnreachableError(FabricUnavailable):
    """Nothing answers at an address: a firewall drops what is sent there, or there is no such host."""


class ProtocolError(RdmaError):
    """The peer broke the channel protocol. The connection is closed; nothing of the message is kept."""


class LocalProtocolError(RdmaError, RuntimeError):
    """This side asked for a transition that the channel's state table does not allow: a bug of the caller."""


class TransferError(RdmaError):
    """One transfer failed (cancelled, timed out, link lost); the connection may live on."""


class SendTimeoutError(TransferError, TimeoutError):
    """The peer took nothing of what waits for it within the send timeout."""


class IntegrityError(TransferError):
    """A chunk's contents do not match its seal or checksum."""


class SourceError(TransferError, OSError):
    """A file that is being sent can't be read, or has changed meanwhile."""


class StorageError(TransferError, OSError):
    """A received file can't be kept: the disk is full, or refuses it."""


class TlsError(RdmaError, ConnectionError):
    """The peers could not agree on TLS: a certificate is missing, expired, of another authority or of another peer."""


class CodecError(RdmaError, ValueError):
    """A tensor can't be encoded or decoded: wrong dtype, length, or damaged metadata."""


class UnrepresentableError(CodecError):
    """A tensor holds a value that the codec can't carry within its error bound; send that tensor exact."""


class UnsupportedVersionError(RdmaError, ImportError):
    """The installed FLARE is not a version whose internals this package knows."""
