"""Error feedback: what a message lacks is in the next one, once, and survives the process."""

from __future__ import annotations

import errno
import logging
import os
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.shareable import ReservedHeaderKey, make_copy
from nvflare.apis.signal import Signal
from safetensors import SafetensorError

from nvflare_rdma.codecs import CODEC_NAMES, get_codec
from nvflare_rdma.codecs.tensors import to_flat
from nvflare_rdma.errors import UnrepresentableError
from nvflare_rdma.filters import ModelDequantizer, ModelQuantizer
from nvflare_rdma.filters.correction import add_base, encode_corrected, from_float32, to_float32

CLIENT, SERVER = "client out", "server out"
SENT = {CLIENT: EventType.AFTER_SEND_TASK_RESULT, SERVER: EventType.AFTER_PROCESS_SUBMISSION}


@pytest.fixture
def job(at, tmp_path):
    """job(quantizer, point).send(params) -> what arrives; the events of FLARE are fired as a run does it."""

    class Job:
        def __init__(self, quantizer, point=CLIENT, folder=tmp_path):
            self.quantizer, self.point = quantizer, point
            self.ctx = at(point, quantizer)
            workspace = SimpleNamespace(get_run_dir=lambda job_id: str(folder / job_id))
            engine = SimpleNamespace(get_workspace=lambda: workspace, fire_event=lambda *a: None)
            self.ctx.get_engine = lambda *a, **k: engine
            self.ctx.get_job_id = lambda *a: "job"
            self.messages = 0

        def encode(self, params, kind=DataKind.WEIGHT_DIFF, message=None):
            self.messages += 1
            shareable = DXO(kind, data=params).to_shareable()
            shareable.set_header(ReservedHeaderKey.MSG_ROOT_ID, message or f"message-{self.messages}")
            return self.quantizer.process(shareable, self.ctx)

        def sent(self):
            self.quantizer.handle_event(SENT[self.point], self.ctx)

        def send(self, params, kind=DataKind.WEIGHT_DIFF):
            encoded = self.encode(params, kind)
            self.sent()
            return decoded(encoded)

    return Job


def decoded(encoded):
    from nvflare.apis.fl_context import FLContext

    return from_shareable(ModelDequantizer().process(make_copy(encoded), FLContext())).data


def quantizer(name="ternary", **kwargs):
    return ModelQuantizer(name, one_way=True, error_feedback=True, **kwargs)


def residual_of(q, name="w", stream="train"):
    bits = q._encoder.residuals._committed[stream][name].reshape(-1)
    return to_float32(bits)


@pytest.mark.parametrize("point", [CLIENT, SERVER])
@pytest.mark.parametrize("name", ["ternary", "int2", "normfloat4", "int8"])
@pytest.mark.parametrize("as_torch", [True, False])
def test_the_mean_of_what_arrives_approaches_what_was_sent(job, point, name, as_torch):
    w = np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32)
    stream = job(quantizer(name), point)
    plain = np.abs(np.asarray(decoded(job(ModelQuantizer(name, one_way=True)).encode({"w": w}))["w"]) - w).mean()
    total = np.zeros_like(w)
    rounds = 40
    for _ in range(rounds):
        total += np.asarray(stream.send({"w": torch.from_numpy(w) if as_torch else w})["w"])
    assert np.abs(total / rounds - w).mean() < plain / 8


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([n for n in CODEC_NAMES if n not in ("lossless", "exact_delta")]),
    st.integers(1, 3000),
    st.integers(0, 2**32 - 1),
)
def test_what_arrived_and_what_is_left_are_what_was_meant(name, n, seed):
    """target = arrived + residual, within the rounding of the residual to bfloat16; and arrived is what decodes."""
    rng = np.random.default_rng(seed)
    codec = get_codec(name)
    for dtype in (np.float32, np.float16):
        values = rng.standard_normal(n).astype(dtype)
        before, base = np.empty(n, np.uint16), rng.standard_normal(n).astype(dtype)
        from_float32((rng.standard_normal(n) / 10).astype(np.float32), before)
        for residual, known in ((None, None), (before, None), (None, base), (before, base)):
            got = encode_corrected(codec, values, residual, known)
            kept = np.float32(0.95 if codec.needs_feedback else 1)
            target = values.astype(np.float32) + (0 if residual is None else to_float32(residual) * kept)
            left = target - got.arrived.astype(np.float32)
            np.testing.assert_allclose(to_float32(got.residual), left, rtol=2.0**-8, atol=1e-30)
            difference = np.empty(n, np.float32)
            codec.decode_into(got.encoded, difference)
            out = np.empty_like(values)
            add_base(difference, known, out)
            np.testing.assert_array_equal(out, got.arrived)


@pytest.mark.parametrize("name", ["int8", "normfloat4", "ternary", "normfloat4_dq", "blockwise8"])
def test_a_large_tensor_in_pieces_has_the_codes_of_the_whole(name, monkeypatch):
    monkeypatch.setattr("nvflare_rdma.filters.correction.PIECE", 10_000)
    codec, values = get_codec(name), np.random.default_rng(0).standard_normal(70_001).astype(np.float32)
    whole = np.empty(codec.encoded_nbytes(values.size), np.uint8)
    codec.encode_into(values, whole)
    got = encode_corrected(codec, values, None, None)
    np.testing.assert_array_equal(got.encoded, whole)
    arrived = np.empty_like(values)
    codec.decode_into(whole, arrived)
    np.testing.assert_array_equal(got.arrived, arrived)


def test_the_residual_is_used_once(job):
    q = quantizer()
    stream = job(q)
    w = np.random.default_rng(1).standard_normal(2048).astype(np.float32)
    first = stream.send({"w": w})["w"]
    np.testing.assert_allclose(residual_of(q), w - first, rtol=2.0**-8, atol=1e-6)
    e = residual_of(q).copy()
    second = stream.send({"w": w})["w"]
    plain = np.empty_like(w)
    codec, encoded = get_codec("ternary"), np.empty(get_codec("ternary").encoded_nbytes(w.size), np.uint8)
    codec.encode_into(w + e, encoded)
    codec.decode_into(encoded, plain)
    np.testing.assert_array_equal(second, plain)


def test_it_is_off_unless_asked_for(job):
    w = np.random.default_rng(1).standard_normal(2048).astype(np.float32)
    stream = job(ModelQuantizer("ternary", one_way=True))
    np.testing.assert_array_equal(stream.send({"w": w})["w"], stream.send({"w": w})["w"])


def test_a_message_that_was_not_sent_leaves_the_residual_alone(job, caplog):
    q = quantizer()
    stream = job(q)
    w = np.random.default_rng(2).standard_normal(2048).astype(np.float32)
    stream.send({"w": w})
    before = residual_of(q).copy()
    lost = decoded(stream.encode({"w": w}))["w"]
    np.testing.assert_array_equal(residual_of(q), before)
    with caplog.at_level(logging.WARNING):
        again = decoded(stream.encode({"w": w}))["w"]
    np.testing.assert_array_equal(again, lost)
    assert "was not seen to be sent" in caplog.text
    stream.sent()
    assert not np.array_equal(residual_of(q), before)


def test_an_aborted_run_commits_nothing(job):
    q = quantizer()
    stream = job(q)
    w = np.random.default_rng(2).standard_normal(2048).astype(np.float32)
    stream.send({"w": w})
    before = residual_of(q).copy()
    stream.encode({"w": w})
    signal = Signal()
    signal.trigger(True)
    stream.ctx.set_prop(ReservedKey.RUN_ABORT_SIGNAL, signal, private=True, sticky=True)
    stream.sent()
    np.testing.assert_array_equal(residual_of(q), before)
    assert not q._encoder.residuals._staged


def test_another_tasks_message_commits_nothing(job):
    q = quantizer()
    stream = job(q)
    stream.encode({"w": np.ones(2048, np.float32)})
    stream.ctx.set_prop(FLContextKey.TASK_NAME, "validate", private=True, sticky=False)
    stream.sent()
    assert not q._encoder.residuals._committed.get("train")


def test_tasks_and_places_in_a_collection_have_residuals_of_their_own(job):
    q = quantizer()
    stream = job(q)
    rng = np.random.default_rng(3)
    parts = {k: DXO(DataKind.WEIGHT_DIFF, data={"w": rng.standard_normal(512).astype("f4")}) for k in ("a", "b")}
    nested = {"inner": DXO(DataKind.COLLECTION, data=parts), "a": parts["a"]}
    for _ in range(2):
        stream.encode(nested, DataKind.COLLECTION)
        stream.sent()
    saved = q._encoder.residuals._committed
    assert saved.keys() == {"train/inner/a", "train/inner/b", "train/a"}
    assert np.array_equal(saved["train/inner/a"]["w"], saved["train/a"]["w"])
    assert not np.array_equal(saved["train/inner/a"]["w"], saved["train/inner/b"]["w"])


@pytest.mark.parametrize("change", [lambda w: w[:, :50], lambda w: w.reshape(50, -1)])
def test_a_tensor_of_another_shape_starts_anew(job, change, tmp_path):
    w = np.random.default_rng(4).standard_normal((40, 100)).astype(np.float32)
    stream, fresh = job(quantizer()), job(quantizer(), folder=tmp_path / "fresh")
    same = w + 1
    stream.send({"w": w, "same": same})
    other = np.ascontiguousarray(change(w))
    got, expected = stream.send({"w": other, "same": same}), fresh.send({"w": other, "same": same})
    np.testing.assert_array_equal(got["w"], expected["w"])
    assert not np.array_equal(got["same"], expected["same"])


def test_residuals_outlive_the_process(job, tmp_path):
    w = np.random.default_rng(5).standard_normal((50, 60)).astype(np.float32)
    params = {"layer/with.odd name": w, "half": torch.from_numpy(w).bfloat16()}
    one = job(quantizer())
    one.send(params)
    two = job(quantizer())
    again, expected = two.send(params), one.send(params)
    for key in params:
        assert torch.equal(torch.as_tensor(again[key]), torch.as_tensor(expected[key]))
    fresh = job(quantizer(), folder=tmp_path / "elsewhere").send(params)
    assert not np.array_equal(fresh["layer/with.odd name"], again["layer/with.odd name"])
    files = list((tmp_path / "job" / "nvflare_rdma").iterdir())
    assert [f.suffix for f in files] == [".safetensors"]
    assert files[0].stat().st_size < 2 * 2 * w.size + 500, "two bytes a value"


def test_so_do_those_of_tensors_with_numbers_for_names(job):
    w = [np.random.default_rng(seed).standard_normal((50, 60)).astype(np.float32) for seed in range(3)]
    params = {-1: w[0], "-1": w[1], "a": {1: w[2]}}
    one = job(quantizer())
    one.send(params)
    again, expected = job(quantizer()).send(params), one.send(params)
    for key in (-1, "-1"):
        np.testing.assert_array_equal(again[key], expected[key])
    np.testing.assert_array_equal(again["a"][1], expected["a"][1])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("IoError 28")])
def test_a_residual_that_can_not_be_saved_is_used_and_so_are_the_others_of_its_message(
    job, tmp_path, monkeypatch, caplog, error
):
    """Of a file that is older, a message has made up already: a new process must not use it again."""
    w = {name: np.random.default_rng(0).standard_normal(5000).astype(np.float32) for name in ("first", "second")}
    params = {key: DXO(DataKind.WEIGHT_DIFF, data={key: value}) for key, value in w.items()}
    q, here = quantizer(), tmp_path / "job" / "nvflare_rdma"
    stream = job(q)
    stream.send(params, DataKind.COLLECTION)
    assert len(list(here.iterdir())) == 2
    before = {key: residual_of(q, key, f"train/{key}").copy() for key in w}
    calls, real = [], safetensors.numpy.save_file

    def save_file(tensors, path, metadata):
        calls.append(metadata["stream"])
        if len(calls) == 1:
            raise error
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    with caplog.at_level(logging.WARNING):
        stream.send(params, DataKind.COLLECTION)
    assert sorted(calls) == ["train/first", "train/second"]
    for key in w:
        assert not np.array_equal(residual_of(q, key, f"train/{key}"), before[key])
    assert f"error feedback of '{calls[0]}' can't be saved in {here}" in caplog.text
    (left,) = here.iterdir()
    assert calls[1].replace("/", "_") in left.name
    stream.send(params, DataKind.COLLECTION)
    assert "was not seen to be sent" not in caplog.text
    assert len(list(here.iterdir())) == 2


def test_only_the_owner_reads_a_residual(job, tmp_path, request):
    """It tells about a site's data. A file that was left by a process that died may have another mode."""
    before = os.umask(0o022)
    request.addfinalizer(lambda: os.umask(before))
    sender = job(quantizer())
    sender.send({"w": np.ones(5000, np.float32)})
    (file,) = (tmp_path / "job" / "nvflare_rdma").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    left = file.with_name(f"{file.name}.new")
    left.write_bytes(b"left")
    left.chmod(0o644)
    sender.send({"w": np.ones(5000, np.float32)})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not left.exists()


def test_a_damaged_file_is_a_warning_and_a_new_start(job, tmp_path, caplog):
    w = np.random.default_rng(5).standard_normal(5000).astype(np.float32)
    first = job(quantizer()).send({"w": w})["w"]
    (file,) = (tmp_path / "job" / "nvflare_rdma").iterdir()
    file.write_bytes(b"nonsense")
    with caplog.at_level(logging.WARNING):
        again = job(quantizer()).send({"w": w})["w"]
    np.testing.assert_array_equal(again, first)
    assert "starts anew" in caplog.text


def test_a_tensor_that_can_not_be_carried_leaves_no_residual(job):
    q = quantizer()
    stream = job(q)
    good = np.random.default_rng(6).standard_normal(2048).astype(np.float32)
    bad = good.copy()
    bad[3] = np.nan
    stream.send({"w": good, "x": good})
    assert np.isnan(stream.send({"w": bad, "x": good})["w"][3])
    assert q._encoder.residuals._committed["train"].keys() == {"x"}
    assert np.isfinite(stream.send({"w": good, "x": good})["w"]).all()


def test_an_overflow_on_arrival_is_refused():
    """65504 is float16's largest: with a residual on top, what the receiver decodes would be infinite."""
    values, before = np.full(640, 65504, np.float16), np.empty(640, np.uint16)
    from_float32(np.full(640, 300, np.float32), before)
    with pytest.raises(UnrepresentableError, match="infinite"):
        encode_corrected(get_codec("normfloat4"), values, before, None)
    got = encode_corrected(get_codec("normfloat4"), values, None, None)
    np.testing.assert_array_equal(got.arrived, values)


def test_nothing_given_is_changed_and_the_residual_is_bounded(job):
    w = torch.randn(3000)
    kept = w.clone()
    q = quantizer("normfloat4")
    stream = job(q)
    for _ in range(30):
        stream.send({"w": w})
    assert torch.equal(w, kept)
    assert np.abs(residual_of(q)).max() < 0.2 * to_flat(w).max()


def test_what_is_added_makes_no_finite_value_infinite(job):
    x = (np.random.default_rng(0).standard_normal(4096) * 10).astype(np.float16)
    x[::7] = -65504
    sender = job(ModelQuantizer("int2", one_way=True, error_feedback=True))
    for _ in range(6):
        assert np.isfinite(sender.send({"w": x})["w"]).all()


def test_a_result_that_comes_while_the_next_message_is_encoded_changes_nothing_in_it(job, monkeypatch):
    """All tensors of a message get the residual of the same message."""
    stream = job(quantizer(), SERVER)
    w = {f"w{i}": np.random.default_rng(i).standard_normal(2048).astype(np.float32) for i in range(3)}
    stream.send(w)
    stream.encode(w)
    expected = decoded(stream.encode(w))

    def late(*args):
        stream.sent()
        return encode_corrected(*args)

    monkeypatch.setattr("nvflare_rdma.filters.correction.encode_corrected", late)
    got = decoded(stream.encode(w))
    for name in w:
        np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize(
    ("kind", "delta", "warned"),
    [
        (DataKind.WEIGHTS, False, True),
        (DataKind.WEIGHTS, True, False),
        (DataKind.WEIGHTS, None, False),
        (DataKind.WEIGHT_DIFF, False, False),
    ],
)
def test_whole_weights_without_differences_are_warned_of_once(job, caplog, kind, delta, warned):
    quantizer = ModelQuantizer("int8", error_feedback=True, delta=delta)
    stream = job(quantizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            stream.send({"w": torch.randn(4096)}, kind)
    assert caplog.text.count("leave out delta=false") == int(warned)
