"""FLARE's aggregator for two sites, which waits for both: the swarm's gatherer counts a result as there a moment before
the aggregator has it."""

from __future__ import annotations

import threading

from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator


class PatientAggregator(InTimeAccumulateWeightedAggregator):
    def __init__(self) -> None:
        super().__init__(expected_data_kind="WEIGHTS")
        self._come = threading.Semaphore(0)

    def accept(self, shareable, fl_ctx):
        accepted = super().accept(shareable, fl_ctx)
        self._come.release()
        return accepted

    def aggregate(self, fl_ctx):
        for _ in range(2):
            assert self._come.acquire(timeout=100)
        return super().aggregate(fl_ctx)
