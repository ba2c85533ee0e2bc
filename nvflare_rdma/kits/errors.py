"""Why a start-up kit can't be read or changed."""

from __future__ import annotations

from nvflare_rdma.errors import ConfigError


class KitError(ConfigError):
    """A start-up kit can't be read or changed, or a value for it is wrong. Nothing was changed.

    Args:
        code: an upper-case name that stays the same, for programs.
        message: the thing, its value and the reason.
        hint: what to do about it.
    """

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code, self.hint = code, hint
