"""Differences are sent only against a model that both sides hold; whatever goes wrong costs a whole message."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import ReservedHeaderKey
from nvflare.fuel.utils import fobs

from nvflare_rdma.errors import CodecError, ConfigError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer, decoding
from nvflare_rdma.filters.correction import to_float32
from nvflare_rdma.filters.delta_base import HELD, TOPIC, Base, Bases, bases_of

DATA, RESULT = FilterChainType.TASK_DATA_CHAIN, FilterChainType.TASK_RESULT_CHAIN


class Side:
    """A process of a job: its run's context and its two filters."""

    def __init__(self, name, engine, quantizer, out_chain):
        self.name, self.quantizer, self.dequantizer = name, quantizer, ModelDequantizer()
        self.manager = FLContextManager(engine, name, "job", {}, {})
        quantizer.set_prop(FilterContextKey.CHAIN_TYPE, out_chain)
        self.dequantizer.set_prop(FilterContextKey.CHAIN_TYPE, DATA if out_chain == RESULT else RESULT)

    def context(self, direction, peer=None):
        ctx = self.manager.new_context()
        ctx.set_prop(FLContextKey.FILTER_DIRECTION, direction, private=True, sticky=False)
        ctx.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
        if peer is not None:
            public = FLContext()
            public.set_public_props(fobs.loads(fobs.dumps(peer.manager.new_context().get_all_public_props())))
            ctx.set_peer_context(public)
        return ctx


class Federation:
    def __init__(self, tmp_path, name="int8", sites=("site-1", "site-2"), delta=True, **kwargs):
        self.made = lambda: ModelQuantizer(name, one_way=True, delta=delta, **kwargs)
        self.tmp_path, self.handlers, self.rounds = tmp_path, {}, 0
        self.answers = True
        engine = SimpleNamespace(
            register_aux_message_handler=lambda topic, message_handle_func: self.handlers.update(
                {topic: message_handle_func}
            ),
            get_workspace=lambda: SimpleNamespace(get_run_dir=lambda job: str(tmp_path / "server")),
            fire_event=lambda *args: None,
        )
        self.server = Side("server", engine, self.made(), DATA)
        self.server.quantizer.handle_event(EventType.START_RUN, self.server.manager.new_context())
        self.sites = {}
        for site in sites:
            self.start(site)

    def start(self, name):
        """Start a site's process, or start it again: it has forgotten all that is not on disk."""

        def ask(targets, topic, request, timeout, fl_ctx, optional):
            if not self.answers or topic not in self.handlers:
                return {}
            return {"server": self.handlers[topic](topic, request, self.server.context("in", self.sites[name]))}

        engine = SimpleNamespace(
            send_aux_request=ask,
            get_workspace=lambda: SimpleNamespace(get_run_dir=lambda job: str(self.tmp_path / name)),
            fire_event=lambda *args: None,
        )
        self.sites[name] = Side(name, engine, self.made(), RESULT)

    def task(self, model, kind=DataKind.WEIGHTS):
        """A new task of the server, as a function that gives it to a site: (message, what the site gets)."""
        self.rounds += 1
        root = f"task-{self.rounds}"

        def give(name, lost=False):
            shareable = DXO(kind, data=model).to_shareable()
            shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, root)
            sent = self.server.quantizer.process(shareable, self.server.context(FilterKey.OUT, self.sites[name]))
            return None if lost else self.arrive(sent, self.sites[name], self.server)

        return give

    def result(self, name, model, kind=DataKind.WEIGHTS, on_its_way=lambda: None):
        site = self.sites[name]
        sent = site.quantizer.process(DXO(kind, data=model).to_shareable(), site.context(FilterKey.OUT, self.server))
        site.quantizer.handle_event(EventType.AFTER_SEND_TASK_RESULT, site.context(FilterKey.OUT))
        on_its_way()
        return self.arrive(sent, self.server, site)

    @staticmethod
    def arrive(sent, receiver, sender):
        message = from_shareable(sent)
        meta = dict(message.meta)
        ctx = receiver.context(FilterKey.IN, sender)
        return meta, from_shareable(receiver.dequantizer.process(sent, ctx)).data


@pytest.fixture
def federation(tmp_path):
    return lambda *args, **kwargs: Federation(tmp_path, *args, **kwargs)


def model(seed=0, scale=1.0, as_torch=False, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    arrays = {f"layer{i}.weight": (rng.standard_normal((40, 50)) * scale).astype("f4") for i in range(3)}
    return {k: torch.from_numpy(v).to(dtype) for k, v in arrays.items()} if as_torch else arrays


def stepped(start, seed, size=1e-3):
    steps = model(seed, size, as_torch=isinstance(next(iter(start.values())), torch.Tensor))
    return {
        k: (v + steps[k]).astype(v.dtype) if isinstance(v, np.ndarray) else (v + steps[k]).to(v.dtype)
        for k, v in start.items()
    }


def error(a, b):
    return max(
        float(np.abs(np.asarray(torch.as_tensor(a[k]).float()) - np.asarray(torch.as_tensor(b[k]).float())).max())
        for k in b
    )


def ours(meta):
    return {k: v for k, v in meta.get("nvflare_rdma", {}).items() if k != "tied"}


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize(
    "name", ["int8", "normfloat4", "normfloat4_dq", "normfloat4_e4m3", "adaquant", "bfloat16", "lossless"]
)
def test_differences_lose_less_than_whole_models(federation, name, as_torch):
    fed, plain = federation(name), federation(name, delta=False)
    w = model(as_torch=as_torch)
    for round_ in range(5):
        give, give_plain = fed.task(w), plain.task(w)
        for site in fed.sites:
            meta, got = give(site)
            assert ("base" in ours(meta)) == (round_ > 0)
            meta_up, back = fed.result(site, stepped(got, 10 * round_))
            assert "base" in ours(meta_up)
            assert error(back, stepped(got, 10 * round_)) <= error(give_plain(site)[1], w) / 20 + 1e-6
        if round_:
            assert error(got, w) <= error(give_plain(site)[1], w) / 5 + 1e-6
        w = stepped(w, round_ + 1)


def test_all_sites_get_one_encoding_and_hold_the_same(federation):
    fed = federation()
    for round_ in range(3):
        give = fed.task(model(round_))
        metas = [ours(give(site)[0]) for site in fed.sites]
        assert metas[0] == metas[1]
    held = [side.manager.new_context().get_prop(HELD) for side in fed.sites.values()]
    assert held[0] == held[1] == {"train": metas[0]["leaves"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_agree_bit_for_bit(federation, dtype):
    fed = federation("normfloat4")
    w = model(as_torch=True, dtype=dtype)
    for round_ in range(4):
        meta, got = fed.task(w)("site-1")
        assert ("base" in ours(meta)) == (round_ > 0)
        assert got["layer0.weight"].dtype == dtype
        w = stepped(w, round_)


def test_a_site_that_starts_again_gets_a_whole_model_and_then_differences(federation):
    fed = federation()
    for round_ in range(2):
        give = fed.task(model(round_))
        for site in fed.sites:
            give(site)
    fed.start("site-2")
    give = fed.task(model(2))
    assert "base" in ours(give("site-1")[0])
    meta, got = give("site-2")
    assert ours(meta) == {}, "the server will not keep two models, so this one promises nothing"
    assert error(got, model(2)) < 0.05
    assert "base" not in ours(fed.result("site-2", stepped(got, 5))[0])
    assert "base" in ours(fed.result("site-1", stepped(got, 5))[0])
    # Now the round after is whole for all, and then they are together again.
    give = fed.task(model(3))
    for site in fed.sites:
        assert "base" not in ours(give(site)[0])
    give = fed.task(model(4))
    for site in fed.sites:
        assert "base" in ours(give(site)[0])


def test_if_the_first_site_needs_it_whole_all_get_that(federation):
    fed = federation()
    give = fed.task(model(0))
    for site in fed.sites:
        give(site)
    fed.start("site-1")
    give = fed.task(model(1))
    one, two = ours(give("site-1")[0]), ours(give("site-2")[0])
    assert one == two
    assert "base" not in one
    assert "base" in ours(fed.task(model(2))("site-2")[0])


def test_a_server_that_starts_again_sends_whole_models(federation, tmp_path):
    fed = federation()
    for round_ in range(2):
        fed.task(model(round_))("site-1")
    again = Federation(tmp_path)
    again.sites = fed.sites
    again.rounds = 10
    meta, got = again.task(model(3))("site-1")
    assert "base" not in ours(meta)
    assert error(got, model(3)) < 0.05
    assert "base" in ours(again.task(model(4))("site-1")[0])


def test_a_reply_that_was_lost_is_sent_again(federation):
    fed = federation()
    fed.task(model(0))("site-1")
    give = fed.task(model(1))
    give("site-1", lost=True)
    meta, got = give("site-1")
    assert "base" in ours(meta)
    assert error(got, model(1)) < 0.05


def test_a_site_that_asks_again_for_what_it_has_gets_it_whole(federation):
    fed = federation()
    fed.task(model(0))("site-1")
    give = fed.task(model(1))
    give("site-1")
    meta, got = give("site-1")
    assert ours(meta) == {}
    assert fed.sites["site-1"].manager.new_context().get_prop(HELD) == {}, "it isn't sent a difference from this"
    assert error(got, model(1)) < 0.05


def test_a_site_that_missed_a_message_gets_the_next_one_whole(federation):
    fed = federation()
    fed.task(model(0))("site-1")
    fed.task(model(1))("site-1", lost=True)
    give = fed.task(model(2))
    meta, got = give("site-1")
    assert ours(meta).keys() == {"leaves"}
    assert ours(give("site-2")[0]) == ours(meta), "it was the first to ask: all get what it gets"
    assert error(got, model(2)) < 0.05


@pytest.mark.parametrize("why", ["no answer", "no handler", "base is gone"])
def test_results_go_whole_if_the_server_does_not_hold_the_base(federation, why):
    fed = federation()
    _, got = fed.task(model(0))("site-1")
    if why == "no answer":
        fed.answers = False
    elif why == "no handler":
        fed.handlers.clear()
    else:
        fed.task(model(1))("site-2")
    meta, back = fed.result("site-1", stepped(got, 1))
    assert "base" not in ours(meta)
    assert error(back, stepped(got, 1)) < 0.05


def test_a_base_that_was_promised_is_kept_until_the_result_is_there(federation):
    fed = federation()
    _, got = fed.task(model(0))("site-1")
    meta, back = fed.result("site-1", stepped(got, 1), on_its_way=lambda: fed.task(model(1))("site-2"))
    assert "base" in ours(meta)
    assert error(back, stepped(got, 1)) < 1e-4
    bases = fed.server.manager.new_context().get_prop("nvflare_rdma.bases")
    assert bases._promised == {}


def test_decoding_to_other_bits_is_noticed(federation, monkeypatch, warnings_logged):
    fed = federation()
    monkeypatch.setattr("nvflare_rdma.filters.decoding.add_base", lambda d, b, out: out.fill(3))
    fed.task(model(0))("site-1")
    meta, _ = fed.task(stepped(model(0), 1))("site-1")
    assert "base" in ours(meta)
    assert "decoded to other bits" in warnings_logged[-1]
    assert "base" not in ours(fed.task(model(2))("site-1")[0])


def test_training_in_place_does_not_change_the_base(federation):
    fed = federation()
    _, got = fed.task(model(0))("site-1")
    trained = {k: v.copy() for k, v in stepped(got, 1).items()}
    for key, value in got.items():
        value[:] = trained[key]
    meta, back = fed.result("site-1", got)
    assert "base" in ours(meta)
    assert error(back, trained) < 1e-4


def test_weight_diffs_are_differences_already(federation):
    fed = federation()
    for _ in range(3):
        meta, got = fed.task(model(0))("site-1")
        meta_up, _ = fed.result("site-1", got, DataKind.WEIGHT_DIFF)
        assert ours(meta_up) == {}
    meta, _ = fed.task(model(0), DataKind.WEIGHT_DIFF)("site-1")
    assert ours(meta) == {}


def test_tensors_that_are_new_or_of_another_shape_go_whole_among_differences(federation):
    fed = federation()
    fed.task(model(0))("site-1")
    other = model(0)
    other["layer0.weight"] = np.random.default_rng(9).standard_normal((30, 30)).astype("f4")
    other["new"] = np.random.default_rng(8).standard_normal(999).astype("f4")
    del other["layer2.weight"]
    meta, got = fed.task(other)("site-1")
    assert {k for k, s in meta["quant_state"].items() if s.get("delta")} == {"layer1.weight"}
    assert got.keys() == other.keys()
    assert error(got, other) < 0.05


def test_a_tensor_that_can_not_be_carried_goes_exact_and_comes_back(federation):
    fed = federation()
    fed.task(model(0))("site-1")
    broken = model(0)
    broken["layer1.weight"][3, 3] = np.inf
    _, got = fed.task(broken)("site-1")
    np.testing.assert_array_equal(got["layer1.weight"], broken["layer1.weight"])
    meta, got = fed.task(model(1))("site-1")
    assert "base" in ours(meta)
    assert not meta["quant_state"]["layer1.weight"].get("delta")
    assert error(got, model(1)) < 0.05


@pytest.mark.parametrize("error_feedback", [True, False])
def test_the_server_needs_no_residual_with_differences(federation, error_feedback):
    """A difference from what the sites hold has last round's error in it. Adding a residual would count it twice."""
    fed, w = federation("int2", error_feedback=error_feedback), model(0)
    worst = []
    for _ in range(25):
        worst.append(error(fed.task(w)("site-1")[1], w))
    assert worst[-1] < 0.2 * worst[0]
    assert not fed.server.quantizer._encoder.residuals._staged


def test_a_sites_results_use_both(federation):
    """Each round's base is the server's model, so what the last result lacked is not in the difference."""
    fed, total, wanted = federation("ternary", error_feedback=True), 0, 0
    for round_ in range(30):
        _, got = fed.task(model(0))("site-1")
        trained = stepped(got, round_, 1e-2)
        meta, back = fed.result("site-1", trained)
        assert "base" in ours(meta)
        total = total + (back["layer0.weight"] - got["layer0.weight"])
        wanted = wanted + (trained["layer0.weight"] - got["layer0.weight"])
    residual = fed.sites["site-1"].quantizer._encoder.residuals.committed("train").get("layer0.weight")
    left = (residual.astype(np.uint32) << 16).view(np.float32).reshape(40, 50)
    np.testing.assert_allclose(total + left, wanted, atol=2e-3)


@pytest.mark.parametrize("delta", [None, False])
def test_error_feedback_on_whole_models_is_with_differences_unless_told_otherwise(federation, delta):
    fed, w = federation("int2", error_feedback=True, delta=delta), model(0)
    for round_ in range(3):
        meta, got = fed.task(w)("site-1")
        assert bool(ours(meta).get("base")) == (delta is None and round_ > 0)
        meta, _ = fed.result("site-1", stepped(got, round_, 1e-2))
        assert bool(ours(meta).get("base")) == (delta is None)


@pytest.mark.parametrize("name", ["int8", "int2", "exact_delta", "topk2"])
@pytest.mark.parametrize("shape", [(100, 20), (20, 100), (40, 25)])
def test_an_adapter_of_another_rank_or_shape_starts_anew_and_the_others_go_on(federation, name, shape):
    """Also one of as many values: they are others."""
    options = {"error_feedback": True} if name in ("int2", "topk2") else {}
    fed, w = federation(name, **options), {name: value + 100 for name, value in model(0).items()}
    for round_ in range(2):
        _, got = fed.task(w)("site-1")
        fed.result("site-1", stepped(got, round_, 1e-2))
    w["layer1.weight"] = (100 + model(5)["layer1.weight"].ravel()[: math.prod(shape)]).reshape(shape)
    before = fed.sites["site-1"].quantizer._encoder.residuals.committed("train")
    meta, got = fed.task(w)("site-1")
    anew = "layer1.weight"
    assert {k for k, s in meta["quant_state"].items() if s.get("delta")} == w.keys() - {anew}
    assert got[anew].shape == shape
    _, back = fed.result("site-1", got)  # with what was lacking of the others alone
    after = fed.sites["site-1"].quantizer._encoder.residuals.committed("train")
    if options:
        assert before[anew].shape != shape
        assert after[anew].shape == shape
    assert back[anew].shape == shape
    meta, got = fed.task(w)("site-1")
    assert meta["quant_state"][anew].get("delta"), "it has a base again"


@pytest.mark.parametrize("name", ["topk2", "topk2_128"])
def test_the_largest_differences_are_sent_and_nothing_else_is_lost_for_good(federation, name):
    """Whole models travel lossless, and what is left of a difference comes later on, both ways."""
    fed, w = federation(name, error_feedback=True), model(0)
    lost = []
    for round_ in range(60):
        meta, got = fed.task(w)("site-1")
        assert meta[MetaKey.PROCESSED_ALGORITHM] == (name if round_ else "lossless")
        if not round_:
            assert_same_bits(got, w)
            w = stepped(w, 1, 1e-2)
        lost.append(error(got, w))
        meta, back = fed.result("site-1", stepped(got, 2, 1e-2))
        assert meta[MetaKey.PROCESSED_ALGORITHM] == name
        changed = np.count_nonzero(back["layer0.weight"] - got["layer0.weight"])
        assert 0 < changed <= -(-2000 * int(name.partition("_")[2] or 64) // 4096)
    assert lost[-1] < 0.05 * lost[1]


def test_what_a_site_lacked_is_sent_later_and_slowly_forgotten(federation):
    fed, total = federation("topk2", error_feedback=True), 0
    step = model(2, 1e-2)["layer0.weight"]
    kept = 0
    for _ in range(30):
        _, got = fed.task(model(0))("site-1")
        _, back = fed.result("site-1", stepped(got, 2, 1e-2))
        total = total + (back["layer0.weight"] - got["layer0.weight"])
        kept = 0.95 * kept + step
        kept = kept - (back["layer0.weight"] - got["layer0.weight"])
    residual = fed.sites["site-1"].quantizer._encoder.residuals.committed("train").get("layer0.weight")
    left = (residual.astype(np.uint32) << 16).view(np.float32).reshape(40, 50)
    np.testing.assert_allclose(left, kept, atol=2e-3)


def test_differences_of_models_are_sent_without_a_base(federation):
    fed, total = federation("topk2", error_feedback=True, delta=False), 0
    step = model(3, 1e-2)
    for _ in range(100):
        meta, back = fed.result("site-1", step, DataKind.WEIGHT_DIFF)
        assert meta[MetaKey.PROCESSED_ALGORITHM] == "topk2"
        total = total + back["layer0.weight"]
    assert np.corrcoef(total.ravel(), step["layer0.weight"].ravel())[0, 1] > 0.85  # what is forgotten is missing
    with pytest.raises(ConfigError, match=r"'topk2' is for differences, but the message has whole WEIGHTS: set delta"):
        fed.result("site-1", step)


def test_the_largest_values_alone_need_error_feedback():
    for name in ("topk2", "topk2_128"):
        with pytest.raises(ConfigError, match=f"'{name}' needs error_feedback"):
            ModelQuantizer(name, delta=True)


def test_what_is_not_finite_travels_exact_with_the_largest_differences(federation):
    fed, w = federation("topk2", error_feedback=True), model(0)
    fed.task(w)("site-1")
    w = stepped(w, 1, 1e-2)
    w["layer0.weight"][3, 4] = np.nan
    _, got = fed.task(w)("site-1")
    assert_same_bits({"w": got["layer0.weight"]}, {"w": w["layer0.weight"]})
    assert error({"w": got["layer1.weight"]}, {"w": w["layer1.weight"]}) > 0


@pytest.mark.parametrize("held", ["text", ["train"], {"train": 7}, {"train": "0" * 32}, {7: 7}, None])
def test_a_site_that_says_nonsense_gets_a_whole_model(federation, held):
    fed = federation()
    fed.task(model(0))("site-1")
    context = fed.sites["site-1"].manager.new_context()
    context.set_prop(HELD, held, private=False, sticky=True)
    give = fed.task(model(1))
    give("site-1", lost=True)
    context.set_prop(HELD, {}, private=False, sticky=True)
    meta, got = give("site-1")
    assert "base" not in ours(meta)
    assert error(got, model(1)) < 0.05


def test_a_result_against_a_model_that_is_gone_is_refused(federation):
    fed = federation()
    _, got = fed.task(model(0))("site-1")
    site = fed.sites["site-1"]
    sent = site.quantizer.process(
        DXO(DataKind.WEIGHTS, data=stepped(got, 1)).to_shareable(), site.context(FilterKey.OUT, fed.server)
    )
    fed.server.manager.new_context().get_prop("nvflare_rdma.bases").__init__()
    with pytest.raises(CodecError, match="the results of task 'train' from site-1"):
        fed.arrive(sent, fed.server, site)


def test_answers_to_strange_questions(federation):
    from nvflare.apis.shareable import Shareable

    fed = federation()
    for request in ({}, {"stream": 7, "digest": [1]}, {"stream": "train", "digest": None}):
        asked = Shareable()
        asked.update(request)
        reply = fed.handlers[TOPIC](TOPIC, asked, fed.server.context("in", fed.sites["site-1"]))
        assert reply["held"] is False


def test_a_promise_ends_with_the_next_question():
    bases, base = Bases(), Base.of({"a": np.zeros(4, np.float32)})
    bases.set("train", base)
    assert bases.promise("train", "site-1", base.digest)
    bases.set("train", None)
    assert bases.find("train", base.digest, "site-1") is base
    assert bases.find("train", base.digest, "site-2") is None
    assert not bases.promise("train", "site-1", "another")
    assert bases.find("train", base.digest, "site-1") is None


def test_collections_have_a_base_for_each_place(federation):
    fed = federation()
    for round_ in range(2):
        parts = {k: DXO(DataKind.WEIGHTS, data=model(i)) for i, k in enumerate("ab")}
        _, got = fed.task(parts, DataKind.COLLECTION)("site-1")
        parts = {k: DXO(DataKind.WEIGHTS, data=stepped(got[k].data, i)) for i, k in enumerate("ab")}
        _, back = fed.result("site-1", parts, DataKind.COLLECTION)
        held = fed.sites["site-1"].manager.new_context().get_prop(HELD)
        assert held.keys() == {"train/a", "train/b"}
        for i, key in enumerate("ab"):
            assert error(got[key].data, model(i)) < (1e-3 if round_ else 0.05)
            assert error(back[key].data, parts[key].data) < 1e-4


def test_a_digest_tells_models_apart():
    w = np.arange(6, dtype=np.float32)
    same = Base.of({"a": w.copy(), "b": w}).digest
    assert Base.of({"b": w, "a": w}).digest == same
    for other in (
        {"a": w, "c": w},
        {"a": w},
        {"a": w, "b": w.view(np.uint16)},
        {"a": w, "b": np.append(w, 0).astype("f4")},
        {"a": w, "b": w + np.float32(1e-6)},
    ):
        assert Base.of(other).digest != same


@pytest.mark.parametrize("smaller", [True, False], ids=["lossless", "exact"])
def test_what_is_owed_waits_while_there_is_no_base(federation, smaller):
    """Also if nothing makes the tensor smaller, so that it travels as it is."""
    name = "layer0.weight"
    fed, w = federation("topk2", error_feedback=True), model(0)

    def owed():
        return to_float32(fed.sites["site-1"].quantizer._encoder.residuals.committed("train")[name].ravel())

    _, got = fed.task(w)("site-1")
    fed.result("site-1", stepped(got, 1, 1e-2))
    before = owed()
    assert np.abs(before).max() > 0
    fed.answers = False  # the site asks whether the server has the base, and hears nothing
    trained = stepped(got, 2, 1e-2)
    if not smaller:
        bits = np.random.default_rng(0).integers(0, 1 << 32, (40, 50), np.uint32)
        trained[name] = np.where(bits >> 23 & 255 == 255, bits ^ 1 << 23, bits).view(np.float32)
    meta, back = fed.result("site-1", trained)
    assert bool(meta["quant_state"][name]) == smaller
    assert_same_bits(back, trained)
    np.testing.assert_allclose(owed(), 0.95 * before, rtol=2**-8)
    fed.answers = True
    meta, back = fed.result("site-1", got)  # which has been changed by nothing: what comes is what was owed
    assert meta[MetaKey.PROCESSED_ALGORITHM] == "topk2"
    assert np.count_nonzero(back[name] - got[name])


def test_what_was_owed_is_owed_to_no_tensor_that_was_made_anew(federation):
    name = "layer0.weight"
    fed, w = federation("topk2", error_feedback=True), model(0)
    _, got = fed.task(w)("site-1")
    fed.result("site-1", stepped(got, 1, 1e-2))
    meta, back = fed.result("site-1", anew := {**stepped(got, 2, 1e-2), name: model(7, 1e-4)[name]})
    assert meta["quant_state"][name]["codec"] == "lossless"
    np.testing.assert_array_equal(back[name], anew[name])
    committed = fed.sites["site-1"].quantizer._encoder.residuals.committed("train")
    assert committed.keys() == w.keys() - {name}


def test_tensors_of_a_base_may_have_numbers_for_names(federation):
    fed, w = federation("int2", error_feedback=True), model(0)
    w = {"a": w["layer0.weight"], 1: w["layer1.weight"], 0: w["layer2.weight"]}
    for round_ in range(2):
        meta, got = fed.task(w)("site-1")
        assert ("base" in ours(meta)) == (round_ > 0)
        assert got.keys() == w.keys()
        meta, back = fed.result("site-1", got)
        assert "base" in ours(meta)
        assert back.keys() == w.keys()


def test_a_base_gives_only_what_fits():
    base = Base.of({"a": np.zeros(4, np.float32)})
    assert base.tensor("a", np.ones(4, np.float32)) is not None
    assert base.tensor("a", np.ones(5, np.float32)) is None
    assert base.tensor("a", np.ones(4, np.float16)) is None
    assert base.tensor("b", np.ones(4, np.float32)) is None
    assert Bases().current("train") is None


@pytest.mark.parametrize("name", ["float16", "bfloat16", "lossless", "exact_delta"])
def test_infinities_in_the_base_do_not_become_nan(federation, name):
    fed = federation(name)
    w = model()
    w["layer0.weight"][3, 4] = -np.inf
    for round_ in range(4):
        if round_ == 2:
            w["layer0.weight"][3, 4] = 1.0
        give = fed.task(w)
        for site in fed.sites:
            got = give(site)[1]
            np.testing.assert_array_equal(got["layer0.weight"][3, 4], w["layer0.weight"][3, 4])
            back = fed.result(site, got)[1]
            np.testing.assert_array_equal(back["layer0.weight"][3, 4], w["layer0.weight"][3, 4])
        w = {k: v.copy() for k, v in w.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "normfloat4", "adaquant"])
def test_a_tensor_that_shrinks_is_no_difference(federation, name, dtype):
    """The difference from what it was has the size of what it was, and so has the codec's error."""
    fed, plain = federation(name), federation(name, delta=False)
    w = model(as_torch=True, dtype=dtype)
    fed.task(w)("site-1")
    smaller = {k: v * 1e-3 if k == "layer0.weight" else v for k, v in stepped(w, 1).items()}
    other = model(7, as_torch=True, dtype=dtype)["layer2.weight"]  # as large as what was there, and unlike it
    changed = {**smaller, "layer2.weight": other}
    expected = plain.task(changed)("site-1")[1]
    meta, arrived = fed.task(changed)("site-1")
    assert {k for k, state in meta["quant_state"].items() if state.get("delta")} == {"layer1.weight"}
    for key in ("layer0.weight", "layer2.weight"):
        sent = {key: changed[key]}
        assert error({key: arrived[key]}, sent) <= error({key: expected[key]}, sent)
    trained = {k: v * 1e-3 if k == "layer1.weight" else v for k, v in arrived.items()}
    meta, back = fed.result("site-1", trained)
    assert {k for k, state in meta["quant_state"].items() if state.get("delta")} == {"layer0.weight", "layer2.weight"}
    expected = plain.result("site-1", trained)[1]
    for key, value in trained.items():
        assert error({key: back[key]}, {key: value}) <= error({key: expected[key]}, {key: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_torch", [True, False])
def test_exact_differences_arrive_bit_for_bit_and_small(federation, as_torch, dtype):
    if not as_torch and dtype is torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    fed = federation("exact_delta")
    w = {k: v.to(dtype) if as_torch else v.to(dtype).numpy() for k, v in model(as_torch=True).items()}
    w["layer0.weight"][3, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 0.0])
    for round_ in range(4):
        give = fed.task(w)
        for site in fed.sites:
            meta, got = give(site)
            assert ("base" in ours(meta)) == (round_ > 0)
            assert_same_bits(got, w)
            trained = stepped(got, 10 * round_, 1e-5)
            meta_up, back = fed.result(site, trained)
            assert_same_bits(back, trained)
            for dxo_meta in (meta, meta_up) if round_ else (meta_up,):
                assert {k for k, state in dxo_meta["quant_state"].items() if state.get("delta")} == set(w)
        w = trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_adapter_and_one_that_does_not_change_arrive(federation, monkeypatch, dtype):
    """Zeros without a base, and differences that are all zero, whatever else the message has used up."""
    monkeypatch.setattr(decoding, "_FREE_VALUES", 0)
    fed = federation("exact_delta")
    w = {name: torch.zeros(1 << 18, dtype=dtype).reshape(512, 512) for name in ("a.lora_B", "b.lora_B")}
    for round_ in range(3):
        give = fed.task(w)
        for site in fed.sites:
            meta, got = give(site)
            assert meta[MetaKey.PROCESSED_ALGORITHM] == ("exact_delta" if round_ else "lossless")
            assert_same_bits(got, w)
            meta, back = fed.result(site, got)
            assert meta[MetaKey.PROCESSED_ALGORITHM] == "exact_delta"
            assert_same_bits(back, w)
    fed.start("site-2")  # it holds nothing any more, and the others do
    give = fed.task(w)
    for site, name in (("site-1", "exact_delta"), ("site-2", "lossless")):
        meta, got = give(site)
        assert meta[MetaKey.PROCESSED_ALGORITHM] == name
        assert_same_bits(got, w)


def test_of_an_exact_message_what_has_no_base_travels_lossless(federation):
    fed, w = federation("exact_delta"), model()
    fed.task(w)("site-1")
    w = {**stepped(w, 1, 1e-5), "new.weight": np.zeros((300, 300), np.float32)}
    meta, got = fed.task(w)("site-1")
    names = {name: state["codec"] for name, state in meta["quant_state"].items()}
    assert names == {name: "lossless" if name == "new.weight" else "exact_delta" for name in w}
    assert_same_bits(got, w)


def assert_same_bits(got, sent):
    for key, value in sent.items():
        found, wanted = (torch.as_tensor(t).contiguous().view(torch.uint8) for t in (got[key], value))
        assert torch.equal(found, wanted), key


def test_an_exact_difference_from_another_model_is_refused(federation):
    """Bases are told by their digests; should one be taken for another all the same, the values' own digest tells."""
    fed = federation("exact_delta")
    w = model()
    fed.task(w)("site-1")
    base = bases_of(fed.sites["site-1"].manager.new_context()).current("train")
    base.tensors["layer1.weight"][7] += 1
    with pytest.raises(CodecError, match=r"'layer1\.weight'.*other values came out"):
        fed.task(stepped(w, 1))("site-1")


def test_exact_differences_need_delta():
    with pytest.raises(ConfigError, match="'exact_delta' needs delta"):
        ModelQuantizer("exact_delta")
    rules = [{"role": "head", "quantization_type": "exact_delta"}]
    with pytest.raises(ConfigError, match="'exact_delta' needs delta"):
        ModelQuantizer("int8", policy=rules)
    assert ModelQuantizer("exact_delta", delta=True).delta


def test_a_difference_that_overflows_travels_whole(federation):
    fed = federation("bfloat16")
    for sign in (1, -1):
        w = model()
        w["layer0.weight"][3, 4] = sign * 3e38
        got = fed.task(w)("site-1")[1]
        np.testing.assert_allclose(got["layer0.weight"], w["layer0.weight"], rtol=2**-8)
