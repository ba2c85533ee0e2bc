"""Tensors of 8 and 4-bit types travel as they are, every way that there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from nvflare.app_opt.pt.tensor_downloader import TensorConsumer, TensorDownloadable
from safetensors import safe_open

from nvflare_rdma.codecs import is_loadable
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.streaming.relay import RelayConsumer, produce
from nvflare_rdma.transfer import content, manifest
from nvflare_rdma.transfer.content import TensorContent
from nvflare_rdma.transfer.places import OnDisk, in_memory
from nvflare_rdma.transfer.sender import Relayed
from tests.support.direct_transfers import new_memory

NAMES = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
)


def tensors(name) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, name)
    raw = torch.randint(0, 256, (300, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {
        "w": raw.view(dtype),
        "turned": raw.t()[:, ::2].view(dtype),
        "small": raw[0, :12].reshape(3, 4).view(dtype),
        "empty": torch.empty((0, 3), dtype=dtype),
        "scale": torch.ones(3),
    }


def assert_same(got, sent) -> None:
    assert got.keys() == sent.keys()
    for name, tensor in sent.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["links", "bundles", "description"])
def test_over_links_in_bundles_and_with_the_description(direct, cell, monkeypatch, name, how):
    if how != "links":
        monkeypatch.setattr(manifest, "BUNDLED_BYTES", 128 << 10)
    if how == "description":
        monkeypatch.setattr(content, "SMALL_TOTAL", 1 << 20)
    sent = tensors(name)
    assert_same(direct(sent).pull(cell("site-1")), sent)


@pytest.mark.parametrize("name", NAMES)
def test_into_files(direct, cell, tmp_path, name):
    sent = tensors(name)

    def land(item):
        assert OnDisk.takes(item)
        return OnDisk(item, str(tmp_path / item.name))

    got = {}
    for each, (path, key) in direct(sent).pull(cell("site-1"), land=land).items():
        with safe_open(path, framework="pt") as file:
            got[each] = file.get_tensor(key)
    assert_same(got, sent)


def test_a_single_pair_of_4_bits_is_no_matter_for_a_file():
    """The format counts single values, in the last dimension."""
    (item,) = manifest.describe({"x": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)})
    assert not OnDisk.takes(item)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_fallback_of_two_sides_with_this_package(name):
    made = TensorContent(tensors(name))
    items = made.items()
    assert any(item.needs_relay for item in items) == (name in ("float8_e8m0fnu", "float4_e2m1fn_x2"))
    relayed, consumer, state = Relayed(items, made), RelayConsumer(items, in_memory(new_memory)), None
    while (answer := produce(relayed, state))[0] == "ok":
        state = consumer.consume("", answer[2], answer[1])
    consumer.download_completed("")
    assert_same(consumer.result, tensors(name))


@pytest.mark.parametrize("name", NAMES)
def test_which_of_them_flares_own_path_carries(name):
    """Where it gets to, `is_loadable` has to be changed."""
    tensor = tensors(name)["w"]
    item = TensorDownloadable({"w": tensor}, 1 << 20).produce_item(0)
    if is_loadable(name):
        assert_same(TensorConsumer(None, {}).consume_items([item], None), {"w": tensor})
    else:
        with pytest.raises(KeyError):
            TensorConsumer(None, {}).consume_items([item], None)


@pytest.mark.parametrize("name", NAMES)
def test_through_the_filters(name):
    sent = {**tensors(name), "big": torch.ones(100, 100)}
    made = ModelQuantizer("normfloat4", one_way=True).process(
        DXO(DataKind.WEIGHTS, data=sent).to_shareable(), FLContext()
    )
    data = from_shareable(made).data
    assert data["w"] is sent["w"]
    assert data["big"].dtype == torch.uint8
    got = from_shareable(ModelDequantizer().process(made, FLContext())).data
    assert_same({each: torch.as_tensor(np.asarray(got[each])) if each == "big" else got[each] for each in got}, sent)
