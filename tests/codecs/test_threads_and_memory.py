"""What the codecs promise about memory, threads, imports and the compiler's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import nvflare_rdma
from nvflare_rdma.codecs import CODEC_NAMES, get_codec
from nvflare_rdma.codecs.runs import TILE

MIB = 1 << 20
N = 8 * MIB  # 32 MiB of float32
SOURCES = ["contiguous", "strided", "float16"]


@pytest.fixture(scope="module")
def tensors():
    """A large tensor for each kind of source, a buffer with room for any codec, and an output; all touched."""
    x = np.random.default_rng(0).standard_normal(N).astype(np.float32)
    room = np.ones(max(get_codec(name).encoded_nbytes(N) for name in CODEC_NAMES), np.uint8)
    sources = {"contiguous": x, "strided": x.reshape(2048, -1).T, "float16": x.astype(np.float16)}
    outputs = {kind: np.ones_like(source) for kind, source in sources.items()}
    outputs["strided"] = np.ones_like(x).reshape(2048, -1).T
    return sources, room, outputs


def peak_rss(field="VmHWM"):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def round_trip(codec, x, room, out):
    encoded = room[: codec.encoded_nbytes(x.size)]
    used = codec.encode_into(x, encoded)
    codec.decode_into(encoded[:used], out)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_work_memory_does_not_grow_with_the_tensor(name, source, tensors):
    codec, (sources, room, outputs) = get_codec(name), tensors
    x, out = sources[source], outputs[source]
    round_trip(codec, x[:100], room, out[:100])  # imports and compiles
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_rss()
    round_trip(codec, x, room, out)
    # 16 MiB are promised; a copy of this tensor would be 16 or 32, one of its 4-bit scales 2.
    assert peak_rss() - before < 1.75 * MIB


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_threads_do_not_share_scratch(name):
    codec = get_codec(name)
    inputs = [np.random.default_rng(i).standard_normal((TILE + i, 2)).astype(np.float16).T for i in range(4)]
    wanted = [np.empty(codec.encoded_nbytes(x.size), np.uint8) for x in inputs]
    used = [codec.encode_into(x, out) for x, out in zip(inputs, wanted, strict=True)]
    failures = []

    def work(i):
        out, back, reference = np.empty_like(wanted[i]), np.empty_like(inputs[i]), np.empty_like(inputs[i])
        codec.decode_into(wanted[i][: used[i]], reference)
        for _ in range(3):
            codec.encode_into(inputs[i], out)
            codec.decode_into(out[: used[i]], back)
            if out[: used[i]].tobytes() != wanted[i][: used[i]].tobytes() or (back != reference).any():
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not failures


@pytest.mark.parametrize("name", [name for name in CODEC_NAMES if get_codec(name).splits])
def test_two_threads_with_half_a_tensor_each_give_the_same_parts(name):
    codec, x = get_codec(name), np.random.default_rng(3).standard_normal(4 * TILE + 77).astype(np.float32)
    whole = np.empty(codec.encoded_nbytes(x.size), np.uint8)
    codec.encode_into(x, whole)
    cut = 2 * TILE
    halves = [x[:cut], x[cut:]]
    encoded = [np.empty(codec.encoded_nbytes(h.size), np.uint8) for h in halves]
    threads = [threading.Thread(target=codec.encode_into, args=p) for p in zip(halves, encoded, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    parts = [codec.parts(e, h.size) for e, h in zip(encoded, halves, strict=True)]
    for part, wanted in codec.parts(whole, x.size).items():
        np.testing.assert_array_equal(np.concatenate([p[part] for p in parts]), wanted)


@pytest.fixture
def turns():
    """How often another thread had its turn, in a list. Nobody is made to give up the GIL meanwhile: it has its turn
    only where the GIL is released."""
    counted, stop, interval = [0], threading.Event(), sys.getswitchinterval()

    def count():
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # releases the GIL

    thread = threading.Thread(target=count)
    thread.start()
    sys.setswitchinterval(100.0)
    yield counted
    sys.setswitchinterval(interval)
    stop.set()
    thread.join(60)


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", CODEC_NAMES)
def test_the_gil_is_released(name, direction, tensors, turns):
    codec, (sources, room, outputs) = get_codec(name), tensors
    x, out = sources["contiguous"], outputs["contiguous"]
    encoded = room[: codec.encoded_nbytes(x.size)]
    used = codec.encode_into(x, encoded)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # a busy machine may not let the other thread run
        before = turns[0]
        if direction == "encode":
            codec.encode_into(x, encoded)
        else:
            codec.decode_into(encoded[:used], out)
        if turns[0] > before:
            return
    pytest.fail("no other thread had a turn")


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        env={k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))} | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_codecs_imports_nothing_heavy():
    code = (
        "import sys, nvflare_rdma.codecs, nvflare_rdma.codecs.tensors\n"
        "from nvflare_rdma.codecs import CODEC_NAMES, get_codec\n"
        "[get_codec(name).estimate_ratio() for name in CODEC_NAMES]\n"
        "heavy = ('nvflare', 'torch', 'numba', 'llvmlite', 'zstandard', 'bitsandbytes')\n"
        "print([m for m in sys.modules if m.split('.')[0] in heavy])"
    )
    assert run_python(code).strip() == "[]"


USE = (
    "import sys\n"
    "sys.modules['torch'] = sys.modules['nvflare'] = None\n"
    "import numpy as np\n"
    "from nvflare_rdma.codecs import get_codec\n"
    "x, out = np.linspace(-1, 1, 64, dtype=np.float32), bytearray(128)\n"
    "get_codec('bfloat16').encode_into(x, out)\n"
    "print(bytes(out).hex())\n"
)


@pytest.fixture
def installation(tmp_path):
    """A copy of the package without any compiled code, where nothing can be written beside the kernels."""
    package = Path(nvflare_rdma.__file__).parent
    shutil.copytree(package, tmp_path / "site" / "nvflare_rdma", ignore=shutil.ignore_patterns("__pycache__"))
    # A file where the directory would be stops root as well, whom permissions don't.
    (tmp_path / "site/nvflare_rdma/codecs/kernels/__pycache__").write_text("")
    return tmp_path


def expected():
    out = bytearray(128)
    get_codec("bfloat16").encode_into(np.linspace(-1, 1, 64, dtype=np.float32), out)
    return out.hex()


def test_a_read_only_installation_caches_in_the_home_directory(installation):
    environment = {"PYTHONPATH": str(installation / "site"), "HOME": str(installation), "NUMBA_DEBUG_CACHE": "1"}
    first = run_python(USE, **environment)
    assert first.splitlines()[-1] == expected()
    assert "data saved to" in first
    assert list((installation / ".cache").rglob("*.nbc"))
    second = run_python(USE, **environment)
    assert second.splitlines()[-1] == expected()
    assert "data loaded from" in second
    assert "data saved to" not in second


def test_without_any_place_for_the_cache_the_codecs_work(installation):
    (installation / "home").write_text("")
    environment = {"PYTHONPATH": str(installation / "site"), "HOME": str(installation / "home")}
    assert run_python(USE, **environment, NUMBA_DEBUG_CACHE="1").strip() == expected()
