from __future__ import annotations

import pytest

from nvflare_rdma.errors import ConfigError
from nvflare_rdma.settings import Settings, parse_settings


def test_defaults_and_overrides():
    assert parse_settings({}) == Settings()
    parsed = parse_settings({"rdma_fabrics": "tcp", "rdma_rails": "4", "rdma_chunk_bytes": 65536})
    assert (parsed.rdma_fabrics, parsed.rdma_rails, parsed.rdma_chunk_bytes) == (("tcp",), 4, 65536)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rdma_rail": 2}, r"unknown setting 'rdma_rail'=2. Allowed: rdma_fabrics, rdma_chunk_bytes"),
        ({"rdma_rails": "two"}, r"rdma_rails='two' is not a whole number. Allowed: 1 to 64"),
        ({"rdma_rails": 2.5}, r"rdma_rails=2.5 is not a whole number"),
        ({"rdma_rails": True}, r"rdma_rails=True is not a whole number"),
        ({"rdma_rails": 0}, r"rdma_rails=0 is out of range. Allowed: 1 to 64"),
        ({"rdma_chunk_bytes": 100}, r"rdma_chunk_bytes=100 is out of range. Allowed: 65536 to 67108864"),
        ({"rdma_fabrics": "infiniband"}, r"rdma_fabrics='infiniband': unknown fabric 'infiniband'"),
    ],
)
def test_a_bad_setting_names_key_value_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(values)
