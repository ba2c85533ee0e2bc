"""`InOrder`: adds results in the order of the sites' names, so that a seed gives the same bits in each run."""

from __future__ import annotations

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper


class InOrder(ModelAggregator):
    """FedAvg's own sum, taken when all results are there.

    FLARE adds a result when it comes, and the last bits of a sum of three floats depend on their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self._results: list[FLModel] = []

    def accept_model(self, model: FLModel) -> None:
        """FLARE's hook for each result."""
        self._results.append(model)

    def aggregate_model(self) -> FLModel:
        """FLARE's hook for the end of a round."""
        helper = WeightedAggregationHelper()
        for result in sorted(self._results, key=_site):
            steps = result.meta["NUM_STEPS_CURRENT_ROUND"]
            helper.add(result.params, steps, _site(result), result.current_round)
        return FLModel(params=helper.get_result(), params_type=self._results[0].params_type)

    def reset_stats(self) -> None:
        """FLARE's hook for the start of a round."""
        self._results = []


def _site(result: FLModel) -> str:
    return str(result.meta["client_name"])
