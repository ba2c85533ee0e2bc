"""Which of a quantizer's options belong together: what types need, and what excludes each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare_rdma.codecs import LOSSLESS, Policy
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters.autopilot import AUTO, NAMED, Autopilot, checked_limits
from nvflare_rdma.filters.dither import DITHERED

_LEFT_OUT = {"error_feedback": "it leaves most values out, and they have to be sent later on"}
#: What types can't do without, and why.
_NEEDED = {
    "exact_delta": {"delta": "it is the difference from a model that both sides hold"},
    "topk2": _LEFT_OUT,
    "topk2_128": _LEFT_OUT,
}


def with_needed(quantization_type: str, policy: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with those switched on that the policy's types can't do without.

    Raises:
        ConfigError: an unknown type or rule.
    """
    if isinstance(quantization_type, str) and quantization_type.lower() == AUTO:
        return dict(options)
    codecs = Policy(quantization_type, policy).codecs
    needed = {option: True for codec in codecs for option in _NEEDED.get(codec.name, {})}
    if any(codec.needs_feedback for codec in codecs):
        needed["delta"] = True  # has an effect on whole models only, which these can't be used for without
    return {**options, **needed}


def check_options(policy: Policy, error_feedback: bool, delta: bool, stochastic_rounding: bool) -> None:
    """Raise ConfigError about options that a type of the policy needs, or that can't be used together."""
    given = {"error_feedback": error_feedback, "delta": delta}
    for codec in policy.codecs:
        for option, reason in _NEEDED.get(codec.name, {}).items():
            if not given[option]:
                raise ConfigError(
                    f"quantization_type '{codec.name}' needs {option}: {reason}; set {option} to true or use another "
                    "quantization_type"
                )
    if not stochastic_rounding:
        return
    if error_feedback:
        raise ConfigError(
            "stochastic_rounding and error_feedback can't be used together: each makes the mean error zero by "
            "itself, and the residual would carry the noise from round to round; leave out one of them"
        )
    if not any(rule.quantization_type in DITHERED for rule in policy.rules):
        raise ConfigError(
            f"stochastic_rounding has an effect on {', '.join(DITHERED)} only, which the policy doesn't use; set "
            "quantization_type to it or leave out stochastic_rounding"
        )


def check_limit(policy: Policy, limit: Any) -> float | None:
    """Return `max_relative_error` as a number, None for no limit.

    Raises:
        ConfigError: it is no number above 0 and up to 1, or no type of the policy loses anything.
    """
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit) or not 0 < limit <= 1:
        raise ConfigError(
            f"max_relative_error must be a number above 0 and up to 1, such as 0.05, but is {limit!r}; leave it out "
            "for no limit, or use the quantization_type 'lossless' if nothing may be lost"
        )
    if all(codec.name in LOSSLESS for codec in policy.codecs):
        names = ", ".join(dict.fromkeys(codec.name for codec in policy.codecs))
        raise ConfigError(
            f"max_relative_error={limit!r} has no effect with {names}, which loses nothing; leave it out or use "
            "another quantization_type"
        )
    return float(limit)


def autopilot_of(arguments: Mapping[str, Any]) -> Autopilot | None:
    """Return what chooses the types of a ModelQuantizer with these arguments; None if its type is given.

    Raises:
        ConfigError: one of them is bad, or of no use with `auto`.
    """
    of_one_type = {name: arguments.get(name) for name in ("error_feedback", "delta", "stochastic_rounding")}
    quantization_type, seconds, nbytes = map(arguments.get, ("quantization_type", "round_seconds", "round_bytes"))
    limits = checked_limits(quantization_type, seconds, nbytes, of_one_type)
    if limits is None:
        return None
    policy = Policy(NAMED, arguments.get("policy"))
    return Autopilot(policy, limits, check_limit(policy, arguments.get("max_relative_error")))


def check_whole(policy: Policy, delta: bool) -> None:
    """Raise ConfigError about a type that is for differences, if a whole model is to be sent and `delta` is off."""
    if named := [codec.name for codec in policy.codecs if codec.needs_feedback and not delta]:
        raise ConfigError(
            f"quantization_type '{named[0]}' is for differences, but the message has whole WEIGHTS: set delta to true, "
            "have the sites send WEIGHT_DIFF, or use another quantization_type"
        )
