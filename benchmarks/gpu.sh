#!/usr/bin/env bash
# What a CUDA machine has to show, within six minutes: the tests of encoding on a device, and how fast that is, as a share
# of the card's memory bandwidth.
#
#     benchmarks/gpu.sh            (PYTHON=... names another interpreter than python)
#
# Exit status: 0 if all is well, 1 if a test failed or took too long, 3 if something is missing here, which it names.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

missing=$("$PYTHON" - <<'CHECK' 2>/dev/null || echo "$PYTHON can't be run"
import importlib.util
import pathlib

lacking = [n for n in ("torch", "nvflare", "numba", "pytest", "xdist", "hypothesis") if importlib.util.find_spec(n) is None]
if lacking:
    print(f"not installed: {', '.join(lacking)} (pip install -e '.[test]')")
else:
    import torch

    if torch.version.cuda is None:
        print(f"torch {torch.__version__} is built without CUDA")
    elif not torch.cuda.is_available():
        driver = "a driver" if pathlib.Path("/dev/nvidiactl").exists() else "no driver (/dev/nvidiactl)"
        print(f"torch {torch.__version__} finds no CUDA device; this machine has {driver}")
CHECK
)
if [ -n "$missing" ]; then
  echo "gpu.sh: nothing was run: $missing" >&2
  exit 3
fi

status=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0), torch.__version__)'
# CPU tensors take the same path in `make test`; here it is CUDA's that count.
timeout 200 "$PYTHON" -m pytest -q -n 4 --dist worksteal -k cuda tests/codecs/test_on_device.py || status=1
timeout 60 "$PYTHON" -m pytest -q tests/filters/test_on_gpu.py || status=1
timeout 90 "$PYTHON" benchmarks/codecs.py --cuda-only --mib 256 --repeats 5 || status=1
exit $status
