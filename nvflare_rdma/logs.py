"""Log lines that nobody else can write: what comes from a peer or from a file is escaped in them."""

from __future__ import annotations

import logging
import time
from numbers import Number
from typing import Any


def escaped(value: object) -> str:
    """Return `value` as text for a log line or an error.

    Line breaks, control and other characters that are not printed are written as in a Python string: so nobody can add
    a line of his own, or give orders to the terminal that shows it, with the name of a tensor, file, site or task.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _Escaped:
    """An argument of a log line. What it is for `%s` and for `%r` is escaped when the line is written."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return escaped(self._value)

    def __repr__(self) -> str:
        return escaped(repr(self._value))


class _EscapingLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger whose arguments are data: they are escaped. What is to be laid out stands in the message itself."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.isEnabledFor(level):
            safe = [arg if isinstance(arg, Number) else _Escaped(arg) for arg in args]
            kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # the line is the caller's
            # Whole, without arguments: where a line has "[name=value]: " in it, FLARE's formatter takes that for its
            # own, puts what is left in place of the format, and then fails on the arguments.
            self.logger.log(level, str(msg) % tuple(safe) if safe else msg, **kwargs)


class Seldom:
    """For a line that others can bring about as often as they like: it is due once in `seconds`."""

    def __init__(self, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._next = 0.0

    def level(self, level: int) -> int:
        """The level at which the line is logged now: `level` if it is due, else that of details (DEBUG)."""
        now = time.monotonic()
        if now < self._next:
            return logging.DEBUG
        self._next = now + self._seconds  # without a lock: two threads at once may both log, and a fork holds none
        return level


def get_logger(name: str) -> logging.LoggerAdapter[logging.Logger]:
    """Return the logger of a module of this package; `name` is its `__name__`."""
    return _EscapingLogger(logging.getLogger(name), {})
