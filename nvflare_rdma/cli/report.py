"""`nvflare-rdma report WORKSPACE|JOB_DIR`: what the transfers of a job did, from the records that its processes wrote.

report_records   finds records below a folder, and reads them
report_figures   adds them up
report_html      makes the page of it; `report_svg` draws its bars and timelines
report_text      makes the text for terminals
report_words     has the sentences and units of both
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nvflare_rdma.cli.output import ENVIRONMENT, CommandError, Result
from nvflare_rdma.cli.report_figures import Report, report_on
from nvflare_rdma.cli.report_html import page
from nvflare_rdma.cli.report_records import choose, find_jobs
from nvflare_rdma.cli.report_text import to_text
from nvflare_rdma.cli.report_words import headline, notes
from nvflare_rdma.logs import escaped

PAGE = "report.html"


def report_result(path: Path, job: str | None, output: Path | None, text: bool, form: str) -> Result:
    """Make the report on a job below `path`, write the page, and say so; or give it as text or data.

    The page is written to `output`; without one to `report.html`, unless text or data is asked for.

    Raises:
        CommandError: there are no records, or not of that job; or the page can't be written.
    """
    jobs = find_jobs(path)
    report = report_on(jobs, choose(jobs, job), path)
    if output is None and not text and form == "txt":
        output = Path(PAGE)
    if output is not None:
        _write(output, page(report))
    data = {"headline": headline(report), **_data(report), "page": None if output is None else str(output)}
    if text:
        return Result(data, to_text(report))
    said = [headline(report), *notes(report), f"The page is {output}."]
    return Result(data, "\n".join(escaped(line) for line in said))


def _data(report: Report) -> dict[str, Any]:
    """The report for programs. Single transfers are in the records themselves."""
    data = asdict(replace(report, sites=tuple(replace(site, entries=()) for site in report.sites)))
    for site in data["sites"]:
        del site["entries"]
    return data


def _write(output: Path, content: str) -> None:
    """Write the page as a whole, so that nobody opens half of it."""
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        try:
            beside.write_text(content, encoding="utf-8")
            os.replace(beside, output)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        what = f"can't write the page to {output}: {error.strerror}"
        raise CommandError("NOT_WRITTEN", what, "name another file with --output", ENVIRONMENT) from error
