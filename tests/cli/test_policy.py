"""nvflare-rdma policy CONFIG MODEL."""

from __future__ import annotations

import json
import re
import struct

import numpy as np
import pytest
import torch
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_context import FLContext
from safetensors.torch import save_file

from nvflare_rdma.cli import main
from nvflare_rdma.cli.models import read_model
from nvflare_rdma.cli.policy import read_policies, rows_of
from nvflare_rdma.codecs.policy import Policy
from nvflare_rdma.errors import ConfigError
from nvflare_rdma.filters import ModelQuantizer

TINY = {
    "embed.weight": {"dtype": "float32", "shape": [100, 64]},
    "layers.0.q_proj.weight": {"dtype": "bfloat16", "shape": [64, 64]},
    "layers.0.norm.weight": {"dtype": "float32", "shape": [4096]},
    "steps": {"dtype": "int64", "shape": []},
}


@pytest.fixture
def show(tmp_path, capsys, monkeypatch):
    """show(config, model) -> (exit code, standard output, standard error); both may be given as JSON values."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(config, model=TINY):
        paths = []
        for name, value in (("policy.json", config), ("model.json", model)):
            if isinstance(value, dict | list):
                (tmp_path / name).write_text(json.dumps(value))
                value = tmp_path / name
            paths.append(str(value))
        code = main(["policy", *paths])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def lines(out):
    """The cells of each row, by tensor."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_a_small_policy_and_a_json_model(show):
    rule = {"role": "embedding", "quantization_type": "int8"}
    code, out, _ = show({"quantization_type": "normfloat4", "policy": [rule]})
    assert code == 0
    assert "both directions: normfloat4" in out
    rows = lines(out)
    embedding = 6400 + -(-6400 // 2048) * 4
    projection = 4096 // 2 + 4096 // 64 * 4
    assert rows["embed.weight"] == [
        "float32", "100x64", "int8", "role embedding", "25,600", f"{embedding:,}",
    ]  # fmt: skip
    assert rows["layers.0.q_proj.weight"][2:] == ["normfloat4", "everything else", "8,192", f"{projection:,}"]
    assert rows["layers.0.norm.weight"][2:] == ["exact", "role norm", "16,384", "16,384"]
    assert rows["steps"] == ["int64", "-", "exact", "int64", "8", "8"]
    before, after = 25600 + 8192 + 16384 + 8, embedding + projection + 16384 + 8
    assert rows["4 tensors"][-2:] == [f"{before:,}", f"{after:,}"]
    assert rows["4 tensors"][0] == f"{after / before:.2%}"


def test_an_exported_job(show, tmp_path):
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

    from nvflare_rdma.recipe import add_quantization

    (tmp_path / "client.py").write_text("import nvflare.client\n")
    recipe = NumpyFedAvgRecipe(
        name="q", model=[[0.0]], min_clients=1, num_rounds=1, train_script=str(tmp_path / "client.py")
    )
    add_quantization(recipe, "blockwise8", policy=[{"role": "norm", "quantization_type": "float16"}])
    recipe._job.export_job(str(tmp_path / "jobs"))
    code, out, _ = show(tmp_path / "jobs")
    assert code == 0
    assert out.count("both directions: blockwise8") == 1
    assert lines(out)["layers.0.norm.weight"][2] == "float16"
    (server,) = (tmp_path / "jobs").rglob("config_fed_server.json")
    assert "server to sites: blockwise8" in show(server)[1]
    config = json.loads(server.read_text())
    for chain in config["task_data_filters"]:
        chain["filters"][0]["args"]["quantization_type"] = "float16"
    server.write_text(json.dumps(config))
    _, out, _ = show(tmp_path / "jobs")
    assert "server to sites: float16" in out
    assert "sites to server: blockwise8" in out


def test_a_job_with_an_app_for_each_site_and_one_whose_sites_send_to_each_other(show, tmp_path):
    from nvflare.app_common.np.np_trainer import NPTrainer
    from nvflare.job_config.api import FedJob

    from nvflare_rdma.recipe import add_quantization

    job = FedJob(name="apart")
    job.to(NPTrainer(), "site-1")
    add_quantization(job, "blockwise8", clients=["site-1"])
    job.export_job(str(tmp_path / "jobs"))
    assert "both directions: blockwise8" in show(tmp_path / "jobs")[1]
    path, args = "nvflare_rdma.filters.PeerQuantizer", {"quantization_type": "int8", "policy": []}
    out = show({"components": [{"id": "other", "path": "a.B"}, {"id": "p", "path": path, "args": args}]})[1]
    assert "site to site: int8" in out


def test_flares_own_quantizer_has_no_rules(show):
    filters = [{"path": "nvflare.app_opt.pt.quantization.quantizer.ModelQuantizer", "args": {}}]
    _, out, _ = show({"format_version": 2, "task_data_filters": [{"tasks": ["train"], "filters": filters}]})
    assert lines(out)["layers.0.norm.weight"][2] == "float16"


def models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(100, 64, generator=generator)
    state = {
        "embed.weight": embedding,
        "body.weight": torch.randn(64, 64, generator=generator).bfloat16(),
        "norm.weight": torch.randn(4096, generator=generator),
        "steps": torch.tensor(3),
        "flags": torch.tensor([True, False]),
    }
    save_file(state, str(tmp_path / "m.safetensors"))
    torch.save({**state, "head.weight": embedding}, tmp_path / "m.pt")
    torch.save({"model": state, "train_conf": {}}, tmp_path / "FL_global_model.pt")
    return state


def test_all_kinds_of_model_files_say_the_same(tmp_path):
    state = models(tmp_path)
    expected = {k: (str(v.dtype).removeprefix("torch."), tuple(v.shape), v.nbytes) for k, v in state.items()}
    for file in ("m.safetensors", "FL_global_model.pt", "m.pt"):
        found = {t.name: (t.dtype, t.shape, t.nbytes) for t in read_model(tmp_path / file) if not t.tied}
        assert found == expected
    (tied,) = (t for t in read_model(tmp_path / "m.pt") if t.tied)
    assert (tied.name, tied.tied) == ("head.weight", "embed.weight")
    assert rows_of(Policy("int8"), [tied])[0].nbytes == 0


@pytest.mark.parametrize("name", ["int8", "normfloat4", "blockwise8", "float16", "normfloat4_dq"])
@pytest.mark.parametrize("policy", [None, []])
def test_the_table_says_what_the_filter_does(tmp_path, name, policy):
    models(tmp_path)
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    dxo = DXO(DataKind.WEIGHTS, data=state).to_shareable()
    sent = from_shareable(ModelQuantizer(name, policy=policy).process(dxo, FLContext()))
    tables = ("code", "quant_map")
    for row in rows_of(Policy(name, policy), read_model(tmp_path / "m.pt")):
        if row.codec == "tied":
            assert sent.data[row.tensor.name] is sent.data[row.tensor.tied]
            continue
        states = sent.meta["quant_state"][row.tensor.name]
        scales = sum(v.nbytes for k, v in states.items() if isinstance(v, torch.Tensor) and k not in tables)
        assert sent.data[row.tensor.name].nbytes + scales == row.nbytes, row
        assert (sent.data[row.tensor.name] is state[row.tensor.name]) == (row.codec == "exact")


class Evil:
    def __reduce__(self):
        return (print, ("ran code from a model file",))


def test_names_are_shown_as_they_are(show):
    code, out, _ = show({"quantization_type": "int8"}, {"layers[0].weight [bold]": {"dtype": "int64", "shape": [2]}})
    assert code == 0
    assert "layers[0].weight [bold]" in out


def test_bad_files_are_errors_that_name_them(show, tmp_path, capsys):
    np.save(tmp_path / "m.npy", np.ones(3))
    (tmp_path / "short.safetensors").write_bytes(b"123")
    (tmp_path / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text("{")
    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    good = {"quantization_type": "int8"}
    for model in (
        "m.npy",
        "short.safetensors",
        "huge.safetensors",
        "list.json",
        "cut.json",
        "evil.pt",
        "list.pt",
        "no",
    ):
        code, out, err = show(good, tmp_path / model)
        assert code == 1
        assert out == ""
        assert model in err
        assert err.splitlines()[1:] == ["Code: INVALID_INPUT (exit 1)"]
    for bad_model in ({"w": {"dtype": "float32"}}, {"w": {"dtype": "float32", "shape": [-1]}}, {"w": 5},
                      {"w": {"dtype": "strange", "shape": [4]}}):  # fmt: skip
        assert show(good, bad_model)[0] == 1
    for config in ({}, [], {"quantization_type": "int3"}, {"quantization_type": "int8", "policy": {}}, tmp_path / "no"):
        code, out, err = show(config)
        assert (code, out) == (1, "")
        assert err.startswith("nvflare-rdma policy: ")


QUANTIZER = "nvflare_rdma.filters.ModelQuantizer"


@pytest.mark.parametrize(
    ("config", "key", "found", "expected"),
    [
        ({"task_data_filters": "none"}, "task_data_filters", "'none'", "a list"),
        ({"task_result_filters": {"filters": []}}, "task_result_filters", "{'filters': []}", "a list"),
        ({"task_data_filters": [{}, 5]}, "task_data_filters[1]", "5", "an object"),
        ({"task_data_filters": [[]]}, "task_data_filters[0]", "[]", "an object"),
        ({"task_data_filters": [{"filters": [None]}]}, "task_data_filters[0].filters[0]", "None", "an object"),
        ({"task_data_filters": [{"filters": 0}]}, "task_data_filters[0].filters", "0", "a list"),
        ({"task_data_filters": [{"filters": [QUANTIZER]}]}, "task_data_filters[0].filters[0]", QUANTIZER, "an object"),
        (
            {"task_result_filters": [{"filters": [{}, {"path": QUANTIZER, "args": ["int8"]}]}]},
            "task_result_filters[0].filters[1].args", "['int8']", "an object",
        ),
    ],
)  # fmt: skip
def test_sections_that_are_not_as_flare_has_them(show, tmp_path, config, key, found, expected):
    code, out, err = show(config)
    assert (code, out) == (1, "")
    assert err.startswith(f"nvflare-rdma policy: {tmp_path / 'policy.json'}: {key} is ")
    assert found in err
    assert f"{expected} " in err.splitlines()[0].split("; ")[-1]
    assert err.splitlines()[1:] == ["Code: INVALID_INPUT (exit 1)"]


def test_sections_that_are_left_empty_are_none(show):
    quantizer = {"path": QUANTIZER, "args": None}
    config = {"task_data_filters": None, "task_result_filters": [{"filters": None}, {"filters": [quantizer]}]}
    code, out, _ = show(config)
    assert code == 0
    assert "float16" in out


def test_a_folder_without_a_job_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"no config_fed_server\.json or config_fed_client\.json"):
        read_policies(tmp_path)


AUTO = {"quantization_type": "auto", "policy": [{"role": "embedding", "quantization_type": "int8"}]}
#: 40 MB of float32, of which 20 are an embedding.
LARGE = {
    "embed.weight": {"dtype": "float32", "shape": [1000, 5000]},
    "layers.0.weight": {"dtype": "float32", "shape": [1000, 5000]},
    "norm.weight": {"dtype": "float32", "shape": [1000]},
}


def test_auto_says_what_each_tensor_would_be_at_which_rate(show, tmp_path):
    code, out, err = show({**AUTO, "round_seconds": 16}, LARGE)
    assert (code, err) == (0, "")
    assert "both directions: auto" in out
    rows = lines(out)
    assert rows["embed.weight"] == ["float32", "1000x5000", "20,000,000", "int8", "int8", "int8"]
    assert rows["layers.0.weight"] == ["float32", "1000x5000", "20,000,000", "normfloat4_e4m3", "exact", "exact"]
    assert rows["norm.weight"][-3:] == ["exact"] * 3
    assert "10 Mbit/s: normfloat4_e4m3 (7.67 MB in 6.14 s, relative error about 0.088), not exact (25 MB in 20" in out
    assert "each way has 8 s at 1.25 MB/s, and it is the best one within that." in out
    assert "Before one has told, normfloat4_e4m3 is sent." in out


def test_auto_as_data(tmp_path, capsys):
    (tmp_path / "policy.json").write_text(json.dumps({**AUTO, "round_bytes": 30_000_000}))
    (tmp_path / "model.json").write_text(json.dumps(LARGE))
    assert main(["policy", str(tmp_path / "policy.json"), str(tmp_path / "model.json"), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]["both directions"]
    assert (found["quantization_type"], found["round_seconds"], found["round_bytes"]) == ("auto", None, 30_000_000)
    assert found["bytes"] == 40_004_000
    assert [one["mbit_per_second"] for one in found["rates"]] == [10, 100, 1000]
    for one in found["rates"]:
        assert one["quantization_type"] == "int8", "bytes are the same over all links"
        assert one["tensors"] == {"embed.weight": "int8", "layers.0.weight": "int8", "norm.weight": "exact"}
        assert one["sent_bytes"] == 2 * (5_000_000 + -(-5_000_000 // 2048) * 4) + 4000
    assert found["before_a_rate_is_known"] == "int8"


def test_auto_of_an_exported_job(show, tmp_path):
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe

    from nvflare_rdma.recipe import add_quantization

    (tmp_path / "client.py").write_text("import nvflare.client\n")
    recipe = NumpyFedAvgRecipe(
        name="q", model=[[0.0]], min_clients=1, num_rounds=1, train_script=str(tmp_path / "client.py")
    )
    add_quantization(recipe, "auto", round_seconds=16, max_relative_error=0.05)
    recipe._job.export_job(str(tmp_path / "jobs"))
    code, out, _ = show(tmp_path / "jobs", LARGE)
    assert code == 0
    assert out.count("both directions: auto") == 1
    assert lines(out)["layers.0.weight"][-3:] == ["int8", "exact", "exact"], "normfloat4_e4m3 loses more than may be"
    assert "it is the smallest, and still too much" in out, "two times 5 MB take 8.01 s"


def test_auto_that_can_not_be(show):
    code, out, err = show(AUTO)
    assert (code, out) == (1, "")
    assert "'auto' needs round_seconds" in err
    code, _, err = show({**AUTO, "round_seconds": 16, "delta": True})
    assert code == 1
    assert "delta can't be used with quantization_type 'auto'" in err
