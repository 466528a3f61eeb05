"""Quantized `torch.export` programs: near the original as programs, and int8 in the native code made from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.quantize.program import Form, calibrate_program, convert_program, quantize_program, write_program
from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError

from .conftest import compiled, rms

AXES = (Axis("batch", 1, 8), Axis("sequence", 2, 64))
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", "sequence", 16)),),
    (TensorSpec("y", "float32", ("batch", "sequence", 16)),),
    AXES,
)


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(torch.nn.functional.gelu(self.up(x))) + x}


def batches(count: int = 4) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    for number in range(count):
        yield {"x": rng.standard_normal((1 + number % 2, 3 + number, 16)).astype(np.float32)}


@pytest.fixture
def program(tmp_path: Path) -> tuple[torch.nn.Module, Artifact]:
    torch.manual_seed(0)
    module = Layers().eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=2, max=64)}}
    exported = torch.export.export(module, (), {"x": torch.randn(2, 5, 16)}, dynamic_shapes=shapes)
    path = tmp_path / "fp32.pt2"
    torch.export.save(exported, path)
    return module, Artifact(path, "pt2", SIGNATURE, InputContract())


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_program_is_near_the_original_at_other_shapes(
    program: tuple[torch.nn.Module, Artifact], tmp_path: Path, form: Form
) -> None:
    module, artifact = program
    out = tmp_path / "int8.pt2"
    record = quantize_program(artifact, out, form=form, samples=batches)
    assert record["quantized"] == 2
    assert record["batches"] == (4 if form == "static" else 0)
    loaded = torch.export.load(out).module(check_guards=False)
    for batch in batches(6):
        x = torch.from_numpy(batch["x"])
        with torch.no_grad():
            error = rms(loaded(x=x)["y"].numpy(), module(x)["y"].numpy())
        assert 1e-4 < error < 0.02


class Gated(torch.nn.Module):
    """Elementwise products: one gates a layer's output, one is of masks, which are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(16, 32)
        self.up = torch.nn.Linear(16, 32)
        self.down = torch.nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = (x > -3).to(torch.int32) * (x < 3).to(torch.int32)
        return {"y": self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x)) * mask}


@pytest.mark.parametrize("form", ["static", "static-smooth", "dynamic"])
def test_elementwise_products_are_left_alone(tmp_path: Path, form: Form) -> None:
    torch.manual_seed(0)
    module = Gated().eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=2, max=64)}}
    exported = torch.export.export(module, (), {"x": torch.randn(2, 5, 16)}, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "fp32.pt2")
    artifact = Artifact(tmp_path / "fp32.pt2", "pt2", SIGNATURE, InputContract())
    record = quantize_program(artifact, tmp_path / "int8.pt2", form=form, samples=batches, alpha=0.5)
    assert record["quantized"] == 3
    graph = torch.export.load(tmp_path / "int8.pt2").graph
    read = [str(source.target) for node in graph.nodes if "mul." in str(node.target) for source in node.all_input_nodes]
    assert any("silu" in source for source in read)
    assert not [source for source in read if "quantize" in source]


class Still(torch.nn.Module):
    """A linear layer whose input never changes: there is nothing to smooth by."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.layer(torch.ones_like(x))}


def test_what_cannot_be_smoothed_is_quantized_as_it_is(tmp_path: Path) -> None:
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=2, max=64)}}
    exported = torch.export.export(Still().eval(), (), {"x": torch.randn(2, 5, 16)}, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "fp32.pt2")
    artifact = Artifact(tmp_path / "fp32.pt2", "pt2", SIGNATURE, InputContract())
    record = quantize_program(artifact, tmp_path / "int8.pt2", form="static-smooth", samples=batches)
    assert record["smoothing"]["groups"] == []
    assert [kept["rule"] for kept in record["smoothing"]["kept"]] == ["constant_input"]
    assert record["quantized"] == 1


def test_static_form_needs_samples(program: tuple[torch.nn.Module, Artifact], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no calibration samples"):
        quantize_program(program[1], tmp_path / "a.pt2", form="static", samples=list)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_compiled_code_multiplies_integers(
    program: tuple[torch.nn.Module, Artifact], tmp_path: Path, form: Form
) -> None:
    module, artifact = program
    quantize_program(artifact, tmp_path / "int8.pt2", form=form, samples=batches)
    session = compiled(tmp_path / "int8.pt2", SIGNATURE, form, tmp_path / "engine")
    told = session.executed()
    assert told["precision"] == "int8"
    assert told["integer_kernels"] == {"qlinear": 2}
    for batch in batches(6):
        with torch.no_grad():
            expected = module(torch.from_numpy(batch["x"]))["y"].numpy()
        assert rms(session.run(batch)["y"], expected) < 0.02


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_kept_layers_are_the_originals(program: tuple[torch.nn.Module, Artifact], tmp_path: Path, form: Form) -> None:
    module, artifact = program
    calibrated = calibrate_program(artifact, form=form, samples=batches)
    assert calibrated.layers() == {"linear": (32, 16), "linear_1": (16, 32)}
    errors = {}
    for keep in ((), ("linear",), ("linear_1",), ()):  # and none is left behind in what was calibrated
        record = write_program(calibrated, tmp_path / "kept.pt2", keep)
        assert record["quantized"] == 2 - len(keep)
        assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [(name, "asked") for name in keep]
        loaded = torch.export.load(tmp_path / "kept.pt2").module(check_guards=False)
        run_at_once = convert_program(calibrated, keep)
        weights = [loaded.state_dict()[name] for name in loaded.state_dict() if "weight" in name]
        plain = {"linear": module.up, "linear_1": module.down}
        assert all(any(torch.equal(plain[name].weight, weight) for weight in weights) for name in keep)
        with torch.no_grad():
            found = [(loaded(**x)["y"], run_at_once(**x)["y"], module(**x)["y"]) for x in tensors(batches(6))]
        assert all(torch.equal(a, b) for a, b, _ in found)
        errors.setdefault(keep, set()).add(max(rms(a.numpy(), c.numpy()) for a, _, c in found))
    assert all(len(error) == 1 for error in errors.values())
    whole, first, second = (min(errors[keep]) for keep in ((), ("linear",), ("linear_1",)))
    assert 1e-4 < min(first, second) <= max(first, second) < whole


def test_what_cannot_be_kept(program: tuple[torch.nn.Module, Artifact], tmp_path: Path) -> None:
    asked = {"form": "static", "samples": batches}
    with pytest.raises(RequestError, match="not in the program"):
        quantize_program(program[1], tmp_path / "a.pt2", keep=["linear_7"], **asked)
    with pytest.raises(RequestError, match="no layer is left"):
        quantize_program(program[1], tmp_path / "a.pt2", keep=["linear", "linear_1"], **asked)


def tensors(given: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, torch.Tensor]]:
    for batch in given:
        yield {name: torch.from_numpy(array) for name, array in batch.items()}
