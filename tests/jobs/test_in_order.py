from __future__ import annotations

import itertools

import pytest
import torch
from evaluate import digest_of
from in_order import InOrder
from model import ByteGPT
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper

SITES = ("site-1", "site-2", "site-3")


def results():
    random = torch.Generator().manual_seed(0)
    return [
        FLModel(
            params={"w": torch.randn(1000, generator=random)},
            params_type=ParamsType.DIFF,
            current_round=0,
            meta={"client_name": site, "NUM_STEPS_CURRENT_ROUND": 3},
        )
        for site in SITES
    ]


def sum_of(order):
    aggregator = InOrder()
    aggregator.reset_stats()
    for result in order:
        aggregator.accept_model(result)
    return aggregator.aggregate_model()


def test_the_order_in_which_results_come_does_not_matter():
    sums = [sum_of(order) for order in itertools.permutations(results())]
    assert all(torch.equal(each.params["w"], sums[0].params["w"]) for each in sums)
    assert sums[0].params_type == ParamsType.DIFF


def test_the_sum_is_flares_own_for_that_order():
    helper = WeightedAggregationHelper()
    for result in results():
        helper.add(result.params, 3, result.meta["client_name"], 0)
    assert torch.equal(sum_of(results()).params["w"], helper.get_result()["w"])


def test_each_round_starts_anew():
    aggregator = InOrder()
    for scale in (1, 5):
        aggregator.reset_stats()
        for result in results():
            result.params["w"] *= scale
            aggregator.accept_model(result)
    expected = sum_of(results()).params["w"] * 5
    torch.testing.assert_close(aggregator.aggregate_model().params["w"], expected)


@pytest.mark.parametrize("name", ["embed", "down"])
def test_a_digest_tells_of_every_bit(name):
    model = ByteGPT(64, 1, heads=1)
    before = digest_of(model)
    assert digest_of(ByteGPT(64, 1, heads=1)) == before
    bits = model.state_dict()[name].view(torch.int32)
    bits.view(-1)[-1] ^= 1
    assert digest_of(model) != before
