"""Chooses the type of a message by the link that it goes over: the best one that is there in time, or that is small
enough."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nvflare_rdma.codecs import EXACT, Policy, dtype_name, identity, is_encodable, is_plain, is_tensor
from nvflare_rdma.errors import ConfigError

AUTO = "auto"
#: The types that are chosen from, the most exact first, and the relative error of normally distributed values.
TYPES = {EXACT: 0.0, "bfloat16": 0.0017, "int8": 0.0084, "normfloat4_e4m3": 0.088}
#: The codec of a policy whose default is `EXACT`: metadata has to name one.
NAMED = "bfloat16"
MB = 1e6
#: A better type than the last message's is chosen if it takes at most this share of the time that there is. So a rate
#: that differs a little from round to round does not change the type each time.
_SPARE = 0.8


class Rates(Protocol):
    """Knows how fast messages go to a site, or to the server."""

    def to(self, site: str) -> float | None:
        """Bytes a second, None if nothing has gone there or come from there yet."""


@dataclass(frozen=True)
class Limits:
    """How long a round's traffic at a site may take, and how many bytes it may have, down and up together; None where
    there is no limit. Each way has half of it."""

    seconds: float | None = None
    nbytes: int | None = None

    def of_one_way(self, messages: int = 1) -> tuple[float, float]:
        """The seconds and bytes that one of so many messages of a way has; infinite where there is no limit."""
        seconds, nbytes = (
            math.inf if limit is None else limit / (2 * messages) for limit in (self.seconds, self.nbytes)
        )
        return seconds, nbytes


@dataclass(frozen=True)
class Choice:
    """A type, and why it was chosen."""

    quantization_type: str
    reason: str


class Autopilot:
    """Chooses for one quantizer.

    Args:
        policy: its rules; what none of them fits gets the type that is chosen.
        limits: for a round's traffic.
        error: the largest relative error, None for any. Types that lose more of normally distributed values are left
            out.
    """

    def __init__(self, policy: Policy, limits: Limits, error: float | None = None) -> None:
        self.limits = limits
        self.types = [name for name, lost in TYPES.items() if error is None or lost <= error]
        #: By type, the most exact first.
        self.policies = {name: policy.with_type(name) for name in self.types}
        self._lock = threading.Lock()
        #: The type of the last message, by where it went.
        self._last: dict[tuple[str, ...], str] = {}

    def choose(
        self, values: Mapping[str, Any], to: tuple[str, ...], rates: Rates | None, messages: int = 1
    ) -> tuple[Choice, bool]:
        """Choose the type of a message.

        Args:
            values: what it has in it, by name.
            to: where it goes, the last of it the name of the site or server; the choice for the next one there depends
                on this one.
            rates: what is known of links; None where nothing measures them.
            messages: how many there are of which each has its share of the limits.

        Returns:
            The choice, and whether it is news: another one than for the last message.
        """
        sizes = {name: sent_nbytes(values, policy) for name, policy in self.policies.items()}
        rate = rates.to(to[-1]) if rates is not None else None
        with self._lock:
            last = self._last.get(to)
            if self.limits.seconds is None or rate is not None:
                choice = choose_type(sizes, self.limits, rate, last, messages)
            else:
                name = self.types[-1]
                known = (
                    "there is no RdmaTransfer" if rates is None else "no transfer has told yet how fast this link is"
                )
                choice = Choice(name, f"{_about(name, sizes[name])}: {known}, and it is the smallest")
            self._last[to] = choice.quantization_type
        return choice, choice.quantization_type != last


def choose_type(
    sizes: Mapping[str, int], limits: Limits, rate: float | None, last: str | None = None, messages: int = 1
) -> Choice:
    """Choose one of the types of which the bytes on the way are given, the best first. `last` is that of the last
    message, None if there was none. Without a rate, seconds are no limit."""
    most_seconds, most_bytes = limits.of_one_way(messages)
    timed = rate is not None and limits.seconds is not None
    better = last in sizes  # than the last message's, as long as that is not passed
    tight, told = False, []
    for name, nbytes in sizes.items():
        better = better and name != last
        seconds = nbytes / rate if rate is not None and timed else 0.0
        told.append(_about(name, nbytes, seconds if timed else None))
        within = nbytes <= most_bytes and seconds <= most_seconds
        fits = within and (not better or seconds <= most_seconds * _SPARE)
        if fits:
            break
        tight = tight or within
    given = [f"{most_seconds:.3g} s"] if timed else []
    given += [f"{most_bytes / MB:.3g} MB"] if limits.nbytes is not None else []
    at = f" at {rate / MB:.3g} MB/s" if rate is not None and timed else ""
    why = "it is the best one within that" + (" which leaves time to spare" if tight else "")
    *others, chosen = told
    instead = f", not {'; '.join(others)}" if others else ""
    return Choice(
        name,
        f"{chosen}{instead}: each way has {' and '.join(given)}{at}, and "
        f"{why if fits else 'it is the smallest, and still too much'}",
    )


def _about(name: str, nbytes: int, seconds: float | None = None) -> str:
    took = "" if seconds is None else f" in {seconds:.3g} s"
    lost = f"relative error about {TYPES[name]:.2g}" if TYPES[name] else "nothing lost"
    return f"{name} ({nbytes / MB:.3g} MB{took}, {lost})"


def sent_nbytes(values: Mapping[str, Any], policy: Policy) -> int:
    """Return how many bytes the tensors of a message take with a policy, tied ones once."""
    total, seen = 0, set()
    for name, value in values.items():
        if not (is_tensor(value) and is_plain(value)) or (key := identity(value)) in seen:
            continue
        seen.add(key)
        n = math.prod(value.shape)
        codec = policy.decide(name, dtype_name(value), tuple(value.shape)).codec if is_encodable(value) else None
        total += value.nbytes if codec is None else min(codec.encoded_nbytes(n), value.nbytes)
    return total


def checked_limits(quantization_type: Any, seconds: Any, nbytes: Any, options: Mapping[str, Any]) -> Limits | None:
    """Return the limits of `round_seconds` and `round_bytes`; None where the type is not chosen by the link.

    Raises:
        ConfigError: there is neither of them, one is no time or number of bytes, or is without use; or options that
            belong to one type are given.
    """
    automatic = isinstance(quantization_type, str) and quantization_type.lower() == AUTO
    given = {"round_seconds": seconds, "round_bytes": nbytes}
    if not automatic:
        if useless := [f"{name}={value!r}" for name, value in given.items() if value is not None]:
            raise ConfigError(
                f"{', '.join(useless)} has no effect with "
                f"quantization_type {quantization_type!r}; leave it out or use '{AUTO}'"
            )
        return None
    if seconds is None and nbytes is None:
        raise ConfigError(
            f"quantization_type '{AUTO}' needs round_seconds, how long a round's traffic may take, such as 60, or "
            "round_bytes, how many bytes it may have, such as 100_000_000"
        )
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        if number and name == "round_bytes" and value != int(value):
            raise ConfigError(f"{name}={value!r} is no limit for '{AUTO}': give a whole number of bytes, at least 1")
        if value is not None and not number:
            raise ConfigError(
                f"{name}={value!r} is no limit for '{AUTO}': give a number above 0, such as "
                f"{60 if name == 'round_seconds' else '100_000_000'}"
            )
    if used := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"{', '.join(used)} can't be used with quantization_type '{AUTO}': messages to one site may be of another "
            "type than those to others, or than the last one; leave it out or name a type"
        )
    return Limits(None if seconds is None else float(seconds), None if nbytes is None else int(nbytes))
