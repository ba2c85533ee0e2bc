"""How far `nvflare-rdma plan` is off: what it predicts for rounds over a WAN, beside what `wan_rounds.py` has measured.

    python benchmarks/plan_check.py build/wan_rounds.jsonl

Every row of `RdmaTransfer` counts (FLARE's own ways are not planned): the median of its rounds after the first one.
``first``: the round in which links are opened, measured and planned. 1:10 says that one site's line has a tenth of the
rate. The last line is the worst error of a usual round, and says how many are within 25 %.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from state_dict import model_shapes
from wan_rounds import CONFIGURATIONS, Case, medians

from nvflare_rdma.cli.link_model import Line
from nvflare_rdma.cli.models import Tensor
from nvflare_rdma.cli.plan import Choice, CodecPlan, Site, plan
from nvflare_rdma.codecs import Policy

GOAL = 0.25
HEADING = f"{'seconds of a round':<43}{'measured':>9}   plan error  first   plan"


def planned(case: Case, codec: str) -> CodecPlan:
    """As `wan_rounds` moves it: every tensor of the model goes through the codec, without any rule."""
    model = [Tensor(name, "float32", shape) for name, shape in model_shapes(case.mib).items()]
    links = [case.link(number) for number in range(case.sites)]
    sites = [
        Site(f"site-{number}", Line(link.rate * 1e6, 2 * link.delay / 1e3, link.loss / 100))
        for number, link in enumerate(links)
    ]
    policy = Policy(codec) if codec else None
    (found,) = plan(model, sites, [Choice(codec, policy, policy)], 0)
    return found


def compare(lines: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """A row of text for each line, and its error."""
    for line in lines:
        case, way = Case(**line["case"]), CONFIGURATIONS[line["configuration"]]
        if not way.direct or not (found := medians(line["rounds"])):
            continue
        one = planned(case, way.codec)
        off = one.seconds / found["seconds"] - 1
        slow = f" 1:{case.slow:g}" if case.slow != 1 else ""
        wires = f"{case.rate:g}M {case.rtt:g}ms {case.loss:g}% {case.congestion}{slow}"
        yield (
            (
                f"{case.sites} x {case.mib:>2} MiB  {wires:<25} {line['configuration']:<6} {found['seconds']:6.2f}"
                f" {one.seconds:6.2f} {off:+5.0%} {line['rounds'][0]['seconds']:6.2f} {one.seconds_of_rounds(1):6.2f}"
            ),
            off,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what wan_rounds.py --json has written")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    rows = list(compare([line for line in lines if "case" in line]))
    errors = [off for _, off in rows]
    print(HEADING)
    for text, _ in rows:
        print(text)
    if not errors:
        raise SystemExit(f"{args.results} has no rounds of RdmaTransfer")
    near = sum(abs(one) <= GOAL for one in errors)
    worst = max(errors, key=abs)
    print(f"worst error {worst:+.0%}; {near} of {len(errors)} rows are within {GOAL:.0%}")


if __name__ == "__main__":
    main()
