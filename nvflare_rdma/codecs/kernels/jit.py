"""How kernels are compiled, their argument types, and the few machine operations that numba has no name for.

numba's cache looks at a kernel's own file only: after a change here, or in kernels that others call
(`difference_runs.py`, `huffman.py`), remove what it wrote (`__pycache__/*.nbi`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)  # as bits; what is larger without its sign is NaN


def _array(element: Any, writable: bool = False) -> Any:
    # Unaligned, because encoded bytes may begin anywhere; on today's processors that costs nothing.
    return types.Array(element, 1, "C", readonly=not writable, aligned=False)


size = types.intp
float32_value, float64_value, uint32_value = types.float32, types.float64, types.uint32
boolean = types.boolean
nothing = types.void
float32, float32_out = _array(types.float32), _array(types.float32, True)
float64_out = _array(types.float64, True)
uint8, uint8_out = _array(types.uint8), _array(types.uint8, True)
int8, int8_out = _array(types.int8), _array(types.int8, True)
uint16, uint16_out = _array(types.uint16), _array(types.uint16, True)
uint32, uint32_out = _array(types.uint32), _array(types.uint32, True)
int64_out = _array(types.int64, True)


def together(*members: Any) -> Any:
    """Several arguments as one, a tuple."""
    made: Callable[..., Any] = types.Tuple
    return made(members)


def kernel(*signatures: Any) -> Callable[[F], F]:
    """Compile for exactly these signatures (so that no call ever compiles), cached if there is a place for it."""

    def compiled(function: F) -> F:
        def made(cache: bool) -> F:
            jit: Any = njit
            result: F = jit(list(signatures), nogil=True, error_model="numpy", cache=cache)(function)
            return result

        # Anything may be raised: what is in the cache is unpickled, and a file there may be cut or overwritten.
        with contextlib.suppress(Exception):
            return made(cache=True)
        with contextlib.suppress(Exception):  # no directory can be written, or the disk is full
            cache: Any = FunctionCache
            cache(function).flush()  # what is there is forgotten, without a look at it
            return made(cache=True)
        return made(cache=False)

    return compiled


def inner(function: F) -> F:
    """Compile, with the kernel that calls it, a function that Python never calls.

    What Python would call it by is left out, for that takes as long to compile as a short function, and so are numba's
    rewrites, which are for expressions of whole arrays."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "no_rewrites": True}
    jit: Any = njit
    result: F = jit(nogil=True, error_model="numpy", **options)(function)
    return result


_operation: Callable[..., Any] = intrinsic


@_operation
def half_bits(context: Any, value: Any) -> Any:
    """float32 -> the bits of the nearest half-precision number, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@_operation
def half_value(context: Any, bits: Any) -> Any:
    """The bits of a half-precision number -> float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@_operation
def float_of(context: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_operation
def multiply_add(context: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` of float32, rounded once. One instruction where the processor has it, else a call."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@_operation
def truncated(context: Any, value: Any) -> Any:
    """A float32 in the range of int32, rounded towards zero. One instruction, where numba goes through int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fptosi(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@_operation
def load64(context: Any, run: Any, place: Any) -> Any:
    """Eight bytes of a run of bytes, from a place on, as one number. The caller has made sure that they are there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_pointer64(context, builder, signature, arguments), align=1)

    return types.uint64(run, types.intp), generate


@_operation
def store64(context: Any, run: Any, place: Any, number: Any) -> Any:
    """Undo `load64`, under the same condition."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _pointer64(context, builder, signature, arguments), align=1)
        return context.get_dummy_value()

    return types.void(run, types.intp, types.uint64), generate


def _pointer64(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    run = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(run.data, [arguments[1]]), ir.IntType(64).as_pointer())


@_operation
def bits_used(context: Any, word: Any) -> Any:
    """How many bits of a uint32 are left without the leading zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))
        return builder.zext(builder.sub(ir.Constant(ir.IntType(32), 32), zeros), ir.IntType(64))

    return types.intp(types.uint32), generate


@njit(nogil=True, error_model="numpy", inline="always")
def largest(bits: Any) -> Any:
    """The largest magnitude among float32 values given as their bits, as bits; `INFINITY` or more if any is not finite.
    Integers have no NaN, so this becomes a loop of vectors."""
    top = np.uint32(0)
    for i in range(bits.size):
        top = max(top, bits[i] & MAGNITUDE)
    return top
