"""What people write on a command line, in units: rates, times, shares, and sites with their links."""

from __future__ import annotations

import re

from nvflare_rdma.errors import ConfigError

_NUMBER = r"(\d{1,12}(?:\.\d{1,12})?)"
#: Bits only: a B stands for bytes, and nobody knows which of them somebody meant by MB.
_RATE = re.compile(_NUMBER + r"\s*([kKmMgGtT]?)((?i:bit)(?:/s)?|bps)?")
_TIME = re.compile(_NUMBER + r"\s*(us|ms|s|min|m|h)")
_LOSS = re.compile(_NUMBER + r"\s*(%?)")
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_rate(text: str) -> float:
    """Bits/s, from a text such as "100Mbit", "1Gbit" or "30M".

    Raises:
        ConfigError: it is no rate, or it is 0.
    """
    match = _RATE.fullmatch(text.strip())
    bits = float(match[1]) * _BITS[match[2].lower()] if match and (match[2] or match[3]) else 0.0
    if not bits:
        raise ConfigError(f"rate {text!r} is none: write bits a second, as 100Mbit, 1Gbit or 30M")
    return bits


def parse_time(text: str, what: str) -> float:
    """Seconds, from a text such as "40ms", "60s", "5m" or "1h". `what` is the name of the value.

    Raises:
        ConfigError: it is no time.
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{what} {text!r} is no time with a unit: write it as 40ms, 60s, 5m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def parse_loss(text: str) -> float:
    """The share of the packets that are lost, from a text such as "0.1%" or "0.001".

    Raises:
        ConfigError: it is no share, or all of them.
    """
    match = _LOSS.fullmatch(text.strip())
    loss = float(match[1]) / (100.0 if match[2] else 1.0) if match else 1.0
    if loss >= 1.0:
        raise ConfigError(f"loss {text!r} is no share of the packets: write it as 0.1% or 0.001, less than all")
    return loss


def parse_site(text: str) -> tuple[str, float, float, float]:
    """Name, bits/s, seconds of a round trip, and share of the packets that are lost, from NAME=RATE,RTT[,LOSS].

    Raises:
        ConfigError: a part is missing or can't be read; the message names the site and the part.
    """
    name, equals, link = text.partition("=")
    parts = link.split(",")
    if not (name.strip() and equals and name.isprintable() and 2 <= len(parts) <= 3):
        raise ConfigError(f"site {text!r} is not NAME=RATE,RTT[,LOSS]: write it as hospital=100Mbit,40ms,0.1%")
    try:
        rate, round_trip = parse_rate(parts[0]), parse_time(parts[1], "round trip")
        return name.strip(), rate, round_trip, parse_loss(parts[2]) if len(parts) == 3 else 0.0
    except ConfigError as error:
        raise ConfigError(f"site {text!r}: {error}") from None


def as_rate(bits: float) -> str:
    """Bits/s for people: 1e8 is "100 Mbit/s"."""
    for unit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bits >= unit:
            return f"{bits / unit:g} {prefix}bit/s"
    return f"{bits:g} bit/s"
