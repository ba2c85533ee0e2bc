"""The text: source code of the Python standard library, as every machine has it, split over sites.

Nothing is downloaded. What is read depends only on the installed Python version, so the split is the same for every
run and every process on a machine.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Not the library itself, or tables rather than code.
_SKIP = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Source:
    """One source file. `unit` is its top-level package or module, the grain at which sites get text."""

    path: Path
    name: str
    size: int

    @property
    def unit(self) -> str:
        return self.name.split("/", 1)[0].removesuffix(".py")

    @property
    def held_out(self) -> bool:
        """Whether the file is never trained on: one in twenty, by a hash of its name."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def sources(root: Path | None = None) -> list[Source]:
    """All files of the standard library (or of `root`), sorted by name; empty files are left out."""
    root = Path(root or sysconfig.get_path("stdlib"))
    found = [Source(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in _walk(root)]
    return sorted((s for s in found if s.size > 0), key=lambda s: s.name)


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _SKIP and not path.name.startswith(("config-", "lib-dynload")):
                yield from _walk(path)
        elif path.suffix == ".py":
            yield path


def split(n_sites: int, root: Path | None = None) -> list[list[Source]]:
    """Training files of each site: whole packages, the largest first to the site that has least so far.

    Raises:
        ValueError: fewer packages than sites.
    """
    units: dict[str, list[Source]] = defaultdict(list)
    for source in sources(root):
        if not source.held_out:
            units[source.unit].append(source)
    if not 1 <= n_sites <= len(units):
        raise ValueError(f"n_sites={n_sites}: there are {len(units)} packages to share out, one or more for each site")
    sites: list[list[Source]] = [[] for _ in range(n_sites)]
    sizes = [0] * n_sites
    for unit in sorted(units, key=lambda u: (-sum(s.size for s in units[u]), u)):
        least = sizes.index(min(sizes))
        sites[least] += units[unit]
        sizes[least] += sum(s.size for s in units[unit])
    return sites


def held_out(root: Path | None = None) -> list[Source]:
    """The files that no site trains on."""
    return [s for s in sources(root) if s.held_out]


def site_number(name: str) -> int:
    """0 for "site-1", 1 for "site-2" and so on: which part of the text the site has."""
    match = re.search(r"(\d+)$", name)
    if match is None or match[1] == "0":
        raise ValueError(f"site name {name!r} must end in its number, counted from 1, such as site-1")
    return int(match[1]) - 1


def of_site(name: str, n_sites: int) -> torch.Tensor:
    """The text that the site `name` trains on, one of `n_sites`, as bytes."""
    return read(split(n_sites)[site_number(name) % n_sites])


def read(files: list[Source]) -> torch.Tensor:
    """The files' bytes one after the other, as a uint8 tensor."""
    return torch.from_numpy(np.concatenate([np.fromfile(s.path, dtype=np.uint8) for s in files]))


def held_out_sample(rows: int, context: int, root: Path | None = None) -> torch.Tensor:
    """`rows` windows of `context + 1` bytes, evenly spaced over the held-out text: the same for every run."""
    text = read(held_out(root))
    starts = np.linspace(0, len(text) - context - 1, rows).astype(np.int64)
    return torch.stack([text[s : s + context + 1] for s in starts.tolist()])
