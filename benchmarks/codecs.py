"""Encoding and decoding a model's tensors: every codec beside bitsandbytes, FLARE's filter, torch and memcpy.

    python benchmarks/codecs.py [--mib 1024] [--reference-mib 64] [--repeats 5]

The tensors have the shapes of Llama-3.2-1B's layers, float32, and are encoded in pieces of 4 MiB, as a chunk pipeline
does it, into memory that has been touched. Rates are GB of float32 per second, medians over the repeats; in each
repeat all codecs have their turn, so that a noisy moment hits all of them. With one core the seconds are those of the
CPU, so that other processes on the machine count less; with two they are seconds on the clock. References are
measured on fewer tensors, since most are slow, and each tensor as a whole. Extra memory is what the peak RSS grows
beyond input and output.

``add`` is what a server does with results that stay encoded: each piece is decoded into a sum. Beside it is what that
takes when all pieces are decoded first, and added then by torch's `add_`; both with one core and touched memory.

``measured`` is what it takes to encode each piece, and then to measure what was lost of it, as a sender does under a
largest error; ``digest`` to take the digest of its bytes.

Where torch has a CUDA device, the same tensors are encoded there as well, each as a whole, beside what it takes to copy
them to the CPU and encode them with one core; seconds on the clock until the codes are in CPU memory. The codes must be
equal. A rate's share is of what the device's memory moves when a tensor is copied in it, read and written.
`--cuda-only` does only this.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import xxhash
from measuring import MIB, Meter, command_line, machine, versions

from nvflare_rdma.codecs import CODEC_NAMES, Codec, FixedSizeCodec, get_codec, lost_by

PIECE = MIB  # elements
SHAPES = [
    (2048, 2048),
    (512, 2048),
    (512, 2048),
    (2048, 2048),
    (8192, 2048),
    (8192, 2048),
    (2048, 8192),
    (2048,),
    (2048,),
]
#: Codec -> GB/s to reach with one core, (encode, decode); None: this share of memcpy.
GOALS: dict[str, tuple[float, float] | None] = {
    "float16": None,
    "bfloat16": None,
    "int8": (3, 3),
    "blockwise8": (3, 3),
    "float4": (2, 4),
    "normfloat4": (2, 4),
    "float4_dq": (2, 4),
    "normfloat4_dq": (2, 4),
    "normfloat4_e4m3": (2, 4),
}
#: Codec -> GB/s of adding to reach with one core, and how many times that of decoding first.
ADDING_GOALS = {"normfloat4": (4.0, 2.0)}
SHARE = 0.6
EXTRA_MIB = 16


def tensors(mib: int) -> list[np.ndarray]:
    """Layers' tensors until they have `mib` MiB, views of one touched array."""
    rng = np.random.default_rng(0)
    made: list[np.ndarray] = []
    while sum(t.nbytes for t in made) < mib * MIB:
        shape = SHAPES[len(made) % len(SHAPES)]
        made.append(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02))
    return made


class Work:
    """All tensors in pieces, with room for their codes and for what those decode to."""

    def __init__(self, model: list[np.ndarray]) -> None:
        pieces = [t.reshape(-1)[i : i + PIECE] for t in model for i in range(0, t.size, PIECE)]
        self.nbytes = sum(t.nbytes for t in model)
        most = max(get_codec(name).encoded_nbytes(PIECE) for name in CODEC_NAMES)
        self._room = np.ones((len(pieces), most), np.uint8)
        self._out = [np.ones_like(p) for p in pieces]
        self._sum = [np.ones_like(p) for p in pieces]
        self._pieces = pieces
        self._used = [0] * len(pieces)

    def copy(self, i: int) -> None:
        np.copyto(self._out[i], self._pieces[i])

    def encode(self, codec: Codec, i: int) -> None:
        piece = self._pieces[i]
        self._used[i] = codec.encode_into(piece, self._room[i, : codec.encoded_nbytes(piece.size)])

    def decode(self, codec: Codec, i: int) -> None:
        codec.decode_into(self._room[i, : self._used[i]], self._out[i])

    def encode_measured(self, codec: Codec, i: int) -> None:
        self.encode(codec, i)
        lost_by(codec, self._room[i, : self._used[i]], self._pieces[i])

    def digest(self, i: int) -> None:
        xxhash.xxh3_128(self._room[i, : self._used[i]]).digest()

    def add(self, codec: FixedSizeCodec, i: int) -> None:
        codec.add_into(self._room[i, : self._used[i]], 0.5, self._sum[i])

    def add_decoded(self, i: int) -> None:
        import torch

        torch.from_numpy(self._sum[i]).add_(torch.from_numpy(self._out[i]), alpha=0.5)

    def share(self) -> float:
        return sum(self._used) / self.nbytes

    def on_one_core(self, do: Callable[[int], None]) -> float:
        """CPU seconds."""
        start = time.process_time()
        for i in range(len(self._pieces)):
            do(i)
        return time.process_time() - start

    def on_two_cores(self, do: Callable[[int], None]) -> float:
        """Seconds by the clock, with two threads that take the next piece when they are done with one."""
        todo = iter(range(len(self._pieces)))

        def worker() -> None:
            for i in todo:  # `next` of a range's iterator is atomic
                do(i)

        threads = [threading.Thread(target=worker) for _ in range(2)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start


Rates = dict[tuple[str, str], list[float]]


def measure_codecs(
    work: Work, repeats: int, cores: list[int]
) -> tuple[Rates, Rates, dict[str, float], dict[str, float]]:
    one: Rates = {}
    two: Rates = {}
    extra: dict[str, float] = {}
    share: dict[str, float] = {}
    for repeat in range(-1, repeats):  # the first turn imports, compiles and fills caches
        for rates, on, use in ((one, work.on_one_core, cores[:1]), (two, work.on_two_cores, cores)):
            with pinned(use):
                steps: list[tuple[str, str, Callable[[int], None]]] = [("memcpy", "copy", work.copy)]
                for name in CODEC_NAMES:
                    codec = get_codec(name)
                    steps.append((name, "encode", lambda i, c=codec: work.encode(c, i)))  # type: ignore[misc]
                    steps.append((name, "decode", lambda i, c=codec: work.decode(c, i)))  # type: ignore[misc]
                for name, direction, do in steps:
                    meter = Meter()
                    seconds = on(do)
                    if repeat >= 0:
                        rates.setdefault((name, direction), []).append(work.nbytes / seconds / 1e9)
                        extra[name] = max(extra.get(name, 0), meter.read()["rss"] / MIB)
                    if direction == "encode":
                        share[name] = work.share()
    return one, two, extra, share


def measure_adding(work: Work, repeats: int, core: int) -> Rates:
    """Rates of adding what is encoded, and of decoding all of it before it is added."""
    import torch

    torch.set_num_threads(1)
    rates: Rates = {}
    with pinned([core]):
        for repeat in range(-1, repeats):
            for name in CODEC_NAMES:
                codec = get_codec(name)
                if not isinstance(codec, FixedSizeCodec):
                    continue
                work.on_one_core(lambda i, c=codec: work.encode(c, i))  # type: ignore[misc]
                added = work.on_one_core(lambda i, c=codec: work.add(c, i))  # type: ignore[misc]
                decoded = work.on_one_core(lambda i, c=codec: work.decode(c, i))  # type: ignore[misc]
                decoded += work.on_one_core(work.add_decoded)
                if repeat >= 0:
                    rates.setdefault((name, "add"), []).append(work.nbytes / added / 1e9)
                    rates.setdefault((name, "decode, add"), []).append(work.nbytes / decoded / 1e9)
    return rates


def report_adding(rates: Rates) -> None:
    print(f"{'1 core':16} {'add':>8} {'decode, add':>12}  times")
    for name in dict.fromkeys(name for name, _ in rates):
        added, decoded = median(rates, name, "add"), median(rates, name, "decode, add")
        print(f"{name:16} {added:8.1f} {decoded:12.1f} {added / decoded:6.2f}")
    for name, (rate, times) in ADDING_GOALS.items():
        added, decoded = median(rates, name, "add"), median(rates, name, "decode, add")
        met = "met" if added >= rate and added >= times * decoded else "NOT met"
        print(f"{name}: adding at {rate:g} GB/s and {times:g} times decoding first: {met}")


def report_measuring(work: Work, repeats: int, core: int) -> None:
    """Nanoseconds a value of encoding, of encoding and measuring what was lost, and of a digest of what was made."""
    print(f"{'1 core, ns':16} {'encode':>8} {'measured':>9} {'digest':>8}")
    values = work.nbytes / 4
    with pinned([core]):
        for name in CODEC_NAMES:
            codec = get_codec(name)
            if not isinstance(codec, FixedSizeCodec):
                continue
            steps = (
                lambda i, c=codec: work.encode(c, i),
                lambda i, c=codec: work.encode_measured(c, i),
                work.digest,
            )
            seconds = [[work.on_one_core(step) for step in steps] for _ in range(-1, repeats)][1:]  # type: ignore[arg-type]
            figures = [statistics.median(each) / values * 1e9 for each in zip(*seconds, strict=True)]
            print(f"{name:16} {figures[0]:8.2f} {figures[1]:9.2f} {figures[2]:8.3f}")


@contextlib.contextmanager
def pinned(cores: list[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure_references(model: list[np.ndarray], repeats: int, core: int) -> Rates:
    """bitsandbytes, FLARE's filter without its calls of ``cuda()``, and plain torch; whole tensors, one core."""
    import torch

    torch.set_num_threads(1)
    values = [torch.from_numpy(t) for t in model]
    steps: dict[str, tuple[Callable[[], object], Callable[[object], object]]] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        steps[f"torch {str(dtype)[6:]}"] = (
            lambda d=dtype: [v.to(d) for v in values],
            lambda codes: [c.float() for c in codes],  # type: ignore[attr-defined]
        )
    steps["torch int8"] = (lambda: [torch_int8(v) for v in values], lambda codes: [c.float() * s for c, s in codes])
    with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
        import bitsandbytes.functional as bnb

        steps["bitsandbytes blockwise8"] = (
            lambda: [bnb.quantize_blockwise(v) for v in values],
            lambda codes: [bnb.dequantize_blockwise(*c) for c in codes],
        )
        for kind in ("fp4", "nf4"):
            steps[f"bitsandbytes {kind}"] = (
                lambda k=kind: [bnb.quantize_4bit(v, quant_type=k) for v in values],
                lambda codes: [bnb.dequantize_4bit(*c) for c in codes],
            )
        for kind in ("float16", "blockwise8", "float4", "normfloat4", "adaquant"):
            steps[f"FLARE {kind}"] = flare_steps(kind, model)
    rates: Rates = {}
    nbytes = sum(t.nbytes for t in model)
    with pinned([core]):
        for repeat in range(-1, repeats):
            for name, (encode, decode) in steps.items():
                start = time.process_time()
                codes = encode()
                middle = time.process_time()
                decode(codes)
                end = time.process_time()
                if repeat >= 0:
                    rates.setdefault((name, "encode"), []).append(nbytes / (middle - start) / 1e9)
                    rates.setdefault((name, "decode"), []).append(nbytes / (end - middle) / 1e9)
    return rates


def report_cuda(model: list[np.ndarray], repeats: int) -> bool:
    """Rates of encoding tensors where they are, on the first CUDA device, or a line that says why there are none.
    Returns whether all codes were looked at, and equal to those made on the CPU."""
    try:
        import torch
    except ImportError:
        print("CUDA: not run: no torch")
        return False
    if not torch.cuda.is_available():
        print("CUDA: not run: no CUDA device")
        return False
    from nvflare_rdma.codecs import can_encode_on_device, encode_on_device, to_array

    def on_cpu(codec: Codec, tensor: torch.Tensor) -> np.ndarray:
        values = to_array(tensor)
        encoded = np.empty(codec.encoded_nbytes(values.size), np.uint8)
        return encoded[: codec.encode_into(values, encoded)]

    def seconds_of(do: Callable[[], object]) -> float:
        taken = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            do()
            torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    tensors = [torch.from_numpy(t).to("cuda:0") for t in model]
    moved = torch.ones((2, 64 * MIB), device="cuda:0")
    memory = moved.nbytes / seconds_of(lambda: moved[0].copy_(moved[1])) / 1e9
    print(f"CUDA: {torch.cuda.get_device_name(0)}, whose memory moves {memory:.0f} GB/s")
    print(f"{'':16} {'encode there':>12} {'of memory':>9} {'copy, encode':>12} {'extra':>13}  codes")
    nbytes, all_equal = sum(t.nbytes for t in model), True
    for name in CODEC_NAMES:
        codec = get_codec(name)
        if not can_encode_on_device(codec):
            continue
        equal = all(np.array_equal(encode_on_device(codec, t), on_cpu(codec, t)) for t in tensors)
        all_equal = all_equal and equal
        torch.cuda.reset_peak_memory_stats()
        before, rates = torch.cuda.memory_allocated(), {}
        for encode in (encode_on_device, on_cpu):

            def all_of_them(encode=encode, codec=codec) -> None:  # type: ignore[no-untyped-def]
                for tensor in tensors:
                    encode(codec, tensor)

            rates[encode] = nbytes / seconds_of(all_of_them) / 1e9
        extra = (torch.cuda.max_memory_allocated() - before) / MIB
        there, copied = rates[encode_on_device], rates[on_cpu]
        share = f"{there / memory:.2%}"
        print(
            f"{name:16} {there:12.2f} {share:>9} {copied:12.2f} {extra:9.1f} MiB  {'equal' if equal else 'NOT EQUAL'}"
        )
    return all_equal


def torch_int8(values):  # type: ignore[no-untyped-def]
    import torch

    scale = values.abs().max() / 127
    return torch.round(values / scale).to(torch.int8), scale


def flare_steps(kind: str, model: list[np.ndarray]) -> tuple[Callable[[], object], Callable[[object], object]]:
    import logging

    import torch
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
    from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    quantizer, dequantizer = ModelQuantizer(kind), ModelDequantizer()

    def encode() -> object:
        params = {str(i): torch.from_numpy(t) for i, t in enumerate(model)}
        return quantizer.process_dxo(DXO(DataKind.WEIGHTS, data=params), Shareable(), FLContext())

    def decode(dxo: object) -> object:
        return dequantizer.process_dxo(dxo, Shareable(), FLContext())

    return encode, decode


def median(rates: Rates, name: str, direction: str) -> float:
    return statistics.median(rates[name, direction])


def report(one: Rates, two: Rates, extra: dict[str, float], share: dict[str, float], references: Rates) -> None:
    print(f"{'':16} {'size':>8} {'1 core':>17} {'2 cores':>17} {'extra':>9}")
    print(f"{'':16} {'':>8} {'encode':>8} {'decode':>8} {'encode':>8} {'decode':>8} {'memory':>9}")
    copies = [median(rates, "memcpy", "copy") for rates in (one, two)]
    print(f"{'memcpy':16} {'100 %':>8} {copies[0]:8.1f} {'':8} {copies[1]:8.1f}")
    for name in CODEC_NAMES:
        figures = [median(rates, name, way) for rates in (one, two) for way in ("encode", "decode")]
        print(f"{name:16} {100 * share[name]:6.2f} %", *(f"{f:8.1f}" for f in figures), f"{extra[name]:5.1f} MiB")
    print()
    for name in dict.fromkeys(name for name, _ in references):
        figures = [median(references, name, way) for way in ("encode", "decode")]
        print(f"{name:25}", *(f"{f:8.2f}" for f in figures))
    print()
    for name, goal in GOALS.items():
        wanted = goal or (SHARE * copies[0],) * 2
        text = f"{SHARE:.0%} of memcpy, {wanted[0]:.1f}" if goal is None else f"{wanted[0]:g} and {wanted[1]:g}"
        reached = [median(one, name, way) for way in ("encode", "decode")]
        met = all(r >= w for r, w in zip(reached, wanted, strict=True))
        print(f"{name}: {text} GB/s: {reached[0]:.1f} and {reached[1]:.1f}: {'met' if met else 'NOT met'}")
    most = max(extra.values())
    print(f"extra memory <= {EXTRA_MIB} MiB: {most:.1f} at most: {'met' if most <= EXTRA_MIB else 'NOT met'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--reference-mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cuda-only", action="store_true", help="only the part that needs a CUDA device")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    print(
        f"{machine()}\n{versions('numpy', 'numba', 'zstandard', 'torch', 'bitsandbytes', 'nvflare')}\n{command_line()}"
    )
    model = tensors(arguments.mib)
    print(
        f"{len(model)} tensors, {sum(t.nbytes for t in model) / MIB:.0f} MiB of float32; {arguments.repeats} repeats\n"
    )
    if arguments.cuda_only:
        sys.exit(not report_cuda(model, arguments.repeats))
    work = Work(model)
    measured = measure_codecs(work, arguments.repeats, cores)
    report_measuring(work, arguments.repeats, cores[0])
    print()
    adding = measure_adding(work, arguments.repeats, cores[0])
    few = tensors(arguments.reference_mib)
    report_cuda(model, arguments.repeats)
    print()
    report(*measured, measure_references(few, arguments.repeats, cores[0]))
    print()
    report_adding(adding)


if __name__ == "__main__":
    main()
