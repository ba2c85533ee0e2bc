"""Which codec each tensor of a model gets: by name pattern, dtype, size and role.

A policy is a list of rules, tried in order; the first that fits a tensor decides. Rules are plain dicts, so that
they can be written in a job's config::

    [{"role": "embedding", "quantization_type": "blockwise8"},
     {"name": "*.lora_*", "quantization_type": "exact"},
     {"dtype": "float16", "min_elements": 100000, "quantization_type": "normfloat4"}]

After the given rules come `DEFAULT_RULES`, which keep exact what is small and matters much, and then the policy's
`quantization_type` for the rest. Some tensors are exact whatever the rules say: those that are not float32, float16
or bfloat16, empty ones, and those that would not get smaller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from nvflare_rdma.codecs.base import Codec, FixedSizeCodec
from nvflare_rdma.codecs.registry import get_codec
from nvflare_rdma.codecs.tensors import FLOAT_NAMES, float_bits
from nvflare_rdma.errors import ConfigError

EXACT = "exact"
EXACT_BELOW = 1024  # elements: 4 KiB of float32, of which a codec's metadata would eat up most of the gain
ROLES = ("norm", "bias", "embedding", "head", "other")

#: The rules that are appended to every list of rules. A rule that has nothing but `quantization_type` overrides them.
DEFAULT_RULES: tuple[Mapping[str, Any], ...] = (
    {"role": "norm", "quantization_type": EXACT},
    {"role": "bias", "quantization_type": EXACT},
    {"max_elements": EXACT_BELOW - 1, "quantization_type": EXACT},
)

#: What takes a type's place where that would lose too much of a tensor: from few bits to many, and each of them loses
#: less than the ones of fewer bits on most tensors.
BETTER = ("ternary", "int2", "normfloat4_e4m3", "blockwise8", "int8", "float8_e4m3", "bfloat16", "float16")

_NORM = re.compile(r"(?:^|_)(?:norm|ln|bn|gn)(?:\d|_|$)|norm\d*$|^(?:batch|layer|group|instance|rms)norm")
_RUNNING = ("running_mean", "running_var")
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$")
_HEAD = re.compile(r"(?:^|_)head$|^(?:classifier|output|score)$")


@dataclass(frozen=True)
class Decision:
    """What a policy says of one tensor: its codec, or None if it travels exact, and why."""

    codec: Codec | None
    reason: str


@dataclass(frozen=True)
class Rule:
    """One line of a policy. All conditions that are given must hold.

    Attributes:
        quantization_type: a codec's name, or `exact`.
        name: a shell pattern (`fnmatch`, case matters) for the whole name.
        dtype: the dtype's name, such as `bfloat16`.
        role: one of `ROLES`, see `role_of`.
        min_elements, max_elements: size, both ends included.
    """

    quantization_type: str
    name: str = "*"
    dtype: str | None = None
    role: str | None = None
    min_elements: int = 0
    max_elements: int | None = None

    @classmethod
    def parse(cls, raw: Any) -> Rule:
        """Return a rule from the dict that stands for it in a config.

        Raises:
            ConfigError: not a dict, an unknown key or value; the message names it and says what is allowed.
        """
        keys = tuple(cls.__dataclass_fields__)
        if not isinstance(raw, Mapping):
            raise ConfigError(f"policy rule {raw!r} is not a dict with keys of: {', '.join(keys)}")
        rule = dict(raw)
        for key, value in rule.items():
            if key not in keys:
                raise ConfigError(f"policy rule {rule!r} has an unknown key {key!r}; allowed: {', '.join(keys)}")
            wanted = int if key.endswith("_elements") else str
            if type(value) is not wanted:
                raise ConfigError(f"policy rule {rule!r}: {key} must be of type {wanted.__name__}, not {value!r}")
        if "quantization_type" not in rule:
            raise ConfigError(f"policy rule {rule!r} has no quantization_type: give a codec's name or '{EXACT}'")
        rule["quantization_type"] = known_type(rule["quantization_type"])
        for key, allowed in (("role", ROLES), ("dtype", FLOAT_NAMES)):
            if key in rule and rule[key] not in allowed:
                raise ConfigError(f"policy rule {rule!r}: {key} must be one of: {', '.join(allowed)}")
        return cls(**rule)

    def fits(self, name: str, dtype: str, n: int, role: str) -> bool:
        """Return whether the rule decides about this tensor."""
        return (
            (self.dtype is None or self.dtype == dtype)
            and (self.role is None or self.role == role)
            and self.min_elements <= n
            and (self.max_elements is None or n <= self.max_elements)
            and fnmatchcase(name, self.name)
        )

    def __str__(self) -> str:
        conditions = {
            "name": None if self.name == "*" else self.name,
            "dtype": self.dtype,
            "role": self.role,
            "min_elements": self.min_elements or None,
            "max_elements": self.max_elements,
        }
        return ", ".join(f"{k} {v}" for k, v in conditions.items() if v is not None) or "everything else"


def known_type(name: Any) -> str:
    """Return the name of a codec, or `exact`, in lower case.

    Raises:
        ConfigError: no codec has that name.
    """
    if isinstance(name, str) and name.lower() == EXACT:
        return EXACT
    return get_codec(name).name


class Policy:
    """Chooses the codec of each tensor of a model.

    Args:
        quantization_type: the codec of whatever no rule fits.
        rules: dicts as `Rule.parse` takes them, followed by `DEFAULT_RULES`; None for no rules at all, so that
            every float tensor is encoded that gets smaller by it, as FLARE's quantizer does.

    Raises:
        ConfigError: an unknown codec, key or value.
    """

    def __init__(self, quantization_type: str, rules: Sequence[Any] | None = None) -> None:
        if rules is not None and (isinstance(rules, str | Mapping) or not isinstance(rules, Sequence)):
            raise ConfigError(f"a policy must be a list of rules, but is {rules!r}")
        self.codec = get_codec(quantization_type)
        given = [] if rules is None else [*rules, *DEFAULT_RULES]
        self.rules = (*(Rule.parse(raw) for raw in given), Rule(self.codec.name))

    @property
    def default(self) -> str:
        """What a tensor gets that no rule fits: a codec's name, or `exact`."""
        return self.rules[-1].quantization_type

    def with_type(self, quantization_type: str) -> Policy:
        """The same rules, and another codec, or `exact`, for whatever none of them fits.

        Raises:
            ConfigError: an unknown codec.
        """
        default = known_type(quantization_type)
        other = Policy(self.codec.name if default == EXACT else default)
        other.rules = (*self.rules[:-1], Rule(default))
        return other

    @property
    def codecs(self) -> list[Codec]:
        """The codecs that the policy may choose."""
        return [get_codec(rule.quantization_type) for rule in self.rules if rule.quantization_type != EXACT]

    def decide(self, name: str, dtype: str, shape: Sequence[int]) -> Decision:
        """Choose the codec of the tensor called `name` with `dtype` (a name, such as `float32`) and `shape`."""
        name, n = str(name), math.prod(shape)  # FLARE's filter takes numbers for names
        if dtype not in FLOAT_NAMES:
            return Decision(None, dtype)
        if n == 0:
            return Decision(None, "empty")
        role = role_of(name, shape)
        rule = next(rule for rule in self.rules if rule.fits(name, dtype, n, role))
        if rule.quantization_type == EXACT:
            return Decision(None, str(rule))
        codec = get_codec(rule.quantization_type)
        if isinstance(codec, FixedSizeCodec) and codec.encoded_nbytes(n) * 8 >= n * float_bits(dtype):
            return Decision(None, f"{codec.name} would not be smaller")
        return Decision(codec, str(rule))


def better_types(codec: Codec, dtype: str, n: int) -> list[Codec]:
    """Return what a tensor of `n` values of this dtype may travel in if `codec` loses too much of it, the smallest
    first: types that take at least as many bytes, and fewer than the tensor itself."""
    others = [get_codec(name) for name in BETTER if name != codec.name]
    least, most = codec.estimate_ratio(), n * float_bits(dtype) // 8
    return [each for each in others if each.estimate_ratio() >= least and each.encoded_nbytes(n) < most]


def role_of(name: str, shape: Sequence[int]) -> str:
    """Return what a tensor is for, told by the names that PyTorch, Hugging Face and timm models use.

    `bias`: its own name begins or ends with bias. `norm`: one dimension or none, and a part of the name says
    norm, ln or bn, or it is a running mean or variance, or a weight (those of one dimension scale channels).
    `embedding` and `head`: two dimensions or more, and a part of the name says so. Everything else: `other`.
    """
    *path, own = re.split(r"[./]", name.lower())
    if own.startswith("bias") or own.endswith("bias"):
        return "bias"
    if len(shape) <= 1:
        normed = own in _RUNNING or own == "weight" or any(_NORM.search(part) for part in (*path, own))
        return "norm" if normed else "other"
    if any(_EMBEDDING.search(part) for part in (*path, own)):
        return "embedding"
    return "head" if any(_HEAD.search(part) for part in (*path, own)) else "other"
