"""Files that are written together, or not at all."""

from __future__ import annotations

import contextlib
import difflib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvflare_rdma.durable import sync_folder
from nvflare_rdma.kits.errors import KitError

_NEW_MODE = 0o644


@dataclass(frozen=True)
class Change:
    """What becomes of a file.

    Attributes:
        path: the file.
        before: what is in it; None if it does not exist.
        after: what is to be in it; None if it is to be removed.
        like: whose mode and owner a new file gets.
        told: whether its lines are for the operator's eyes.
    """

    path: Path
    before: bytes | None
    after: bytes | None
    like: Path | None = None
    told: bool = True

    @property
    def diff(self) -> str:
        """Unified, with the file's name; "" if it is not for the operator's eyes."""
        if not self.told:
            return ""
        old, new = (data.decode(errors="replace").splitlines() if data else [] for data in (self.before, self.after))
        source, target = ("/dev/null" if data is None else str(self.path) for data in (self.before, self.after))
        return "\n".join(difflib.unified_diff(old, new, source, target, lineterm=""))


def write(changes: Sequence[Change]) -> None:
    """Write all of it, in this order, each file as a whole. If one can't be written, those before it are put back.

    Everything that takes room is written beside the files first, so that only names are left to be changed.

    Raises:
        KitError: a file can't be written, has changed meanwhile, or is to become two different things; then all are as
            they were.
    """
    changes = _each_once(changes)
    staged: list[_Staged] = []
    path = Path()
    try:
        for change in changes:
            path = change.path
            staged.append(_Staged(change))
            staged[-1].prepare()
        for each in staged:
            path = each.change.path
            each.take_effect()
        for folder in {each.path.parent for each in staged}:
            sync_folder(folder)
    except OSError as error:
        kept = [left for each in reversed(staged) if (left := each.put_back())]
        told = f", but {', '.join(kept)} could not be put back" if kept else ", and nothing was changed"
        raise KitError(
            "CANT_WRITE",
            f"{path} can't be written: {error.strerror or error}{told}",
            "run this as whoever owns the kit, and see that its disk has room and may be written to",
        ) from error
    except BaseException:
        for each in reversed(staged):
            each.put_back()
        raise
    finally:
        for each in staged:
            each.clean()


def _each_once(changes: Sequence[Change]) -> list[Change]:
    """Return the changes without those that are the same as an earlier one: kits may share a file by a link.

    Raises:
        KitError: two of them make different things of one file. The second would undo the first, and what records say
            of it would not be so.
    """
    first: dict[Path, Change] = {}
    for change in changes:
        other = first.setdefault(change.path.resolve(), change)
        if other.after != change.after:
            raise KitError(
                "SHARED_FILE",
                f"{other.path} and {change.path} are one file by a link, and would get different contents, so nothing "
                "was changed",
                "put a copy of the file in the place of the link, so that each kit has its own",
            )
    return list(first.values())


class _Staged:
    """A change that has been written beside its file, with what was there."""

    def __init__(self, change: Change) -> None:
        self.change = change
        self.path = change.path.resolve()  # a link stays one
        self._new: str | None = None
        self._old: str | None = None
        self._done = False

    def prepare(self) -> None:
        """Write what takes room."""
        now = self.path.read_bytes() if self.path.exists() else None
        if now != self.change.before:
            raise KitError("CHANGED_MEANWHILE", f"{self.path} has changed while this ran", "run it again")
        like = self.path if now is not None else self.change.like
        if self.change.after is not None:
            self._new = self._beside(self.change.after, like)
        if now is not None:
            self._old = self._beside(now, like)

    def take_effect(self) -> None:
        """Give the new file the name; the old one, which is kept beside it, has none any more."""
        if self._new is not None:
            os.replace(self._new, self.path)
            self._new = None
        elif self._old is not None:
            self.path.unlink()
        self._done = True

    def put_back(self) -> str:
        """Make it as it was. Returns what could not be put back, and where its old content is; "" if all is well."""
        if not self._done:
            return ""
        try:
            if self._old is not None:
                os.replace(self._old, self.path)
            else:
                self.path.unlink(missing_ok=True)
        except OSError:
            left, self._old = self._old, None
            return f"{self.path} (it was: {left})" if left else str(self.path)
        self._old, self._done = None, False
        return ""

    def clean(self) -> None:
        """Remove what is left beside the file."""
        for path in (self._new, self._old):
            if path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def _beside(self, data: bytes, like: Path | None) -> str:
        number, path = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".tmp")
        try:
            with os.fdopen(number, "wb") as file:
                _make_like(file.fileno(), like)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)
            raise
        return path


def _make_like(number: int, like: Path | None) -> None:
    if like is None:
        os.fchmod(number, _NEW_MODE)
        return
    model = like.stat()
    for owner in ((model.st_uid, model.st_gid), (-1, model.st_gid)):
        with contextlib.suppress(PermissionError):
            os.fchown(number, *owner)
            break
    os.fchmod(number, model.st_mode & 0o7777)
