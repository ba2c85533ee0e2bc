import pytest
from data_channels import cells


@pytest.fixture
def cell():
    """cell("site-1", ports=..., tls=...) -> DataChannels"""
    with cells() as make:
        yield make
