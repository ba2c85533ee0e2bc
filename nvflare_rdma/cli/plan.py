"""What a job's rounds will take, by codec, from a model's shapes and the sites' lines alone: bytes, seconds, memory.

Nothing is sent and nothing is trained. Bytes are those that `nvflare-rdma policy` says, times are those of
`nvflare_rdma.cli.link_model`, and memory is what docs/server-memory.md and docs/streaming.md say. Training, FLARE's
waiting for tasks, and checkpoints come on top of a round's seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvflare_rdma.cli.link_model import Line, Message, Seconds, opening_seconds, seconds_of
from nvflare_rdma.cli.models import Tensor
from nvflare_rdma.cli.policy import Row, rows_of
from nvflare_rdma.codecs import CODEC_NAMES, FixedSizeCodec, Policy, get_codec
from nvflare_rdma.errors import ConfigError

EXACT = "exact"
#: What is compared if nobody says what: from the most exact one down.
USUAL = (EXACT, "float16", "int8", "normfloat4_e4m3", "normfloat4", "int2")
#: Of normally distributed values, the share of their sum of squares that a codec loses.
LOSES: Mapping[str, float] = {
    EXACT: 0.0,
    "tied": 0.0,
    "lossless": 0.0,
    "exact_delta": 0.0,
    "float16": 4.3e-8,
    "bfloat16": 2.8e-6,
    "float8_e4m3": 6.6e-4,
    "int8": 6.8e-5,
    "blockwise8": 1.7e-4,
    "adaquant": 1e-4,
    "normfloat4_e4m3": 0.0077,
    "normfloat4": 0.0084,
    "normfloat4_dq": 0.0084,
    "float4": 0.0148,
    "float4_dq": 0.0148,
    "int2": 0.12,
    "ternary": 0.19,
    "topk2_128": 0.80,
    "topk2": 0.88,
}


@dataclass(frozen=True)
class Site:
    """A site, and its line to the server."""

    name: str
    line: Line


@dataclass(frozen=True)
class Way:
    """What one direction of a round moves.

    Attributes:
        message: how much there is, in memory and on the way.
        held_bytes: what a receiver holds of it until the tensors are used, where few bits stay encoded.
        loses: the share of the values' sum of squares that it loses, if they are normally distributed.
        is_most: whether the size depends on the values, so that `message` has the most that it can be.
        needs_feedback: whether a codec is in it that is of no use without error feedback.
    """

    message: Message
    held_bytes: int
    loses: float
    is_most: bool
    needs_feedback: bool


@dataclass(frozen=True)
class SiteTime:
    """What a round moves to and from one site, in seconds; `opening` more the first time."""

    down: Seconds
    up: Seconds
    opening: float

    @property
    def seconds(self) -> float:
        """Of one round."""
        return self.down.total + self.up.total


@dataclass(frozen=True)
class Memory:
    """Bytes that a process holds at most, beside Python, torch and what training or a workflow needs of its own.

    Attributes:
        model: at the server the global model, at a site the one that it has received.
        result: at the server the sum of the results, at a site its own result.
        waiting: results that have come and were not added yet: one of each site, as they travelled where they stay so,
            and no more than the budget, beyond which they are on disk.
        budget: `rdma_memory_budget_bytes`, which all transfers of a process share.
    """

    model: int
    result: int
    waiting: int
    budget: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.model + self.result + self.waiting + self.budget


@dataclass(frozen=True)
class CodecPlan:
    """Rounds with one codec (or `exact`, or a job's own choice, by `name`)."""

    name: str
    down: Way
    up: Way
    sites: Mapping[str, SiteTime]
    server_memory: Memory
    site_memory: Memory

    @property
    def slowest(self) -> str:
        """The site that decides how long a round is."""
        return max(self.sites, key=lambda name: self.sites[name].seconds)

    @property
    def seconds(self) -> float:
        """Of a round's traffic: until the slowest site is done."""
        return self.sites[self.slowest].seconds

    @property
    def wire_bytes(self) -> int:
        """Of a round, of all sites, both ways, with headers."""
        return len(self.sites) * (self.down.message.wire_bytes + self.up.message.wire_bytes)

    def seconds_of_rounds(self, rounds: int) -> float:
        """Of so many rounds' traffic. The first one opens the links."""
        return rounds * self.seconds + max(time.opening + time.seconds - self.seconds for time in self.sites.values())


@dataclass(frozen=True)
class Choice:
    """What is compared: a name, and the policies of both ways (None: exact)."""

    name: str
    down: Policy | None
    up: Policy | None


def choices_of(codecs: Sequence[str], configured: Mapping[str, Policy] | None = None) -> list[Choice]:
    """What to compare: `codecs` with the rules that are added to all policies, or with those of `configured`.

    Args:
        codecs: names, and `exact`.
        configured: the policies of a job by what they are for, as `nvflare_rdma.cli.policy.read_policies` returns
            them. They are compared, too.

    Raises:
        ConfigError: an unknown codec; or sites have policies of their own, or none is for server and sites.
    """
    made: list[Choice] = []
    for given in codecs:
        name = given.lower()
        if name != EXACT and name not in CODEC_NAMES:
            raise ConfigError(f"codec {given!r} is unknown; use one of: {EXACT}, {', '.join(CODEC_NAMES)}")
        if name in [choice.name for choice in made]:
            continue
        if name == EXACT:
            made.append(Choice(name, None, None))
        elif configured is None:
            made.append(Choice(name, *[Policy(name, [])] * 2))
        else:
            made.append(Choice(name, *(policy and policy.with_type(name) for policy in _ways(configured))))
    if configured is not None:
        made.append(Choice("as configured", *_ways(configured)))
    return made


def _ways(configured: Mapping[str, Policy]) -> tuple[Policy | None, Policy | None]:
    if "both directions" in configured:
        return configured["both directions"], configured["both directions"]
    known = ("server to sites", "sites to server")
    down, up = (configured.get(where) for where in known)
    if unknown := sorted(configured.keys() - set(known)):
        raise ConfigError(
            f"the config has a policy for {unknown[0]}; what is planned is one policy between a server and its sites: "
            "give one app's config_fed_*.json, or a policy's JSON"
        )
    return down, up


def plan(model: Sequence[Tensor], sites: Sequence[Site], choices: Sequence[Choice], budget: int) -> list[CodecPlan]:
    """What rounds take with each of `choices`.

    Args:
        model: its tensors; values are not needed.
        sites: all of them get the model at once, and send theirs back at once. Their names differ.
        choices: see `choices_of`.
        budget: `rdma_memory_budget_bytes`.
    """
    tensors = list(model)
    size = sum(tensor.nbytes for tensor in tensors if tensor.tied is None)
    plans = []
    for choice in choices:
        down, up = _way(choice.down, tensors), _way(choice.up, tensors)
        times = {
            site.name: SiteTime(
                seconds_of(down.message, site.line, len(sites)),
                seconds_of(up.message, site.line, len(sites)),
                opening_seconds(site.line),
            )
            for site in sites
        }
        waiting = min(len(sites) * up.held_bytes, budget)
        server, at_site = Memory(size, size, waiting, budget), Memory(size, size, 0, budget)
        plans.append(CodecPlan(choice.name, down, up, times, server, at_site))
    return plans


def _way(policy: Policy | None, model: list[Tensor]) -> Way:
    if policy is None:
        rows = [
            Row(tensor, "tied", "", 0) if tensor.tied else Row(tensor, EXACT, "", tensor.nbytes) for tensor in model
        ]
    else:
        rows = rows_of(policy, model)
    sent = [row for row in rows if row.codec != "tied"]
    raw = sum(row.tensor.nbytes for row in sent)
    codecs = {row.codec: get_codec(row.codec) for row in sent if row.codec != EXACT}
    stay = {name for name, codec in codecs.items() if isinstance(codec, FixedSizeCodec)}
    message = Message(len(sent), raw, sum(row.nbytes for row in sent))
    return Way(
        message,
        held_bytes=sum(row.nbytes if row.codec in stay else row.tensor.nbytes for row in sent),
        loses=sum(row.tensor.nbytes * LOSES[row.codec] for row in sent) / raw if raw else 0.0,
        is_most=len(stay) < len(codecs),
        needs_feedback=any(codec.needs_feedback for codec in codecs.values()),
    )


def most_exact_within(plans: Sequence[CodecPlan], seconds: float) -> CodecPlan | None:
    """The plan whose round takes no more than `seconds` and loses the least; of several, the faster one."""
    within = [one for one in plans if one.seconds <= seconds]
    return min(within, key=lambda one: (max(one.down.loses, one.up.loses), one.seconds), default=None)
