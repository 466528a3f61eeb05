"""The verdict in a sentence: figures only where there are some, and where they can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter.artifact import InputContract, Signature, TensorSpec
from pipelines.assemble import sentence
from pipelines.manifest import InputContractEntry, Manifest, parse_manifest
from pipelines.recipe import Recipe

SIGNATURE = Signature((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
NAME = "onnxruntime-cpu-fp32"


def written(points: dict[str, Any], selected: str | None = NAME) -> Manifest:
    variant = {"id": NAME, "target": "onnxruntime-cpu", "precision": "fp32", "files": ["onnx/model.onnx"]}
    return parse_manifest(
        {
            "planish_version": "0.1.0",
            "name": "tiny",
            "task": "custom",
            "created": "2026-01-02T03:04:05+00:00",
            "source": {"kind": "factory", "digest": "sha256:" + "0" * 64},
            "recipe": Recipe(source="x").resolved(),
            "input_contract": InputContractEntry.of(SIGNATURE, InputContract()).model_dump(mode="json"),
            "variants": [{**variant, "status": "passed", "reason": "", "points": points}],
            "selected": {"overall": selected},
        },
        Path("planish.json"),
    )


def test_figures_of_a_quiet_machine() -> None:
    points = {"1x16": {"p50_ms": 1.0, "speedup": 2.5}, "8x128": {"p50_ms": 9.0, "speedup": 2.0}}
    assert sentence(written(points), {"busy_elsewhere": 0.01}).endswith(
        "2.00× to 2.50× the speed of eager PyTorch (most at 1 × 16)"
    )
    assert "2.50×" in sentence(written({"1x16": points["1x16"]}), {})


def test_no_figures_of_a_busy_machine() -> None:
    told = sentence(written({"8": {"p50_ms": 1.0, "speedup": 5505.8}}), {"busy_elsewhere": 0.52})
    assert "5505" not in told
    assert "52%" in told
    assert told.startswith(f"Ship {NAME}")


def test_timed_beside_a_baseline_that_failed_is_not_untimed() -> None:
    told = sentence(written({"1x16": {"p50_ms": 1.0, "speedup": None}}), {"baseline": "eager"})
    assert "eager PyTorch failed" in told
    assert "not measured" not in told
    assert "not measured" in sentence(written({}), {})


def test_what_it_is_compared_with_has_a_name() -> None:
    points = {"1x16": {"p50_ms": 1.0, "speedup": 1.5}}
    assert sentence(written(points), {"baseline": "onnx"}).endswith("1.50× the speed of the ONNX source at 1 × 16")
    assert sentence(written(points), {"baseline": NAME}).endswith("no variant is faster for certain")


def test_nothing_to_ship() -> None:
    assert sentence(written({}, selected=None), {}).startswith("Do not ship")
