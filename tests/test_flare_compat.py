"""Which releases of FLARE this package takes. The others are not installed: what pip notes of one is there."""

from __future__ import annotations

import pytest

from nvflare_rdma import flare_compat
from nvflare_rdma.errors import UnsupportedVersionError
from nvflare_rdma.flare_compat import TRIED, require_flare


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Has a release of FLARE be found before the one that is here."""

    def noted(version: str) -> None:
        (tmp_path / f"nvflare-{version}.dist-info").mkdir()
        (tmp_path / f"nvflare-{version}.dist-info/METADATA").write_text(f"Name: nvflare\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    caches = (require_flare, flare_compat._warn_of)
    for cache in caches:
        cache.cache_clear()
    yield noted
    for cache in caches:
        cache.cache_clear()


def test_a_patch_release_that_was_not_tried_is_told_once(install, caplog):
    install("2.9.97")
    for feature in ("the driver", "RdmaTransfer", "the driver"):
        require_flare(feature)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "NVIDIA FLARE 2.9.97 was not tried with nvflare-rdma" in record.message
    assert f"which was tried with {', '.join(TRIED)}. It is used" in record.message


@pytest.mark.parametrize("version", TRIED)
def test_nothing_is_told_of_one_that_was_tried(install, caplog, version):
    install(version)
    require_flare("the driver")
    assert caplog.records == []


@pytest.mark.parametrize("version", ["2.8.3", "2.10.0", "3.0", "unknown"])
def test_another_release_is_refused(install, version):
    install(version)
    with pytest.raises(UnsupportedVersionError, match=rf"internals of NVIDIA FLARE 2\.9, but {version} is installed"):
        require_flare("the driver")
