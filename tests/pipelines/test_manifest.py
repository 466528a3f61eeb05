from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError
from pipelines.manifest import (
    FileEntry,
    InputContractEntry,
    Manifest,
    is_safe_name,
    manifest_digest,
    parse_manifest,
    render,
    sealed,
)
from pipelines.recipe import Recipe
from pipelines.schemas import schemas

SIGNATURE = Signature(
    (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
    (TensorSpec("logits", "float32", ("batch", 2)),),
    (Axis("batch", 1, 64), Axis("sequence", 1, 512)),
)
CONTRACT = InputContract(True, "attention_mask", {"input_ids": (0, 30521)})


def plain(**changes: Any) -> dict[str, Any]:
    variant = {
        "id": "onnxruntime-cpu-fp32",
        "target": "onnxruntime-cpu",
        "precision": "fp32",
        "files": ["onnx/model.onnx"],
        "status": "passed",
        "gates": {"parity": {"verdict": "passed", "reason": "inside the floor", "limit": 1e-6}},
        "points": {"1x32": {"p50_ms": 1.5, "p99_ms": 2.0, "speedup": 2.25, "runs": 400}},
        "peak_rss_bytes": 1 << 28,
    }
    return {
        "schema_version": 1,
        "planish_version": "0.1.0",
        "name": "tiny",
        "task": "text-classification",
        "created": "2026-01-02T03:04:05+00:00",
        "source": {"kind": "huggingface", "digest": "sha256:" + "0" * 64, "licence": None, "parameters": 12},
        "recipe": Recipe(source="a:b", threads=2).resolved(),
        "input_contract": InputContractEntry.of(SIGNATURE, CONTRACT).model_dump(mode="json"),
        "variants": [variant],
        "selected": {"overall": "onnxruntime-cpu-fp32", "1x32": None},
        "environment": {"python": "3.11"},
        **changes,
    }


def manifest(**changes: Any) -> Manifest:
    return parse_manifest(plain(**changes), Path("planish.json"))


def test_signature_and_contract_survive() -> None:
    entry = parse_manifest(json.loads(render(manifest().model_dump(mode="json"))), Path("x")).input_contract
    assert entry.signature == SIGNATURE
    assert entry.contract == CONTRACT


def test_sealing_fills_in_files_and_digest() -> None:
    done = sealed(manifest(), {"onnx/model.onnx": FileEntry(sha256="0" * 64, bytes=3)})
    data = json.loads(render(done.model_dump(mode="json")))
    assert data["files"] == {"onnx/model.onnx": {"sha256": "0" * 64, "bytes": 3}}
    assert data["manifest_sha256"] == manifest_digest(data)
    assert parse_manifest(data, Path("x")) == done
    assert next(iter(data)) == "schema_version"
    assert list(data)[-2:] == ["files", "manifest_sha256"]


def test_digest_covers_every_value_and_not_itself() -> None:
    data = plain()
    base = manifest_digest(data)
    assert manifest_digest({**data, "manifest_sha256": "x"}) == base
    assert manifest_digest(dict(reversed(data.items()))) == base
    for key in data:
        assert manifest_digest({**data, key: "changed"}) != base


def test_gates_and_points_may_say_more_and_keep_it() -> None:
    (variant,) = manifest().variants
    assert variant.gates["parity"].model_dump()["limit"] == 1e-6
    assert variant.points["1x32"].model_dump()["runs"] == 400
    assert variant.energy_j is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"extra": 1}, "extra"),
        ({"name": None}, "name"),
        ({"schema_version": 0}, "schema_version"),
        ({"selected": {"overall": "tensorrt-fp16"}}, "tensorrt-fp16"),
        ({"files": {"x": {"sha256": "short", "bytes": 1}}}, "files.x.sha256"),
        ({"variants": [plain()["variants"][0]] * 2}, "listed twice"),
        ({"variants": [{**plain()["variants"][0], "id": "other"}]}, "should be 'onnxruntime-cpu-fp32'"),
        ({"variants": [{**plain()["variants"][0], "files": ["../../etc/passwd"]}]}, "no path inside"),
        ({"variants": [{**plain()["variants"][0], "status": "great"}]}, "status"),
        ({"variants": [{**plain()["variants"][0], "status": "failed"}]}, "none that passed"),
        ({"variants": [{**plain()["variants"][0], "energy_j": math.nan}]}, "energy_j"),
    ],
)
def test_wrong_shape_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        manifest(**changes)
    assert says in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", {}, {"schema_version": True}])
def test_no_manifest_at_all(data: Any) -> None:
    with pytest.raises(RequestError, match="not the shape"):
        parse_manifest(data, Path("x"))


def test_newer_version_is_named_as_such() -> None:
    with pytest.raises(RequestError, match=r"newer Planish.*schema_version 2.*Upgrade"):
        parse_manifest({"schema_version": 2, "anything": "else"}, Path("x"))


@pytest.mark.parametrize(
    ("name", "safe"),
    [("a", True), ("onnx/model.onnx", True), (".hidden", True), ("a b/ü", True), ("..a", True)]
    + [(n, False) for n in ("", ".", "..", "../a", "a/../b", "/a", "a//b", "./a", "a/", "a\\b", "a\0", "planish.json")],
)
def test_safe_names(name: str, safe: bool) -> None:
    assert is_safe_name(name) is safe


def test_committed_schemas_are_current() -> None:
    folder = Path(__file__).parents[2] / "docs/schemas"
    for name, text in schemas().items():
        assert (folder / name).read_text() == text, "run: python -m pipelines.schemas"


def test_schemas_accept_what_is_valid_and_refuse_what_is_not() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    checks = {name: jsonschema.Draft202012Validator(json.loads(text)) for name, text in schemas().items()}
    data = sealed(manifest(), {}).model_dump(mode="json")
    checks["manifest.schema.json"].validate(data)
    checks["recipe.schema.json"].validate(data["recipe"])
    checks["recipe.schema.json"].validate({"source": "a"})
    assert not checks["manifest.schema.json"].is_valid({**data, "extra": 1})
    assert not checks["recipe.schema.json"].is_valid({"source": "a", "latency": {"budget_s": 0}})


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", ".hidden", "", "a\n"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="name"):
        parse_manifest(plain(name=name), Path("x"))
