"""Chooses the type of a message by the link that it goes over: the best one that is there in time."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from nvflare.apis.fl_context import FLContext

from nvflare_rdma.codecs import Policy, dtype_name, identity, is_encodable, is_plain, is_tensor
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.flare_compat import RATES_PROP

AUTO = "auto"
#: The types that are chosen from, the most exact first, and the relative error of normally distributed values.
TYPES = {"bfloat16": 0.0017, "int8": 0.0084, "normfloat4_e4m3": 0.088}
MB = 1e6


class Rates(Protocol):
    """Knows how fast messages go to a site, or to the server."""

    def to(self, site: str) -> float | None:
        """Bytes a second, None if nothing has gone there or come from there yet."""


@dataclass(frozen=True)
class Choice:
    """A type, and why it was chosen."""

    quantization_type: str
    reason: str


class Autopilot:
    """Chooses for one quantizer.

    Args:
        policy: its rules; what none of them fits gets the type that is chosen.
        seconds: how long a round's traffic may take, down and up together. Each way has half of it.
        limit: the largest relative error, None for any. Types that lose more of normally distributed values are left
            out, unless all do.
    """

    def __init__(self, policy: Policy, seconds: float, limit: float | None) -> None:
        self.types = [name for name, error in TYPES.items() if limit is None or error <= limit] or [next(iter(TYPES))]
        self.policies = {name: policy.with_type(name) for name in self.types}
        self._seconds = seconds / 2
        self._lock = threading.Lock()
        self._said: dict[tuple[str, str], str] = {}

    def choose(self, values: Mapping[str, Any], peer: str, fl_ctx: FLContext) -> Choice:
        """Choose the type of a message to `peer`."""
        rates: Rates | None = fl_ctx.get_prop(RATES_PROP)
        rate = rates.to(peer) if rates is not None else None
        if rate is None:
            known = (
                "no transfer has told yet how fast this link is" if rates is not None else "there is no RdmaTransfer"
            )
            return Choice(self.types[-1], f"{known}, and it is the smallest")
        told = []
        for name in self.types:
            nbytes = sent_nbytes(values, self.policies[name])
            seconds = nbytes / rate
            told.append(f"{name} {seconds:.3g} s")
            if seconds <= self._seconds:
                break
        why = (
            "the best one that is there in time" if seconds <= self._seconds else "the smallest, and not there in time"
        )
        return Choice(name, f"{', '.join(told)} of {self._seconds:.3g} s, at {rate / MB:.3g} MB/s; it is {why}")

    def news(self, task: str, peer: str, choice: Choice) -> str:
        """Return a line for the log if the choice is another one than for this peer's last message; else ""."""
        with self._lock:
            before = self._said.get((task, peer))
            self._said[task, peer] = choice.quantization_type
        if before == choice.quantization_type:
            return ""
        return (
            f"Messages of task '{task}' to {peer or 'the other side'} go in {choice.quantization_type}: {choice.reason}"
        )


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


def checked_seconds(quantization_type: Any, seconds: Any, options: Mapping[str, Any]) -> float | None:
    """Return `round_seconds`; None where the type is not chosen by the link.

    Raises:
        ConfigError: it is missing, no time, or without use; or options that belong to one type are given.
    """
    automatic = isinstance(quantization_type, str) and quantization_type.lower() == AUTO
    if not automatic:
        if seconds is not None:
            raise ConfigError(
                f"round_seconds={seconds!r} has no effect with quantization_type {quantization_type!r}; leave it out "
                f"or use '{AUTO}'"
            )
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ConfigError(
            f"quantization_type '{AUTO}' needs round_seconds, how long a round's traffic may take, such as 60, but it "
            f"is {seconds!r}"
        )
    if used := [name for name, value in options.items() if value]:
        raise ConfigError(
            f"{', '.join(used)} can't be used with quantization_type '{AUTO}': messages to one site may be of another "
            "type than those to others, or than the last one; leave it out or name a type"
        )
    return float(seconds)
