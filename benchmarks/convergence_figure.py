"""Quality against bytes: a figure of the tables that convergence.py has written, and of what others have published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FULL = "fp32"
#: Others' codecs: (name, how many times fewer bytes, percent of quality lost), as their authors say: none, or less than
#: so much. Models, data and measures are other ones, so these don't compare beyond the bytes.
PUBLISHED = (
    ("FLARE NF4", (7.1, 7.1), 0.0),
    ("APPFL SZ, < 0.5 %", (5.5, 12.6), 0.5),
    ("PULSE, lossless bf16, > 100", (100.0, 100.0), 0.0),
    ("SparseLoCo, > 146", (146.0, 146.0), 0.0),
)
_FLAT = 0.1  # percent, below which the axis is linear


@dataclass(frozen=True)
class Row:
    """A table's message: how many times fewer bytes, over all rounds and after the first; what it lost, in percent."""

    name: str
    times: float
    later: float
    lost: float


def rows(path: Path) -> list[Row]:
    """All rows of a table but that of full precision."""
    lines = [line.split("|")[1:-1] for line in path.read_text().splitlines() if line.startswith("|")]
    found = []
    for line in lines[2:]:
        cells = {head.strip(): cell.strip() for head, cell in zip(lines[0], line, strict=True)}
        if cells["messages"] == FULL:
            continue
        if "times fewer" in cells:
            times, later = float(cells["times fewer"]), float(cells["after the first round"])
        else:
            times = later = 100 / float(cells["bytes a round"].rstrip(" %"))
        found.append(Row(cells["messages"], times, later, float(cells["against fp32"].rstrip(" %"))))
    return found


def draw(tables: dict[str, Path], path: Path) -> None:
    """A dot a message, with a line to where it is when its first, whole model counts."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "convergence", "font.size": 8}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    most = 0.0
    for i, (label, file) in enumerate(tables.items()):
        found = rows(file)
        most = max([most, *(row.lost for row in found)])
        axes.plot([r.later for r in found], [r.lost for r in found], "os^D"[i], color=f"C{i}", label=label)
        for row in found:
            axes.plot([row.times, row.later], [row.lost, row.lost], color=f"C{i}", linewidth=1)
            axes.annotate(row.name, (row.later, row.lost), xytext=(4, 4 - 14 * (i % 2)), textcoords="offset points")
    for i, (name, (first, last), lost) in enumerate(PUBLISHED):
        label = "as published, with other models and measures" if i == 0 else None
        axes.plot([first, last], [lost, lost], "D--", color="grey", markerfacecolor="none", label=label)
        axes.annotate(name, (first, lost), xytext=(0, -12 - 9 * (i % 2)), textcoords="offset points", color="grey")
    axes.axhline(0, color="black", linewidth=0.5)
    axes.axhline(1, color="black", linewidth=0.5, linestyle=":")
    axes.set(
        xscale="log", xlabel="times fewer bytes than fp32 both ways; a line leads to what the first round makes of it"
    )
    axes.set_yscale("symlog", linthresh=_FLAT)
    axes.set_ylim(-1.5 * _FLAT, 1.6 * most)  # room for names
    axes.set_xlim(1, 500)
    axes.set(ylabel="final held-out loss against fp32, percent")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200], labels=["1", "2", "5", "10", "20", "50", "100", "200"])
    axes.legend(loc="upper left")
    figure.savefig(path, metadata={"Date": None})
