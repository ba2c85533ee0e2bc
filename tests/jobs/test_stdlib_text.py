from __future__ import annotations

import pytest
import stdlib_text
import torch


@pytest.fixture
def library(tmp_path):
    """A library in small: packages and modules of different sizes, and folders that are not part of it."""
    for i in range(30):
        package = tmp_path / f"pack{i:02}"
        package.mkdir()
        for j in range(4):
            (package / f"m{j}.py").write_text(f"x = {i} + {j}\n" * (i + 1))
        (tmp_path / f"mod{i:02}.py").write_text("y = 1\n" * (3 * i + 1))
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("no code")
    for skipped in ("site-packages", "test", "pack00/tests"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "other.py").write_text("z = 2\n")
    return tmp_path


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 5])
def test_every_file_is_with_one_site_or_held_out(library, n_sites):
    sites = stdlib_text.split(n_sites, library)
    held_out = stdlib_text.held_out(library)
    names = [s.name for site in sites for s in site] + [s.name for s in held_out]
    assert len(names) == len(set(names))
    assert set(names) == {s.name for s in stdlib_text.sources(library)}
    assert all(sites)
    assert held_out


@pytest.mark.parametrize("n_sites", [1, 2, 3, 4, 5])
def test_the_installed_library_can_be_split(n_sites):
    sizes = [sum(s.size for s in site) for site in stdlib_text.split(n_sites)]
    assert min(sizes) > 500_000
    assert max(sizes) < 1.1 * min(sizes)


def test_sites_differ_by_whole_packages(library):
    units = [{s.unit for s in site} for site in stdlib_text.split(3, library)]
    assert not units[0] & units[1]
    assert not units[1] & units[2]
    assert not units[0] & units[2]


def test_the_split_does_not_depend_on_the_order_of_the_file_system(library, monkeypatch):
    expected = stdlib_text.split(3, library), stdlib_text.held_out(library)
    walk = stdlib_text._walk
    monkeypatch.setattr(stdlib_text, "_walk", lambda root: reversed(list(walk(root))))
    assert (stdlib_text.split(3, library), stdlib_text.held_out(library)) == expected


def test_tests_site_packages_and_other_files_are_left_out(library):
    names = {s.name for s in stdlib_text.sources(library)}
    assert "mod03.py" in names
    assert not {n for n in names if "other.py" in n or n.endswith(".txt") or n == "empty.py"}


@pytest.mark.parametrize("n_sites", [0, 61])
def test_sites_that_would_get_nothing_are_refused(library, n_sites):
    with pytest.raises(ValueError, match=f"n_sites={n_sites}: there are 60 packages"):
        stdlib_text.split(n_sites, library)


def test_held_out_sample_is_fixed_and_from_held_out_text(library):
    first = stdlib_text.held_out_sample(5, 16, library)
    assert first.shape == (5, 17)
    assert first.dtype == torch.uint8
    assert torch.equal(first, stdlib_text.held_out_sample(5, 16, library))
    text = bytes(stdlib_text.read(stdlib_text.held_out(library)).tolist())
    assert all(bytes(row.tolist()) in text for row in first)
    assert bytes(first[0].tolist()) == text[:17]
    assert bytes(first[-1].tolist()) == text[-17:]


def test_site_numbers():
    assert [stdlib_text.site_number(name) for name in ("site-1", "site-12")] == [0, 11]
    for name in ("hospital", "site-0"):
        with pytest.raises(ValueError, match=name):
            stdlib_text.site_number(name)
