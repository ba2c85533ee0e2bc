"""A model's tensors to codes, with the metadata that FLARE's quantization filters use.

`source_datatype` has the dtype's name of each tensor, or `bool` for whatever travels exact: FLARE's dequantizer
leaves those as they are. `quant_state` has what `nvflare_rdma.filters.metadata` describes.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvflare_rdma.codecs import (
    EXACT,
    FLOAT_NAMES,
    LOSSLESS,
    Array,
    Codec,
    Codes,
    Decision,
    ExactDelta,
    FixedSizeCodec,
    PieceNotes,
    Policy,
    RelativeError,
    better_types,
    dtype_name,
    estimate_error,
    float_bits,
    get_codec,
    identity,
    is_encodable,
    is_on_gpu,
    is_plain,
    is_tensor,
    marked,
    measure_error,
    note_codes,
    to_array,
)
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.filters.metadata import to_message

EXACT_DTYPE = "bool"  # the source_datatype that makes FLARE's dequantizer skip a tensor
MIXED = "mixed"  # the algorithm of a message whose tensors name their codecs themselves
MIB = 1 << 20
#: An estimate has to be below the largest relative error by as much as samples of one tensor differ.
_SPARE = 0.95


class TensorEncoder:
    """Encodes the tensors of one message, each on its own: nothing is known of earlier messages.

    Subclasses know more: what else was sent (`nvflare_rdma.filters.correction`), or that the transfer will encode
    (`MarkingEncoder`).
    """

    #: Whether `mark` leaves the encoding to the transfer.
    marks = False

    def __init__(self, limit: float | None = None) -> None:
        """`limit` is the largest relative error that a tensor may have; None for any."""
        self.limit = limit

    def mark(self, name: str, codec: FixedSizeCodec, value: Any, error: RelativeError) -> Any:
        """Return a view of the tensor that is marked (`nvflare_rdma.codecs.marks`); `error` was estimated."""
        raise NotImplementedError

    def estimate(self, name: str, codec: Codec, value: Any) -> RelativeError:
        """Return what the codec would lose of the tensor, from a sample.

        Raises:
            UnrepresentableError: the codec can't carry what is in the sample.
        """
        return RelativeError(0.0) if codec.name in LOSSLESS else estimate_error(codec, value)

    def choose(self, name: str, codec: Codec, value: Any) -> Codec:
        """Return the codec that the tensor gets: the policy's, or `lossless` in place of one that is for differences.

        Nothing would make up for what `topk2` loses. `exact_delta` would lose nothing, but zeros that are no
        difference from what the receiver holds take so few bytes with it that the receiver refuses them.
        """
        return get_codec("lossless") if codec.needs_feedback or isinstance(codec, ExactDelta) else codec

    def encode(self, name: str, codec: Codec, value: Any) -> tuple[Array, RelativeError]:
        """Return the encoded bytes that count, uint8, in CPU memory, and what was lost: measured if there is a limit to
        it, or nothing of the encoded size says what the codec does to a sample (`adaquant`); else estimated.

        A tensor in a GPU's memory is encoded there, with the same result, and only the codes come to the CPU.

        Raises:
            UnrepresentableError: the codec can't carry the tensor's values.
        """
        encoded = self._encode(codec, value)
        if self.limit is None and isinstance(codec, FixedSizeCodec):
            return encoded, self.estimate(name, codec, value)
        return encoded, measure_error(codec, encoded, value)

    @staticmethod
    def _encode(codec: Codec, value: Any) -> Array:
        if is_on_gpu(value):
            from nvflare_rdma.codecs import can_encode_on_device, encode_on_device

            if can_encode_on_device(codec):
                return encode_on_device(codec, value)
        values = to_array(value)
        encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
        return encoded[: codec.encode_into(values, encoded)]


class MarkingEncoder(TensorEncoder):
    """Leaves the encoding to the transfer wherever a tensor's encoded size is known beforehand.

    All sites get the same views while one of them has them, so that a chunk that is encoded for one is there for the
    others. The views are not kept alive here: one of a numpy array would keep the model alive. Codes of the tensors
    that are encoded now are kept.
    """

    marks = True

    def __init__(self, results: dict[str, Any], limit: float | None = None) -> None:
        """`results` is where what sites share is kept: those of `Shared`, or an empty dict."""
        super().__init__(limit)
        self._views: dict[str, Callable[[], Any]] = results.setdefault("views", {})
        self._codes: dict[tuple[str, str], tuple[Array, RelativeError]] = results.setdefault("codes", {})
        self._estimates: dict[tuple[str, str], RelativeError] = results.setdefault("estimates", {})

    def mark(self, name: str, codec: FixedSizeCodec, value: Any, error: RelativeError) -> Any:
        """Return the view that another site has, or a new one."""
        view = self._views[name]() if name in self._views else None
        if view is None:
            view = marked(value, codec, PieceNotes(error, self.limit))
            self._views[name] = weakref.ref(view)
        return view

    def estimate(self, name: str, codec: Codec, value: Any) -> RelativeError:
        """Return what was estimated for another site, or a new estimate."""
        key = name, codec.name
        if key not in self._estimates:
            self._estimates[key] = super().estimate(name, codec, value)
        return self._estimates[key]

    def encode(self, name: str, codec: Codec, value: Any) -> tuple[Array, RelativeError]:
        """Return the codes that another site got, or new ones."""
        key = name, codec.name
        if key not in self._codes:
            self._codes[key] = super().encode(name, codec, value)
        return self._codes[key]


@dataclass(frozen=True)
class Replaced:
    """Says that a tensor travels in another type, because its codec would have lost too much of it.

    Attributes:
        codec: what the policy said.
        error: what that would have lost.
        by: the codec's name that took its place, or `exact`.
    """

    codec: str
    error: RelativeError
    by: str


@dataclass
class EncodedParams:
    """What `encode_params` made.

    Attributes:
        values: by name, codes in place of the tensors that were encoded, and views in place of those to be encoded
            later.
        algorithm: the codec of all encoded tensors, or `MIXED`.
        quant_state, source_datatype: FLARE's metadata.
        tied: names whose tensors are the same memory as that of another name.
        codecs: the codec of each tensor that was encoded; of tied ones, the first only.
        exact: tensors that travel exact for a reason worth a warning, and the reason.
        marked: the codec of each tensor that is encoded only when it is sent (`nvflare_rdma.codecs.marks`). For
            FLARE's metadata it is one that travels exact.
        errors: the relative error of each tensor that was encoded, or is to be.
        replaced: tensors that travel in another type than the policy's, which would have lost too much of them.
    """

    algorithm: str
    values: dict[str, Any] = field(default_factory=dict)
    quant_state: dict[str, dict[str, Any]] = field(default_factory=dict)
    source_datatype: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    codecs: dict[str, Codec] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    marked: dict[str, FixedSizeCodec] = field(default_factory=dict)
    errors: dict[str, RelativeError] = field(default_factory=dict)
    replaced: dict[str, Replaced] = field(default_factory=dict)
    before: int = 0
    after: int = 0
    meta: int = 0

    def summary(self) -> str:
        """Return one line for the log: how many tensors, bytes before and after, and the largest relative error. Tied
        tensors count once."""
        if self.marked:
            return (
                f"{len(self.marked)}/{len(self.quant_state)} params are encoded as they are sent, "
                f"{len(self.codecs)} were encoded now. Before quantization: {self.before / MIB:.2f} MB. "
                f"After quantization: {self.after / MIB:.2f} MB.{self._largest_error()}"
            )
        return (
            f"{len(self.codecs)}/{len(self.quant_state)} params. Before quantization: {self.before / MIB:.2f} MB. "
            f"After quantization: {self.after / MIB:.2f} MB with meta: {self.meta / MIB:.2f} MB."
            f"{self._largest_error()}"
        )

    def _largest_error(self) -> str:
        if not self.errors:
            return ""
        name = max(self.errors, key=lambda each: self.errors[each].value)
        return f" Largest relative error: {self.errors[name]}, of {name}."

    def exact_summary(self) -> str:
        """Return one line for the log that names each tensor of `exact`, and why; "" if there is none."""
        listed = "; ".join(f"{name}: {reason}" for name, reason in self.exact.items())
        return f"{len(self.exact)} tensor(s) sent exact: {listed}" if self.exact else ""


class Replacements:
    """Knows which replaced tensors the log has named, so that each is named once, and again only if it is replaced
    otherwise."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._named: dict[str, tuple[str, str]] = {}

    def news(self, params: EncodedParams) -> str:
        """Return one line for the log that names the tensors of a message that were not named before; "" if none."""
        new = {name: each for name, each in params.replaced.items() if self._named.get(name) != (each.codec, each.by)}
        self._named |= {name: (each.codec, each.by) for name, each in new.items()}
        if not new:
            return ""
        listed = "; ".join(f"{name}: {each.by}, as {each.codec} would lose {each.error}" for name, each in new.items())
        why = f"max_relative_error={self._limit:g}"
        return f"{len(new)} tensor(s) travel in a better type than the policy's because of {why}: {listed}"


def encode_params(values: Mapping[str, Any], policy: Policy, encoder: TensorEncoder) -> EncodedParams:
    """Encode each of the tensors with the codec that `policy` has for it; the rest is passed on as it is.

    `values` is not changed. Tensors that are the same view of the same memory (tied weights) are encoded once, share
    their codes, and are named in `EncodedParams.tied`. Tensors whose encoded size is known beforehand, and that
    `encoder` marks, are not encoded.
    """
    result = EncodedParams(policy.codec.name)
    first: dict[tuple[Any, ...], str] = {}
    for name, value in values.items():
        key = identity(value)
        other = name if key is None else first.setdefault(key, name)
        if other != name:
            result.tied[name] = other
            result.values[name] = result.values[other]
            result.quant_state[name] = dict(result.quant_state[other])
            result.source_datatype[name] = result.source_datatype[other]
            continue
        result.values[name], result.quant_state[name], result.source_datatype[name] = value, {}, EXACT_DTYPE
        decision, warning = _decide(name, value, policy)
        if decision.codec is not None:
            warning = _encode(name, value, decision.codec, encoder, result)
        if warning:
            result.exact[name] = warning
    _name_codecs(result, values, policy)
    return result


def _encode(name: str, value: Any, codec: Codec, encoder: TensorEncoder, result: EncodedParams) -> str | None:
    """Encode or mark a tensor with `codec` or, if that loses more of it than it may, with the next better type. Returns
    why it travels exact if the codec can't carry it."""
    lost: RelativeError | None = None
    others = [] if encoder.limit is None else better_types(codec, dtype_name(value), math.prod(value.shape))
    for candidate in (codec, *others):
        try:
            error = _encode_with(name, value, candidate, encoder, result)
        except UnrepresentableError as reason:
            if candidate is codec:
                return str(reason)
            continue
        if error is None:
            if lost is not None:
                result.replaced[name] = Replaced(codec.name, lost, candidate.name)
            return None
        lost = lost or error
    if lost is not None:
        result.replaced[name] = Replaced(codec.name, lost, EXACT)
    return None


def _encode_with(
    name: str, value: Any, codec: Codec, encoder: TensorEncoder, result: EncodedParams
) -> RelativeError | None:
    """Encode or mark a tensor and put that into `result`, or return the relative error that is beyond the limit."""
    if isinstance(codec, FixedSizeCodec) and encoder.marks:
        error = encoder.estimate(name, codec, value)
        if _is_beyond(error, encoder.limit):
            return error
        result.values[name] = encoder.mark(name, codec, value, error)
        result.marked[name] = codec
        result.errors[name] = error
        result.before += value.nbytes
        result.after += codec.encoded_nbytes(math.prod(value.shape))
        return None
    codec = encoder.choose(name, codec, value)
    if encoder.limit is not None and _is_beyond(error := encoder.estimate(name, codec, value), encoder.limit):
        return error
    encoded, error = encoder.encode(name, codec, value)
    if _is_beyond(error, encoder.limit):
        return error
    _add_codes(name, value, codec, encoded, error, result)
    return None


def _is_beyond(error: RelativeError, limit: float | None) -> bool:
    return limit is not None and not error.value <= (limit * _SPARE if error.estimated else limit)


def _decide(name: str, value: Any, policy: Policy) -> tuple[Decision, str | None]:
    """Return what the policy says, and why a value that it can't encode deserves a warning, if it does."""
    if not is_tensor(value):
        listed = isinstance(value, list | tuple | dict)
        return Decision(None, "no tensor"), f"a {type(value).__name__}, not a tensor" if listed else None
    dtype = dtype_name(value)
    if not is_plain(value):
        return Decision(None, dtype), f"a {type(value).__name__} of dtype {dtype} is no plain dense tensor"
    if not is_encodable(value):
        expected = dtype.startswith(("int", "uint", "bool")) or 0 in value.shape
        reason = None if expected else f"dtype {dtype} is not one that can be quantized"
        return Decision(None, dtype), reason
    return policy.decide(name, dtype, tuple(value.shape)), None


def _add_codes(
    name: str, value: Any, codec: Codec, encoded: Array, error: RelativeError, result: EncodedParams
) -> None:
    """Put `value`'s codes into `result`. What did not get smaller stays exact."""
    if not isinstance(codec, FixedSizeCodec) and encoded.nbytes >= value.nbytes:
        return
    codes, state = to_message(codec, encoded, value)
    result.values[name] = codes
    result.quant_state[name] = state
    result.source_datatype[name] = dtype_name(value)
    result.codecs[name] = codec
    result.errors[name] = error
    if codes is not value:
        note_codes(codes, Codes(codec.name, error))
    result.before += value.nbytes
    result.after += codes.nbytes
    result.meta += sum(v.nbytes for v in state.values() if is_tensor(v))


def _name_codecs(result: EncodedParams, values: Mapping[str, Any], policy: Policy) -> None:
    """Name the one codec in the message's algorithm, or each tensor's in its state."""
    names = {codec.name for codec in result.codecs.values()}
    if len(names) > 1:
        result.algorithm = MIXED
        for name, codec in result.codecs.items():
            result.quant_state[name]["codec"] = codec.name
        return
    codec = next(iter(result.codecs.values()), policy.codec)
    result.algorithm = codec.name
    for name, value in values.items():
        # A tensor that is no wider than the codes keeps its dtype's name, as with FLARE: its dequantizer compares.
        if result.source_datatype[name] == EXACT_DTYPE and is_tensor(value) and is_no_wider(codec, dtype_name(value)):
            result.source_datatype[name] = dtype_name(value)


def is_no_wider(codec: Codec | None, source: str) -> bool:
    """Return whether FLARE's quantizer would have left a tensor of dtype `source` as it is."""
    return isinstance(codec, FixedSizeCodec) and source in FLOAT_NAMES and codec.bits >= float_bits(source)
