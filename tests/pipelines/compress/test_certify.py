"""What is planted in a checkpoint is found, and nothing else."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.errors import GateError, RequestError
from exporter.original import original_arguments
from exporter.sources import resolve_source
from exporter.structure import layer_parts, layers_of, share_layers, structure_of
from exporter.tasks import infer_task
from pipelines.compress import wording
from pipelines.compress.certify import certify
from pipelines.compress.claims import check_claims, parse_claims
from pipelines.compress.examine import examine
from tests.exporter.structure.planted import assert_alike, opened, outputs, silence_head, silence_neurons
from tests.pipelines.compress.planted import cluster, lower_rank, planted, prune, prune_two_four

Folders = Callable[..., Path]
Here = Callable[..., tuple[int, str, str]]


def examined(folder: Path | str, *, claims: str = "sparsity=0") -> dict[str, Any]:
    """What `certify` would say without a race, in this process."""
    source = resolve_source(str(folder))
    original = original_arguments(source, infer_task(source))
    with tempfile.TemporaryDirectory() as scratch:
        record = {**examine({"original": original, "folder": scratch, "twin": False}), "latency": None}
    return {
        **record,
        "findings": wording.findings(record),
        "claims": check_claims(parse_claims(claims), record),
    }


def written(folder: Path | str, out: Path) -> dict[str, Any]:
    return certify(str(folder), latency=False, out=out)


def told(record: dict[str, Any]) -> str:
    return "\n".join(record["findings"])


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in record["sparsity"]["matrices"]}


@pytest.mark.parametrize("kind", ["bert", "bert-dense", "bert-classifier", "bert-mlm", "distilbert", "mpnet", "vit"])
def test_a_dense_model_is_dense_and_nothing_else(model_folder: Folders, kind: str) -> None:
    record = examined(model_folder(kind))
    assert record["sparsity"]["overall"] < 0.001
    assert record["two_four"]["exact"] == record["identical_layers"] == []
    assert record["low_rank"]["matrices"] == record["few_values"]["matrices"] == []
    assert record["structure"]["known"]
    assert "chance" not in told(record)
    assert (record["structure"]["dead_heads"], record["structure"]["dead_neurons"]) == (0, 0)
    assert record["removal"] is None
    assert record["latency"] is None
    assert record["findings"][0].startswith("Dense: 0 %")
    assert "Nothing of it is compressed" in record["findings"][1]
    assert len(record["findings"]) == 2


@pytest.mark.parametrize("kind", ["deberta-v2", "modernbert", "albert"])
def test_an_unknown_inside_only_hides_heads_and_neurons(model_folder: Folders, kind: str) -> None:
    record = examined(model_folder(kind))
    assert not record["structure"]["known"]
    assert "Dead heads and neurons were not looked for: the inside of this model is not known: " in told(record)
    assert kind in told(record)
    assert "Dense: 0 %" in told(record)
    assert record["sparsity"]["matrices"]


def test_unstructured_sparsity(model_folder: Folders, tmp_path: Path) -> None:
    folder = planted(model_folder("bert-classifier"), tmp_path / "sparse", prune(0.9))
    record = examined(folder)
    sparsity = record["sparsity"]
    assert sparsity["in_layers"] == pytest.approx(0.9, abs=1e-3)
    assert sparsity["overall"] == pytest.approx(0.9 * 16384 / (16384 + 1024 + 96), abs=1e-3)
    entry = by_name(record)["bert.encoder.layer.1.intermediate.dense.weight"]
    assert (entry["elements"], entry["zeros"], entry["shape"]) == (2048, 1843, [64, 32])
    if record["two_four"]["exact"]:  # a small matrix may conform by chance
        assert "this may be chance" in told(record)
    assert record["low_rank"]["matrices"] == record["few_values"]["matrices"] == []
    assert "Sparse: 84.3 %" in told(record)
    assert "90 % in the layers that repeat" in told(record)
    weights = record["weights"]
    assert weights["parameters"] - weights["nonzero"] >= sparsity["zeros"]
    assert weights["dtypes"] == {"float32": weights["stored"]}
    assert weights["bytes"] == (folder / "model.safetensors").stat().st_size


def test_embeddings_and_what_is_tied_to_them_do_not_count(model_folder: Folders, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        module.get_input_embeddings().weight[10:] = 0.0

    record = examined(planted(model_folder("bert-mlm"), tmp_path / "m", change))
    assert record["sparsity"]["overall"] < 0.001
    assert not any("decoder" in name or "embedding" in name for name in by_name(record))


def test_exact_two_four(model_folder: Folders, tmp_path: Path) -> None:
    record = examined(planted(model_folder("bert-classifier"), tmp_path / "m", prune_two_four), claims="2:4")
    exact = set(record["two_four"]["exact"])
    assert exact == {name for name, entry in by_name(record).items() if entry["in_layers"]}
    assert len(exact) == 12
    assert all(by_name(record)[name]["sparsity"] == 0.5 for name in exact)
    assert "Exactly 2:4 sparse in 12 of 14 matrices" in told(record)
    assert [claim["true"] for claim in record["claims"]] == [True]


def test_one_group_that_does_not_conform_is_seen(model_folder: Folders, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        prune_two_four(module)
        layer_parts(module, 0).query.weight[3, 8:12] = 0.5

    record = examined(planted(model_folder("bert"), tmp_path / "m", change), claims="2:4,sparsity=0.5")
    entry = by_name(record)["encoder.layer.0.attention.self.query.weight"]
    assert (entry["conforming"], entry["groups"], entry["exactly_two_four"]) == (255, 256, False)
    assert len(record["two_four"]["exact"]) == 11
    assert [claim["true"] for claim in record["claims"]] == [False, True]
    assert record["claims"][0]["sentence"].startswith("2:4 is NOT true: 11 of 12")


def test_two_four_along_the_outputs_is_none(model_folder: Folders, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        layer_parts(module, 0).query.weight.view(8, 4, 32)[:, :2] = 0.0

    assert examined(planted(model_folder("bert"), tmp_path / "m", change))["two_four"]["exact"] == []


def dead_parts(module: Any) -> None:
    """A head that nothing reads, one without values, and neurons of both sorts; others look dead and are not."""
    silence_head(module, 0, 3)
    parts = layer_parts(module, 1)
    parts.value.weight[8:16] = 0.0
    parts.value.bias[8:16] = 0.0
    parts.value.weight[16:24] = 0.0  # its bias is a constant that reaches the outputs
    parts.value.bias[16:24] = 0.3
    silence_neurons(module, 0, [5, 63])
    parts.up.weight[7] = 0.0
    parts.up.bias[7] = 0.0
    parts.up.weight[8] = 0.0  # gelu(0.5) reaches the outputs
    parts.up.bias[8] = 0.5


@pytest.mark.parametrize("kind", ["bert-dense", "bert-mlm", "distilbert", "vit"])
def test_dead_parts_are_found_removed_and_proven(model_folder: Folders, tmp_path: Path, kind: str) -> None:
    folder = planted(model_folder(kind), tmp_path / "m", dead_parts)
    record = written(folder, tmp_path / "smaller")
    layers = record["structure"]["layers"]
    assert [layer["dead_heads"] for layer in layers] == [[3], [1]]
    assert [layer["dead_neurons"] for layer in layers] == [[5, 63], [7]]
    removal = record["removal"]
    assert removal["parity"]["verdict"] == "passed"
    assert removal["parity"]["rms_relative"] <= 1e-5
    assert removal["parity"]["cases"] > 3
    assert removal["parameters_after"] < removal["parameters_before"]
    assert removal["bytes_after"] < removal["bytes_before"]
    assert removal["folder"] == str(tmp_path / "smaller")
    before, after = opened(folder), opened(tmp_path / "smaller")
    assert structure_of(after.module) == {"heads": [3, 3], "neurons": [62, 63], "shares": [0, 1]}
    assert_alike(outputs(after), outputs(before))
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "smaller").iterdir()}
    assert "2 of 8 attention heads are dead: removing them changes no output." in record["findings"]
    assert "agree within rounding" in told(record)
    again = examined(tmp_path / "smaller")
    assert (again["structure"]["dead_heads"], again["structure"]["dead_neurons"]) == (0, 0)


def test_without_a_place_the_proof_is_there_and_nothing_is_written(model_folder: Folders, tmp_path: Path) -> None:
    folder = planted(model_folder("bert"), tmp_path / "m", dead_parts)
    record = examined(folder)
    assert record["removal"]["parity"]["verdict"] == "passed"
    assert record["removal"]["folder"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_outputs_that_depend_on_nothing_prove_nothing(model_folder: Folders, tmp_path: Path) -> None:
    """As a pooler that was pruned away: every text gets the same logits, which any removal would leave alone."""

    def change(module: Any) -> None:
        module.bert.pooler.dense.weight[:] = 0.0
        silence_neurons(module, 0, [5])

    folder = planted(model_folder("bert-classifier"), tmp_path / "m", change)
    record = examined(folder)
    assert "All zeros: bert.pooler.dense.weight. What goes in there has no effect on the outputs" in told(record)
    assert record["removal"]["parity"]["verdict"] == "inconclusive"
    assert "the outputs are the same whatever the inputs are: that proves nothing" in told(record)
    with pytest.raises(GateError, match="the same whatever the inputs are"):
        written(folder, tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


def test_pruning_masks_are_told_with_what_takes_them_off(model_folder: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_folder("bert-classifier"), tmp_path / "masked")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("intermediate.dense.weight"))
    weight = state.pop(name)
    state |= {f"{name}_orig": weight, f"{name}_mask": (weight.abs() > weight.abs().median()).float()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RequestError, match=r"pruning masks: call torch.nn.utils.prune.remove"):
        certify(str(folder), latency=False)


def test_a_layer_keeps_one_head_and_one_neuron(model_folder: Folders, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        layer_parts(module, 0).output.weight[:] = 0.0
        layer_parts(module, 1).down.weight[:] = 0.0

    record = written(planted(model_folder("bert"), tmp_path / "m", change), tmp_path / "smaller")
    assert "4 of 8 attention heads are dead: removing them changes no output; 1 of them must stay" in told(record)
    after = structure_of(opened(tmp_path / "smaller").module)
    assert (after["heads"], after["neurons"]) == ([1, 4], [64, 1])
    assert record["low_rank"]["matrices"] == []


def test_heads_that_cannot_be_removed_are_told_all_the_same(model_folder: Folders, tmp_path: Path) -> None:
    record = examined(planted(model_folder("mpnet"), tmp_path / "m", lambda module: silence_head(module, 0, 1)))
    assert record["removal"] is None
    assert "1 of 8 attention heads is dead" in told(record)
    assert "relative position bias" in told(record)


def test_identical_layers(model_folder: Folders, tmp_path: Path) -> None:
    def copy(module: Any) -> None:
        layers_of(module)[1].load_state_dict(layers_of(module)[0].state_dict())

    (twice,) = examined(planted(model_folder("bert"), tmp_path / "twice", copy))["identical_layers"]
    size = sum(p.numel() for p in layers_of(opened(model_folder("bert")).module)[0].parameters())
    assert twice == {"list": "encoder.layer", "layers": [0, 1], "stored_once": False, "parameters": size}
    once = planted(model_folder("bert"), tmp_path / "once", lambda module: share_layers(module, [[0, 1]]))
    record = examined(once)
    assert record["identical_layers"] == [{**twice, "stored_once": True, "parameters": 0}]
    assert "Layers 0, 1 of encoder.layer are identical, weight for weight (stored once)." in record["findings"]

    def nearly(module: Any) -> None:
        copy(module)
        layer_parts(module, 1).down.bias[0] = torch.nextafter(layer_parts(module, 1).down.bias[0], torch.tensor(1.0))

    assert examined(planted(model_folder("bert"), tmp_path / "nearly", nearly))["identical_layers"] == []


def test_low_rank(model_folder: Folders, tmp_path: Path) -> None:
    (found,) = examined(planted(model_folder("bert"), tmp_path / "m", lower_rank(6)))["low_rank"]["matrices"]
    assert (found["rank"], found["full_rank"], found["saves"]) == (6, 32, 32 * 32 - 6 * 64)
    assert found["name"] == "encoder.layer.0.attention.self.query.weight"
    record = examined(planted(model_folder("bert"), tmp_path / "high", lower_rank(16)))
    assert record["low_rank"]["matrices"] == []
    assert "numpy.linalg.matrix_rank" in record["low_rank"]["rule"]


def test_clustered_weights(model_folder: Folders, tmp_path: Path) -> None:
    record = examined(planted(model_folder("bert"), tmp_path / "m", cluster(16)))
    found = record["few_values"]["matrices"]
    assert len(found) == 12
    assert max(entry["values"] for entry in found) <= 16
    assert "Clustered: 12 matrices of at most" in told(record)


def test_sixteen_bit_weights_are_told(model_folder: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "half"))
    state = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    record = examined(folder)
    assert set(record["weights"]["dtypes"]) == {"float16"}
    assert "Nothing of it is compressed" in told(record)


@pytest.mark.slow
def test_the_race_says_whether_anything_is_faster(
    model_folder: Folders, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def change(module: Any) -> None:
        prune(0.9)(module)
        dead_parts(module)

    folder = planted(model_folder("bert"), tmp_path / "m", change)
    record = certify(
        str(folder),
        out=tmp_path / "smaller",
        targets=["onnxruntime-cpu"],
        points=["1x8", "2x8"],
        budget_s=1.0,
        threads=1,
    )
    latency = record["latency"]
    assert latency["points"] == ["1x8", "2x8"]
    assert set(latency["ratios"]) == {"eager", "onnxruntime-cpu-fp32", "onnxruntime-cpu-fp32-fused"}
    for forms in latency["ratios"].values():
        assert set(forms) == {"found", "smaller"}
        for found in forms.values():
            for ratio in (found, *found["points"].values()):
                assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"] < math.inf
                assert ratio["rounds"] >= 5
    assert any("sparse, " in line and "onnxruntime-cpu-fp32 " in line for line in record["findings"])
    assert any(line.startswith("Without its dead parts") for line in record["findings"])
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_a_model_that_takes_none_of_the_points_says_so(
    model_folder: Folders, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    folder = planted(model_folder("bert"), tmp_path / "m", prune(0.9))
    record = certify(str(folder), targets=["onnxruntime-cpu"], points=["1x500"], threads=1)
    assert record["latency"]["ratios"] == {}
    assert "was not measured: the model takes none of the operating points" in told(record)


def test_the_command(model_folder: Folders, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = planted(model_folder("bert"), tmp_path / "m", prune(0.9))
    status, out, err = here("certify", folder, "--no-latency", "--quiet", "--claims", "sparsity=0.9")
    assert (status, err) == (0, "")
    assert "- Sparse: 90 %" in out
    assert "Claim sparsity=0.9 is true: measured 90 %." in out
    status, out, err = here("certify", folder, "--no-latency", "--quiet", "--json", "--claims", "sparsity=0.95,2:4")
    assert (status, err) == (1, "")
    record = json.loads(out)
    assert [claim["true"] for claim in record["claims"]] == [False, False]
    assert record["task"] == "feature-extraction"


def test_wrong_requests_end_with_2(model_folder: Folders, tmp_path: Path, here: Here) -> None:
    folder = model_folder("bert")
    taken = tmp_path / "taken"
    (taken / "x").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for arguments in (
        [tmp_path / "nowhere"],
        [tmp_path / "empty"],
        ["tests.models:conv_factory"],
        [folder, "--task", "no-such-task"],
        [folder, "--out", taken],
        [folder, "--claims", "small=1"],
        [folder, "--claims", "sparsity=1.5"],
        [folder, "--points", "fast"],
        [folder, "--points", ","],
        [folder, "--targets", "abacus"],
    ):
        status, out, err = here("certify", *arguments, "--quiet")
        assert (status, out) == (2, ""), (arguments, err)
        assert err.startswith("error: ")


def test_a_smaller_model_that_is_not_the_same_is_not_written(model_folder: Folders, tmp_path: Path) -> None:
    """Weights that are not numbers: nothing can be shown of them."""

    def change(module: Any) -> None:
        dead_parts(module)
        layer_parts(module, 0).query.weight[0, 0] = np.nan

    folder = planted(model_folder("bert"), tmp_path / "m", change)
    with pytest.raises(GateError, match="not written"):
        written(folder, tmp_path / "smaller")
    assert not (tmp_path / "smaller").exists()


@pytest.mark.slow
def test_minilm_is_dense(minilm: str, tmp_path: Path) -> None:
    record = examined(minilm)
    assert record["findings"][0].startswith("Dense: ")
    assert len(record["findings"]) == 2, record["findings"]
    assert record["structure"]["heads"] == 72


@pytest.mark.slow
def test_minilm_with_dead_parts(minilm: str, tmp_path: Path) -> None:
    def change(module: Any) -> None:
        prune(0.5)(module)
        silence_head(module, 2, 4)
        silence_neurons(module, 5, list(range(100)))

    record = written(planted(minilm, tmp_path / "m", change), tmp_path / "smaller")
    assert record["removal"]["parity"]["verdict"] == "passed"
    assert record["structure"]["removable_heads"] == 1
    assert record["structure"]["removable_neurons"] == 100
    assert "Sparse: 50" in told(record)


def test_what_it_refuses_is_a_request(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        certify(str(tmp_path / "nothing"))
