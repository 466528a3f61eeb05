from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact import InputContract, Variant
from exporter.errors import RequestError
from exporter.onnx_files import load_model, save_model
from exporter.passes import PassContext, default_pipeline, fuse_onnxruntime, optimize, run_pass
from exporter.passes.fuse_onnxruntime import FUSED_DOMAIN, FuseForOnnxRuntime, can_fuse, is_portable
from exporter.targets import get_target
from tests.exporter.passes.builders import outputs
from tests.exporter.passes.conftest import text_samples

ATTENDS = InputContract(attends=True, mask="attention_mask")
NO_PROMISE = InputContract(attends=False, mask="attention_mask")


def same(left: Path, right: Path, folder: Path, *, nothing: bool) -> None:
    samples = text_samples(nothing=nothing)
    before, after = (outputs(load_model(path), samples, folder) for path in (left, right))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a["last_hidden_state"], b["last_hidden_state"])


def test_the_portable_graph_is_smaller_standard_and_the_same(bert_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx" / "model.onnx"
    record = optimize(bert_file, out, contract=ATTENDS, samples=text_samples())
    assert json.loads(json.dumps(record)) == record
    assert record["portable"]
    assert record["rms_relative"] == 0
    assert record["nodes_after"] < 0.75 * record["nodes_before"]
    for gone in ("IsNaN", "GatherND", "Range", "Expand", "Squeeze"):
        assert gone not in record["operators"]
    changed = {entry["name"]: entry["changed"] for entry in record["passes"]}
    assert changed["softmax_guard"] == 2
    assert changed["shapes"] > 0
    assert changed["masks"] > 0
    assert all({"node", "op", "why"} == set(change) for entry in record["passes"] for change in entry["changes"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["model.onnx"]
    same(bert_file, out, tmp_path, nothing=False)


def test_without_the_contract_a_row_of_nothing_equals_the_original(bert_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    record = optimize(bert_file, out, contract=NO_PROMISE, samples=text_samples())
    assert record["operators"]["IsNaN"] == 2
    assert "softmax_guard" not in {entry["name"] for entry in record["passes"]}
    same(bert_file, out, tmp_path, nothing=True)


def test_the_result_runs_in_plain_onnx_runtime(bert_file: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "model.onnx"
    optimize(bert_file, out, contract=ATTENDS, samples=text_samples())
    sessions = [onnxruntime.InferenceSession(str(path)) for path in (bert_file, out)]
    for sample in text_samples():
        a, b = (session.run(None, sample)[0] for session in sessions)
        assert np.linalg.norm(a - b) / np.linalg.norm(a) < 1e-6


def test_a_second_run_changes_nothing(bert_file: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    optimize(bert_file, once, contract=ATTENDS, samples=text_samples())
    record = optimize(once, twice, contract=ATTENDS, samples=text_samples())
    assert [entry["name"] for entry in record["passes"] if entry["changed"]] == []
    assert once.read_bytes() == twice.read_bytes()


def test_two_folders_give_the_same_bytes(bert_file: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("first", "another place"):
        folder = tmp_path / name
        folder.mkdir()
        raw = shutil.copy(bert_file, folder / "raw.onnx")
        optimize(raw, folder / "out" / "model.onnx", contract=ATTENDS, samples=text_samples())
        data = (folder / "out" / "model.onnx").read_bytes()
        assert str(tmp_path).encode() not in data
        assert b"site-packages" not in data
        assert b".py" not in data
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1


def test_nodes_are_named_after_their_modules(bert_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    optimize(bert_file, out, contract=ATTENDS, samples=text_samples())
    graph = load_model(out).graph
    assert "bert.encoder.layer.0.attention.self.query.weight_transposed" in graph.initializers
    names = [node.name for node in graph]
    assert not [name for name in names if name is None or "_empty_nn" in name]
    assert "bert.encoder.layer.0.attention.self.query/MatMul" in names
    assert len(set(names)) == len(names)


def test_external_and_embedded_weights_give_the_same_result(bert_file: Path, tmp_path: Path) -> None:
    external = save_model(load_model(bert_file), tmp_path / "external" / "raw.onnx", external_data=True)
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    optimize(bert_file, first, contract=ATTENDS, samples=text_samples())
    optimize(external, second, contract=ATTENDS, samples=text_samples())
    assert first.read_bytes() == second.read_bytes()


def test_the_fused_graph_agrees_and_is_for_onnx_runtime_only(bert_file: Path, tmp_path: Path) -> None:
    portable, fused = tmp_path / "portable.onnx", tmp_path / "fused.onnx"
    optimize(bert_file, portable, contract=ATTENDS, samples=text_samples())
    record = optimize(portable, fused, contract=ATTENDS, samples=text_samples(), fuse=True)
    assert not record["portable"]
    assert any(name.startswith(f"{FUSED_DOMAIN}::") for name in record["operators"])
    assert 0 < record["rms_relative"] < 1e-5
    assert record["nodes_after"] < record["nodes_before"]
    assert is_portable(load_model(portable))


def test_a_fused_graph_is_not_fused_again(bert_file: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused.onnx"
    optimize(bert_file, fused, contract=ATTENDS, samples=text_samples(), fuse=True)
    with PassContext(ATTENDS, text_samples()) as context:
        record = run_pass(FuseForOnnxRuntime(), load_model(fused), context)
    assert record.changed == 0
    assert "already" in record.why


def test_the_pipeline_is_a_pass_with_parts(bert_file: Path) -> None:
    pipeline = default_pipeline(ATTENDS, fuse=True)
    with PassContext(ATTENDS, text_samples()) as context:
        record = run_pass(pipeline, load_model(bert_file), context)
    assert record.name == "fused"
    assert [part.name for part in record.parts] == ["portable", "fuse_onnxruntime", "clean_fused"]
    assert record.changed == sum(leaf.changed for leaf in record.leaves())


def test_bad_requests_leave_nothing(bert_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    with pytest.raises(RequestError, match="no samples"):
        optimize(bert_file, out, contract=ATTENDS, samples=[])
    with pytest.raises(RequestError, match="overwrite its input"):
        optimize(bert_file, bert_file, contract=ATTENDS, samples=text_samples())
    with pytest.raises(RequestError, match="does not exist"):
        optimize(tmp_path / "none.onnx", out, contract=ATTENDS, samples=text_samples())
    assert not list(out.parent.glob("*")) if out.parent.exists() else True


def test_where_transformers_has_no_fusions_a_fused_form_cannot_be_made_and_all_else_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = get_target("onnxruntime-cpu")
    forms = {
        "fused": Variant("onnxruntime-cpu", "fp32", "fused"),
        "dynamic-fused": Variant("onnxruntime-cpu", "int8", "dynamic-fused"),
        "": Variant("onnxruntime-cpu", "fp32"),
    }
    assert can_fuse()
    assert all(target.buildable(variant).available for variant in forms.values())
    monkeypatch.setattr(fuse_onnxruntime, "can_fuse", lambda: False)
    found = {form: target.buildable(variant) for form, variant in forms.items()}
    assert {form for form, state in found.items() if state.available} == {""}
    assert "has no fusions for ONNX Runtime" in found["fused"].reason
    assert "transformers" in found["fused"].remedy
