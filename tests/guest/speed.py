"""How slow this guest is: a fixed piece of work, timed, and the tests' limits that follow from it, for a shell.

    limits=$(python -I -S tests/guest/speed.py FILE); eval "$limits"

The factor, which goes to FILE, is the time that the work takes here over `REFERENCE`, at least 1. It stands for
whatever makes a guest slow: the processor, and what else that has to do. One limit for all machines would be too short
for some, where good tests fail, and so long on others that who waits for it learns of a hanging test late. So limits
are written down for the reference, and multiplied by the factor.
"""

from __future__ import annotations

import math
import sys
import time

FILE = "speed"  # in the folder that the guest shares with guest.py
#: Seconds in a guest on the faster kind of machine that CI gets. It was measured on an idle machine of the slower kind,
#: of half the speed: 2.0 s.
REFERENCE = 1.0
ROUNDS = 400_000
#: On a machine of the reference's speed: how many times longer tests wait than outside of the guest, and how long one
#: test may take, in seconds.
PATIENCE = 5
TEST_TIMEOUT = 300
#: Tests wait no longer than on a machine so many times slower than the reference. They divide by their patience what
#: they send, and on a slower machine the package's own deadlines, which do not grow, would be too short.
SLOWEST = 4.0


def work() -> int:
    """What tests do most: calls, attributes, small integers and dictionaries, in pure Python."""
    found: dict[int, int] = {}
    value = 1
    for _ in range(ROUNDS):
        value = value * 1103515245 + 12345 & 0x7FFFFFFF
        found[value & 1023] = found.get(value & 1023, 0) + 1
    return sum(found.values())


def measured() -> float:
    begin = time.monotonic()
    assert work() == ROUNDS
    return max(1.0, (time.monotonic() - begin) / REFERENCE)


def main() -> None:
    factor = measured()
    with open(sys.argv[1], "w") as file:
        file.write(f"{factor:.2f}\n")
    factor = min(factor, SLOWEST)
    timeout = TEST_TIMEOUT * factor
    print(f"export RDMA_TEST_PATIENCE={math.ceil(PATIENCE * factor)} PYTEST_TIMEOUT={timeout:.0f}")
    # Nothing in Python ends a test that hangs in a library with the GIL; who looks for the cause sees at least where.
    print(f'export PYTEST_ADDOPTS="$PYTEST_ADDOPTS -o faulthandler_timeout={timeout / 2:.0f}"')


if __name__ == "__main__":
    main()
