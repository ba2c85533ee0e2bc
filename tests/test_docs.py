"""What the docs say of the code, where that can be compared."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from nvflare_rdma.cli import _parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
USER_GUIDE_LINES = 150
#: Files that the design names and that are being made.
TO_COME = {"channel/control_writer.py", "transfer/content.py", "transfer/encoding.py", "transfer/requests.py"}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures():
    return load(DOCS / "pictures.py")


def test_the_pictures_show_the_code_as_it_is(pictures):
    page = pictures.PAGE.read_text()
    assert page == pictures.with_pictures(page), "run: python docs/pictures.py --write"


def test_a_circle_of_imports_is_no_picture(pictures):
    with pytest.raises(ValueError, match=r"circle: \['a', 'b'\]"):
        pictures.floors_of({"a": {"b"}, "b": {"a"}, "c": set()})


def test_the_threads_in_the_design_are_those_of_the_code():
    named = set(re.findall(r"rdma-[a-z]+(?:-[a-z]+)*", (DOCS / "design.md").read_text()))
    code = "\n".join(path.read_text() for path in (ROOT / "nvflare_rdma").rglob("*.py"))
    assert len(named) > 5
    assert not [name for name in named if f'"{name}' not in code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_files_lead_somewhere(page):
    """Sphinx looks at those between pages; these are the others, and those of the folder's figures."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_files_in_the_design_exist():
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", (DOCS / "design.md").read_text()))
    package = ROOT / "nvflare_rdma"
    roots = (ROOT, package, package / "channel", package / "fabric")
    missing = {name for name in named if not any((root / name).exists() for root in roots)}
    assert len(named) > 40
    assert missing <= TO_COME


def user_guide():
    """All groups but the last one."""
    index = (DOCS / "index.md").read_text()
    groups = dict(re.findall(r":caption: ([^\n]+)\n\n(.*?)```", index, re.DOTALL))
    assert list(groups)[-1] == "Contributing"
    return [DOCS / f"{name}.md" for group, names in groups.items() if group != "Contributing" for name in names.split()]


@pytest.mark.parametrize("page", user_guide(), ids=lambda page: page.stem)
def test_a_page_of_the_user_guide_is_short(page):
    assert len(page.read_text().splitlines()) <= USER_GUIDE_LINES


def commands():
    """What pages, and the README, have for a shell."""
    for page in (*PAGES, ROOT / "README.md"):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith("nvflare-rdma "):
                    yield pytest.param(line.strip(), id=f"{page.stem}: {line.strip()}")


@pytest.mark.parametrize("command", list(commands()))
def test_the_commands_are_those_that_there_are(command):
    _parser()[0].parse_args(shlex.split(command, comments=True)[1:])


@pytest.mark.parametrize("page", ["poc", "quickstart"])
def test_a_job_for_poc_is_for_its_sites_and_leaves_what_a_report_is_made_of(page):
    """A job that waits for more sites than there are never begins, and one without direct tensors has no records."""
    _, begin, rest = (DOCS / f"{page}.md").read_text().partition("nvflare poc prepare")
    text = begin + rest
    (sites,) = re.findall(r"^nvflare poc prepare -n (\d+)$", text, re.MULTILINE)
    (job,) = re.findall(r"^python (jobs/.*) --export ", text, re.MULTILINE)
    assert job.split()[1:] == ["--direct", "--sites", sites]
    steps = ["prepare", "enable", "start", "submit", "wait", "download", "report", "stop"]
    found = re.findall(rf"^nvflare(?:-rdma)?(?: poc| job)? ({'|'.join(steps)})\b", text, re.MULTILINE)
    assert found == steps


def included_pages():
    return {name for page in PAGES for name in re.findall(r"\{include\} (\S+)\.md", page.read_text())}


def test_a_page_begins_with_its_title():
    """What stands before it would be above it in the page, and without it the page has no name in the index."""
    first = {page.stem: page.read_text().partition("\n")[0] for page in PAGES if page.stem not in included_pages()}
    assert {name: line for name, line in first.items() if not line.startswith("# ")} == {}


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    included = included_pages()
    listed = set(re.findall(r"^([a-z-]+)$", index, re.MULTILINE))
    assert {page.stem for page in PAGES} - included - {"index"} == listed


@pytest.fixture
def project():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_hosted_build_names_what_there_is(project):
    hosted = yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    assert (ROOT / hosted["sphinx"]["configuration"]).samefile(DOCS / "conf.py")
    assert hosted["sphinx"]["fail_on_warning"] is True, "as `make docs` does"
    (install,) = hosted["python"]["install"]
    assert (ROOT / install["path"] / "pyproject.toml").exists()
    assert set(install["extra_requirements"]) <= set(project["options.extras_require"])
    assert "docs" in install["extra_requirements"]
    python = f"Programming Language :: Python :: {hosted['build']['tools']['python']}"
    assert python in project["metadata"]["classifiers"].splitlines()


def test_the_extra_has_what_the_build_of_the_docs_imports(project):
    conf = load(DOCS / "conf.py")
    modules = {name.partition(".")[0] for name in (conf.html_theme, *conf.extensions)}
    listed = re.findall(r"^([\w-]+)", project["options.extras_require"]["docs"], re.MULTILINE)
    assert modules == {name.replace("-", "_") for name in listed}
    for name in conf.html_css_files:
        assert any((DOCS / folder / name).is_file() for folder in conf.html_static_path), name


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("channel: revoke grants before their rail is dropped\n\nThe peer could still write.\n", ""),
        ("docs, tests: draw the floors", ""),
        ("Merge branch 'x'", ""),
        ("Draw the floors", "has to be"),
        ("docs: draw the floors.", "has to be"),
        ("docs: " + "draw " * 20 + "them", "72 are allowed"),
        ("docs: draw the floors\nthe reason", "has to be empty"),
    ],
)
def test_the_subject_of_a_commit(message, problem):
    found = load(ROOT / ".ci" / "check_message.py").problem(message)
    assert problem in found if problem else not found
