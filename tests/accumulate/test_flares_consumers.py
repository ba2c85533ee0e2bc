"""What FLARE's own workflows, aggregators and filters make of results is the same, whether these are encoded still."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.dxo_aggregator import DXOAggregator
from nvflare.app_common.app_constant import AlgorithmConstants, AppConstants
from nvflare.app_common.filters.exclude_vars import ExcludeVars
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.base_fedavg import BaseFedAvg
from nvflare.app_common.workflows.scaffold import scaffold_aggregate_fn
from nvflare.app_opt.pt.fedopt_ctl import FedOpt

from nvflare_rdma.accumulate import Encoded, EncodedParts, Holdings, Plain, Spool, encoded_tensor, is_encoded_tensor
from nvflare_rdma.codecs import get_codec

SHAPES = {"weight": (30, 40), "bias": (65,)}
CODEC = get_codec("normfloat4")


def result(site: int, encoded: bool | str, holdings: Holdings | None = None) -> dict[str, torch.Tensor]:
    """One site's, as it came (in few bits, or "on disk", in full precision), or decoded."""
    found, holdings = {}, holdings or Holdings()
    spool = Spool(holdings.disk, "site-1")
    for number, (name, shape) in enumerate(SHAPES.items()):
        values = np.random.default_rng(10 * site + number).standard_normal(shape).astype(np.float32)
        buffer = np.empty(CODEC.encoded_nbytes(values.size), np.uint8)
        CODEC.encode_into(values.reshape(-1), buffer)
        decoded = np.empty(values.size, np.float32)
        CODEC.decode_into(buffer, decoded)
        waiting: Encoded = EncodedParts(CODEC, CODEC.parts(buffer, values.size), values.size, "float32")
        if encoded == "on disk":
            place = spool.reserve(decoded.nbytes)
            place.write(0, decoded.view(np.uint8).data)
            waiting = Plain(values.size, "float32", place)
        made = encoded_tensor(waiting, shape, holdings) if encoded else torch.from_numpy(decoded).reshape(shape)
        assert is_encoded_tensor(made) is bool(encoded)
        found[name] = made
    return found


def models(encoded: bool | str, **meta) -> list[FLModel]:
    return [
        FLModel(
            params=result(site, encoded),
            params_type=ParamsType.DIFF,
            current_round=0,
            meta={"client_name": f"site-{site}", MetaKey.NUM_STEPS_CURRENT_ROUND: site + 2, **meta},
        )
        for site in range(3)
    ]


def fedavg(encoded: bool | str):
    return BaseFedAvg.aggregate_fn(models(encoded)).params


def scaffold(encoded: bool | str):
    each = models(encoded)
    for site, model in enumerate(each):
        model.meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF] = result(site + 7, encoded)
    found = scaffold_aggregate_fn(each)
    controls = found.meta[AlgorithmConstants.SCAFFOLD_CTRL_DIFF]
    return {**found.params, **{f"control {name}": value for name, value in controls.items()}}


def scatter_and_gather(encoded: bool | str):
    aggregator, context = DXOAggregator(expected_data_kind=DataKind.WEIGHT_DIFF), FLContext()
    context.set_prop(AppConstants.CURRENT_ROUND, 0)
    for site in range(3):
        dxo = DXO(DataKind.WEIGHT_DIFF, result(site, encoded), {MetaKey.NUM_STEPS_CURRENT_ROUND: site + 2})
        assert aggregator.accept(dxo, f"site-{site}", 0, context)
    return aggregator.aggregate(context).data


def fedopt(encoded: bool | str):
    """The server's optimizer, with one site's difference and with the mean of three."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        module.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    server = SimpleNamespace(torch_model=module, optimizer=optimizer, lr_scheduler=None, device=torch.device("cpu"))
    FedOpt.optimizer_update(server, result(0, encoded))
    return {name: value.clone() for name, value in FedOpt.optimizer_update(server, fedavg(encoded))[0].items()}


def model_update(encoded: bool | str):
    model = FLModel(params={name: torch.ones(shape) for name, shape in SHAPES.items()}, params_type=ParamsType.FULL)
    return FLModelUtils.update_model(model, models(encoded)[0]).params


def excluded(encoded: bool | str):
    return ExcludeVars("bias").process_dxo(DXO(DataKind.WEIGHTS, result(0, encoded)), None, FLContext()).data


def percentile(encoded: bool | str):
    context, filtering = FLContext(), PercentilePrivacy(percentile=50, gamma=0.5)
    dxo = DXO(DataKind.WEIGHT_DIFF, result(0, encoded), {MetaKey.NUM_STEPS_CURRENT_ROUND: 3})
    return filtering.process_dxo(dxo, None, context).data


CONSUMERS = [fedavg, scaffold, scatter_and_gather, fedopt, model_update, excluded, percentile]


@pytest.mark.parametrize("waiting", [True, "on disk"], ids=["in few bits", "on disk"])
@pytest.mark.parametrize("consumer", CONSUMERS, ids=lambda consumer: consumer.__name__)
@pytest.mark.filterwarnings("ignore")
def test_what_comes_of_results_that_wait_is_what_comes_of_decoded_ones(consumer, waiting):
    got, wanted = consumer(waiting), consumer(False)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # One rounding less, where torch has no fused multiply-add.
        np.testing.assert_allclose(np.asarray(got[name]), np.asarray(value), rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("waiting", [True, "on disk"], ids=["in few bits", "on disk"])
def test_a_late_result_of_an_earlier_round_is_not_mixed_in_and_not_held(waiting):
    aggregator, context, holdings = DXOAggregator(expected_data_kind=DataKind.WEIGHT_DIFF), FLContext(), Holdings()
    context.set_prop(AppConstants.CURRENT_ROUND, 1)
    steps = {MetaKey.NUM_STEPS_CURRENT_ROUND: 1}
    late = DXO(DataKind.WEIGHT_DIFF, result(1, waiting, holdings), steps)
    assert not aggregator.accept(late, "site-1", 0, context)  # fewer results than sites were enough for round 0
    del late
    gc.collect()
    assert holdings.held == holdings.on_disk == holdings.disk.taken == 0
    assert aggregator.accept(DXO(DataKind.WEIGHT_DIFF, result(2, waiting), steps), "site-2", 1, context)
    got = aggregator.aggregate(context).data
    for name, value in result(2, False).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6)


@pytest.mark.parametrize("waiting", [True, "on disk"], ids=["in few bits", "on disk"])
def test_what_an_aggregator_has_that_raises_is_not_held(waiting):
    holdings = Holdings()

    def aggregate(params):
        total = torch.zeros(SHAPES["weight"]).add_(params["weight"])
        raise ValueError(f"no sum of {tuple(total.shape)}")

    with pytest.raises(ValueError, match="no sum of"):
        aggregate(result(1, waiting, holdings))
    gc.collect()
    assert holdings.held == holdings.on_disk == holdings.disk.taken == 0
