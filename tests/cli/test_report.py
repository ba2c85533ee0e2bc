from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("nvflare")

from nvflare_rdma.cli import main
from nvflare_rdma.cli.output import CommandError
from nvflare_rdma.cli.report_figures import Effort, Moved, report_on
from nvflare_rdma.cli.report_html import page
from nvflare_rdma.cli.report_markup import element
from nvflare_rdma.cli.report_records import choose, find_jobs
from nvflare_rdma.cli.report_text import to_text
from nvflare_rdma.cli.report_words import amount, fold, headline, notes, seconds, speed
from tests.support.recorded_jobs import JOB, RAW, WIRE, RecordedJob, provisioned, simulated

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
HEADLINE = (
    "3 rounds, 2 sites: 2.40 GB of models travelled as 338 MB; all direct, over tcp; "
    "the slowest site was site-2 (36.0 s)."
)


def report_of(path, wanted=None):
    jobs = find_jobs(path)
    return report_on(jobs, choose(jobs, wanted), path)


def records_of(folder):
    return folder / "nvflare_rdma" / "transfers.jsonl"


# -- figures ----------------------------------------------------------------------------------------------


def test_a_transfer_with_records_at_both_ends_counts_once(tmp_path):
    report = report_of(simulated(tmp_path))
    assert report.moved == Moved(12, 12 * RAW, 12 * WIRE)
    assert report.effort == Effort(direct=12, fallback=0, failed=0, resent_chunks=0, budget_peak_bytes=7)
    assert headline(report) == HEADLINE
    assert notes(report) == []
    assert [each.round for each in report.rounds] == [0, 1, 2]
    for each in report.rounds:
        assert each.down == each.up == Moved(2, 2 * RAW, 2 * WIRE)
        assert each.between == Moved()
        assert (each.slowest_site, each.slowest_seconds) == ("site-2", 12.0)
        assert each.goodput == 4 * RAW / 16
    server, one, two = report.sites
    assert (server.name, one.name, two.name) == ("server", "site-1", "site-2")
    assert server.received == server.sent == Moved(6, 6 * RAW, 6 * WIRE)
    assert (one.busy.seconds, one.busy.received_seconds, two.busy.sent_seconds) == (12.0, 6.0, 18.0)
    assert one.fabrics == {"tcp": 6}


def test_a_sender_counts_where_the_receiver_has_written_nothing(tmp_path):
    simulated(tmp_path)
    shutil.rmtree(tmp_path / "site-2")
    report = report_of(tmp_path)
    assert report.moved.transfers == 12
    (site,) = [site for site in report.sites if site.name == "site-2"]
    assert not site.wrote_records
    assert site.received == Moved(3, 3 * RAW, 3 * WIRE)
    assert site.busy.seconds == 36.0
    assert [note for note in notes(report) if "No records of site-2 are here" in note]


def test_a_sender_counts_where_it_has_more_records_than_the_receiver(tmp_path):
    simulated(tmp_path)
    file = records_of(tmp_path / "site-1" / "simulate_job")
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["round"] != 1]
    file.write_text("".join(f"{line}\n" for line in kept))
    assert report_of(tmp_path).moved.transfers == 12


def test_fallbacks_and_failures_are_told_with_their_reasons(tmp_path):
    names = ("server", "site-1", "site-2")
    with RecordedJob({name: tmp_path / name for name in names}, JOB) as job:
        job.runs["server"].round(0)
        job.runs["site-1"].task(0)
        broke = {"raw_bytes": 0, "outcome": "failed: it has not asked again for 10 s"}
        job.write("server", "sent", "site-1", items=0, **{**broke, "wire_bytes": 5_000_000})
        whole = {"path": "flare", "fabric": "", "wire_bytes": RAW + 258}
        job.write("server", "sent", "site-1", reason="the receiver asked on FLARE's own path", **whole)
        job.write("site-1", "received", "server", reason=f"server.{JOB} did not answer", **whole)
        job.transfer("server", "site-2", resent_chunks=4)
    report = report_of(tmp_path)
    assert (report.effort.direct, report.effort.fallback, report.effort.failed) == (1, 1, 1)
    assert report.effort.resent_chunks == 4
    assert report.lost_bytes == 5_000_000
    (fallback,), (failure,) = report.fallbacks, report.failures
    assert (fallback.reason, fallback.ways, fallback.rounds) == ("server did not answer", ("server to site-1",), (0,))
    assert failure.reason == "it has not asked again for 10 s"
    for shown in (to_text(report), page(report)):
        assert fallback.reason in shown
        assert failure.reason in shown
    assert "1 of 2 transfers took FLARE's own path; 1 attempt failed on the way" in headline(report)
    assert "5.00 MB more travelled for attempts that failed." in notes(report)


def test_what_a_job_moves_from_site_to_site_and_outside_of_rounds(tmp_path):
    with RecordedJob({name: tmp_path / name for name in ("site-1", "site-2")}) as job:
        job.runs["site-1"].task(4)
        job.runs["site-2"].task(4)
        job.transfer("site-1", "site-2")
        job.runs["site-1"].pull()
        job.transfer("site-2", "site-1", kind="file", wire_bytes=RAW)
    report = report_of(tmp_path)
    assert [each.round for each in report.rounds] == [4, None]
    assert all(each.down == each.up == Moved() for each in report.rounds)
    assert report.moved == Moved(2, 2 * RAW, RAW + WIRE)
    assert "1 round, 2 sites: 400 MB of files and models" in headline(report)
    assert "site to site" in to_text(report)
    assert "outside of rounds" in page(report)


def test_the_loss_is_what_flare_has_averaged(tmp_path):
    simulated(tmp_path)
    lines = [
        {
            "round": n,
            "aggregated_metrics": [{"name": "accuracy", "value": 0.5}, {"name": "val_loss", "value": 2.0 - n / 2}],
        }
        for n in range(3)
    ]
    metrics = tmp_path / "server" / "simulate_job" / "metrics"
    metrics.mkdir()
    (metrics / "round_metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"round": 3, "agg')
    report = report_of(tmp_path)
    assert report.loss_name == "val_loss"
    assert [each.loss for each in report.rounds] == [2.0, 1.5, 1.0]
    assert "val_loss: from 2 in round 0 to 1 in round 2" in page(report)
    assert "loss" in to_text(report)


# -- where records are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "prod_00", "prod_00/site-1", "prod_00/admin@nvidia.com/transfer"])
def test_records_are_found_in_every_folder_that_people_have(tmp_path, below):
    provisioned(tmp_path / "prod_00")
    report = report_of(tmp_path / below)
    assert report.job == JOB
    wrote = {site.name for site in report.sites if site.wrote_records}
    expected = {"": {"server", "site-1", "site-2"}, "site-1": {"site-1"}, "transfer": {"server"}}
    assert wrote == expected.get(Path(below).name, expected[""])
    assert report.moved.transfers == (6 if below.endswith("site-1") else 12)


def test_a_jobs_folder_is_enough(tmp_path):
    downloaded = provisioned(tmp_path / "kits")
    moved = downloaded.rename(tmp_path / "results")
    (moved / "meta.json").write_text(json.dumps({"name": "mine", "status": "FINISHED:COMPLETED"}))
    report = report_of(moved)
    assert (report.job, report.name, report.status) == (JOB, "mine", "FINISHED:COMPLETED")
    for folder in (moved / "workspace", records_of(moved / "workspace"), tmp_path / "kits" / "site-2" / JOB):
        assert report_of(folder).job == JOB


def test_a_job_that_was_downloaded_twice_counts_once(tmp_path):
    downloaded = provisioned(tmp_path / "kits")
    shutil.copytree(downloaded, tmp_path / "again")
    assert report_of(tmp_path).moved.transfers == 12
    assert len(report_of(tmp_path).sites[0].entries) == 12


def test_of_several_jobs_it_is_the_newest_or_the_one_that_is_asked_for(tmp_path, capsys):
    provisioned(tmp_path / "kits", JOB, began=1.8e9)
    newer = JOB.replace("0f8f", "1111")
    provisioned(tmp_path / "kits", newer, began=1.9e9, rounds=1)
    report = report_of(tmp_path)
    assert report.job == newer
    assert notes(report) == [f"1 other job with records here, for --job: {JOB}."]
    assert report_of(tmp_path, "0f8f").job == JOB
    assert main(["report", str(tmp_path), "--job", "2222"]) == 1
    said = capsys.readouterr().err
    assert "job '2222' is not there" in said
    assert JOB in said
    assert newer in said
    assert "Code: JOB_NOT_FOUND" in said


def test_simulated_jobs_have_one_id_and_are_told_apart_by_folder(tmp_path):
    simulated(tmp_path / "a")
    simulated(tmp_path / "b", rounds=1)
    assert {job.label for job in find_jobs(tmp_path)} == {"a/simulate_job", "b/simulate_job"}
    assert report_of(tmp_path, "b/simulate_job").moved.transfers == 4
    with pytest.raises(CommandError, match="'simulate_job' is one of several: "):
        report_of(tmp_path, "simulate_job")


@pytest.mark.parametrize("command", [[], ["--text"], ["--format", "json"]])
def test_without_records_one_error_says_how_to_get_some(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ws" / "server" / "simulate_job").mkdir(parents=True)
    assert main(["report", "ws", *command]) == 1
    said = "".join(capsys.readouterr())
    assert "no nvflare_rdma/transfers.jsonl in ws" in said
    assert "add_transfer" in said
    assert "nvflare job download" in said
    assert "NO_RECORDS" in said
    assert not (tmp_path / "report.html").exists()
    assert main(["report", "nowhere", *command]) == 1
    assert "nowhere does not exist" in "".join(capsys.readouterr())


DAMAGED = [
    b'{"round": 0, "time": 18000',
    b"\xff\x00\xfe",
    b"[]",
    b'"text"',
    b"{}",
    b"[" * 100_000,
    *(
        json.dumps({**line, **wrong}).encode()
        for line in [{"round": 0, "time": 1.0, "direction": "sent", "cell": "server.j", "peer": "site-1.j"}]
        for line in [{**line, "kind": "tensors", "items": 1, "raw_bytes": 1, "wire_bytes": 1, "seconds": 1.0}]
        for line in [{**line, "resent_chunks": 0, "fabric": "tcp", "budget_peak_bytes": 0, "path": "direct"}]
        for line in [{**line, "reason": "", "outcome": "done"}]
        for wrong in (
            *({"time": value} for value in (float("nan"), float("inf"), 1e300, "now", None, [])),
            *({"relative_error": value} for value in (-1, "much", float("nan"))),
            *({"raw_bytes": value} for value in (-1, 10**400, 1.5, True, {})),
            *({"peer": 7}, {"direction": "up"}, {"round": "x"}, {"round": -1}),
        )
    ),
]


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    simulated(tmp_path)
    before = report_of(tmp_path)
    file = records_of(tmp_path / "site-1" / "simulate_job")
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b"", *DAMAGED, *lines[1:], lines[0][:40]]))
    report = report_of(tmp_path)
    assert report.damaged_lines == len(DAMAGED) + 1
    assert (report.moved, report.rounds) == (before.moved, before.rounds)
    (note,) = notes(report)
    assert note.startswith(f"{len(DAMAGED) + 1} lines of records are damaged or half-written and left out (site-1)")


def test_records_that_cannot_be_read_are_told(tmp_path):
    simulated(tmp_path)
    file = records_of(tmp_path / "site-3" / "simulate_job")
    file.parent.mkdir(parents=True)
    file.symlink_to("/proc/self/mem")  # which not even root can read from its beginning
    report = report_of(tmp_path)
    assert notes(report) == [f"Records may be missing: can't read {file}: Input/output error."]
    with pytest.raises(CommandError, match=f"can't read {file}"):
        find_jobs(tmp_path / "site-3")


def test_where_no_line_is_whole_that_is_the_error(tmp_path):
    file = records_of(tmp_path / "site-1" / "simulate_job")
    file.parent.mkdir(parents=True)
    file.write_bytes(b'{"round": 0, "ti')
    with pytest.raises(CommandError, match="no record of job simulate_job is whole: 1 damaged lines"):
        report_of(tmp_path)


def test_what_an_earlier_release_did_not_write_is_no_damage(tmp_path):
    file = records_of(simulated(tmp_path) / "site-1" / "simulate_job")
    new = ("codecs", "relative_error", "error_from", "digest")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({k: v for k, v in line.items() if k not in new}) for line in lines) + "\n")
    assert report_of(tmp_path).damaged_lines == 0


def test_what_a_later_release_adds_to_records_is_no_damage(tmp_path):
    file = records_of(simulated(tmp_path) / "site-1" / "simulate_job")
    lines = [json.dumps({**json.loads(line), "colour": "red"}) for line in file.read_text().splitlines()]
    file.write_text("\n".join(lines) + "\n")
    assert report_of(tmp_path).damaged_lines == 0


# -- what is shown ----------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'&\u202e\x1b[31m\n[red]\ud800"


@pytest.fixture
def hostile(tmp_path):
    """Records whose every text is hostile."""
    with RecordedJob({"site-1": tmp_path / "site-1"}) as job:
        job.runs["site-1"].task(0)
        texts = {"kind": HOSTILE, "fabric": HOSTILE}
        job.write("site-1", "received", HOSTILE, **texts)
        job.write("site-1", "received", HOSTILE, path="flare", reason=HOSTILE, **texts)
        job.write("site-1", "sent", HOSTILE, outcome=f"failed: {HOSTILE}", **texts)
    (tmp_path / "site-1" / "simulate_job" / "meta.json").write_text(json.dumps({"name": HOSTILE}))
    return report_of(tmp_path)


class Page(HTMLParser):
    """What is on a page: its tags and attributes, and whether each element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_what_peers_have_written_is_text_on_the_page(hostile):
    text = page(hostile)
    assert "script" not in Page(text).tags
    assert "&lt;script&gt;alert(1)" in text
    assert not [character for character in text if not (character.isprintable() or character == "\n")]
    text.encode()


def test_what_peers_have_written_gives_a_terminal_no_orders(hostile):
    text = to_text(hostile)
    assert not [character for character in text if not (character.isprintable() or character == "\n")]
    assert "[red]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_is_whole_and_asks_nobody_for_anything(tmp_path):
    text = page(report_of(simulated(tmp_path)))
    found = Page(text)
    assert found.open == []
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(found.tags)
    assert not {"src", "href", "style", "action"} & {name for name, _ in found.attributes}
    assert set(re.findall(r"url\(([^)]*)", text)) == {"#flare", "#failed"}
    assert "http" not in text.replace("http-equiv", "")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    (policy,) = [value for name, value in found.attributes if name == "content" and "default-src" in value]
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert HEADLINE in text


def test_numbers_beyond_all_measure_are_shown(tmp_path):
    file = records_of(simulated(tmp_path) / "site-1" / "simulate_job")
    first = json.loads(file.read_text().splitlines()[0])
    wild = {"time": 9e18, "seconds": 1e-300, "raw_bytes": 1 << 62, "wire_bytes": 1 << 62, "round": 1 << 62}
    file.write_text(
        "".join(json.dumps({**first, key: value, "raw_bytes": 1 << 62}) + "\n" for key, value in wild.items())
    )
    metrics = tmp_path / "server" / "simulate_job" / "metrics"
    metrics.mkdir()
    losses = [1e308, -1e308, float("nan"), 2.5, 10**400]
    lines = [{"round": n, "aggregated_metrics": [{"name": "loss", "value": v}]} for n, v in enumerate(losses)]
    (metrics / "round_metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = report_of(tmp_path)
    assert report.damaged_lines == 0
    assert [each.loss for each in report.rounds if each.loss is not None] == []
    text = page(report)
    assert not re.findall(r'"(?:nan|inf|-)[^"]*%"', text)
    assert max(map(len, to_text(report).splitlines())) <= 80


def test_a_page_of_many_transfers_stays_small(tmp_path):
    with RecordedJob({"site-1": tmp_path}) as job:
        job.runs["site-1"].task(0)
        for n in range(5000):
            job.now += 1.0
            job.write("site-1", "sent", f"site-{n % 3}", seconds=8.5)
    report = report_of(tmp_path)
    assert report.moved.transfers == 5000
    assert page(report).count("<rect") < 3200


def test_an_element_escapes_all_that_is_no_element():
    assert element("p", "<b>", element("b", "&"), class_='"') == '<p class="&quot;">&lt;b&gt;<b>&amp;</b></p>'


@pytest.mark.parametrize("long", [False, True])
def test_the_text_fits_80_columns(tmp_path, long):
    names = ("server", "site-1", "hospital-of-a-town-" + "x" * 90) if long else ("server", "site-1", "site-2")
    with RecordedJob({name: tmp_path / str(n) for n, name in enumerate(names)}) as job:
        for number in range(12):
            job.round(number, slow=names[2])
            if long:
                job.transfer(names[1], names[2], path="flare", fabric="", reason="r" * 200)
                job.transfer(names[2], names[1], outcome="failed: " + "because " * 30, resent_chunks=123_456)
    text = to_text(report_of(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) > 20


def test_the_same_figures_are_on_the_page_in_the_text_and_in_the_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    simulated(tmp_path / "ws")
    assert main(["report", "ws"]) == 0
    assert capsys.readouterr().out.splitlines() == [HEADLINE, "The page is report.html."]
    shown = (tmp_path / "report.html").read_text()
    assert main(["report", "ws", "--text"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert main(["report", "ws", "--format", "json"]) == 0
    data = json.loads(capsys.readouterr().out)["data"]
    assert data["headline"] == HEADLINE
    assert data["page"] is None
    assert "entries" not in data["sites"][0]
    for each in data["rounds"]:
        for figure in (amount(each["moved"]["raw_bytes"]), seconds(each["slowest_seconds"]), speed(each["goodput"])):
            assert figure in printed
    for figure in (amount(data["moved"]["raw_bytes"]), amount(data["moved"]["wire_bytes"]), HEADLINE):
        assert figure in printed
        assert figure in shown


def test_output_names_the_page_for_every_format(tmp_path, capsys):
    simulated(tmp_path / "ws")
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "ws"), "--format", "json", "--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["page"] == str(output)
    assert output.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path, capsys):
    simulated(tmp_path / "ws")
    (tmp_path / "taken").mkdir()
    for output, reason in (("taken", "Is a directory"), ("nowhere/page.html", "No such file or directory")):
        assert main(["report", str(tmp_path / "ws"), "--output", str(tmp_path / output)]) == 1
        said = capsys.readouterr().err
        assert f"can't write the page to {tmp_path / output}: {reason}" in said
        assert "Code: NOT_WRITTEN" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "ws"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (amount(999), "999 B"),
        (amount(1_204_000_000), "1.20 GB"),
        (amount(170_400_000), "170 MB"),
        (amount(9_996_000), "10.0 MB"),
        (amount(1_500_000_000_000_000), "1500 TB"),
        (speed(0), "-"),
        (speed(56_120_000), "56.1 MB/s"),
        (seconds(0.449), "0.45 s"),
        (seconds(128.9), "2 min 9 s"),
        (seconds(3599.7), "1 h 0 min"),
        (fold(Moved(1, 100, 14)), "7.1x"),
        (fold(Moved(1, 100, 101)), "-"),
        (fold(Moved()), "-"),
    ],
)
def test_amounts_are_told_with_the_digits_that_people_read(said, expected):
    assert said == expected


# -- in a browser -----------------------------------------------------------------------------------------


def console_of(browser, file, profile):
    """What a page writes to the console when it is opened from disk."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0"]
    command += [f"--user-data-dir={profile}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "</html>" in done.stdout, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_opens_the_page_without_a_word_on_its_console(tmp_path, hostile):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    for name, report in (("hostile", hostile), ("plain", report_of(simulated(tmp_path / "ws")))):
        file = tmp_path / f"{name}.html"
        file.write_text(page(report), encoding="utf-8")
        assert console_of(browser, file, tmp_path / "profile") == []
    file.write_text(page(report).replace("<main>", "<main><script>console.log('x')</script>"), encoding="utf-8")
    assert console_of(browser, file, tmp_path / "profile"), "this test sees nothing"
