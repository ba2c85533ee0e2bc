import pytest
from data_channels import cells
from direct_transfers import Direct
from tcp_pair import DEADLINE
from waiting import eventually


@pytest.fixture
def cell():
    """cell("site-1", ports=..., tls=...) -> DataChannels"""
    with cells() as make:
        yield make


@pytest.fixture
def direct(cell):
    """direct(tensors, ...) -> Direct"""
    made = []

    def make(tensors, **kinds):
        made.append(Direct(cell, tensors, **kinds))
        return made[-1]

    yield make
    for it in made:
        it.service.close()
        eventually(lambda it=it: not it.senders, DEADLINE)
