"""Smoothed programs: the same function, factors as on ONNX graphs, and integers that outliers do not spoil."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.factors import smoothing_factors
from calibration.quantize.program import quantize_program
from calibration.smooth_program import smooth_program
from exporter.artifact import Artifact, Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError
from tests.calibration.quantize.conftest import compiled, rms

WIDTH, OUTLIER, LARGE = 16, 3, 60.0
SPEC = ("batch", "sequence", WIDTH)
SIGNATURE = Signature(
    (TensorSpec("x", "float32", SPEC),),
    (TensorSpec("y", "float32", SPEC),),
    (Axis("batch", 1, 8), Axis("sequence", 2, 64)),
)


class Block(nn.Module):
    """A norm with a large channel that two layers read, a norm that a residual reads too, and a layer behind ReLU."""

    def __init__(self, outlier: float = LARGE) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.dropout = nn.Dropout(0.1)
        with torch.no_grad():
            for norm, layers in ((self.first, (self.a, self.b)), (self.second, (self.up,))):
                norm.bias.normal_(std=0.2)
                norm.weight[OUTLIER] *= outlier
                norm.bias[OUTLIER] *= outlier
                for layer in layers:
                    layer.weight[:, OUTLIER] /= outlier
            self.up.weight[::12] *= 30  # some channels behind ReLU are much larger

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        normed = self.dropout(self.first(x))
        second = self.second(self.a(normed) * self.b(normed) + x)
        read_again = second[..., OUTLIER : OUTLIER + 1] * 1e-3
        return {"y": self.down(torch.relu(self.up(second))) + read_again}


def batches(count: int = 5, seed: int = 1) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield {"x": rng.standard_normal((1 + number % 2, 3 + number, WIDTH)).astype(np.float32)}


def tensors() -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches():
        yield {"x": torch.from_numpy(batch["x"])}


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    return Block().eval()


def exported(module: nn.Module) -> torch.export.ExportedProgram:
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=2, max=64)}}
    return torch.export.export(module, (), {"x": torch.randn(2, 5, WIDTH)}, dynamic_shapes=shapes)


@pytest.fixture
def program(block: nn.Module, tmp_path: Path) -> Artifact:
    torch.export.save(exported(block), tmp_path / "fp32.pt2")
    return Artifact(tmp_path / "fp32.pt2", "pt2", SIGNATURE, InputContract())


@pytest.mark.parametrize("alpha", [0.5, None])
def test_smoothed_program_computes_the_same(block: nn.Module, alpha: float | None) -> None:
    module = exported(block).module(check_guards=False)
    record = smooth_program(module, tensors(), alpha)
    assert 0 < record["rms_relative"] < 1e-6
    with torch.no_grad():
        for batch in batches(4, seed=9):
            x = torch.from_numpy(batch["x"])
            assert rms(module(x=x)["y"].numpy(), block(x)["y"].numpy()) < 1e-6


def test_factors_folds_and_operators(block: nn.Module) -> None:
    module = exported(block).module(check_guards=False)
    record = smooth_program(module, tensors(), 0.5)
    entries = {entry["activation"]: entry for group in record["groups"] for entry in group["activations"]}
    assert {name: entry["how"] for name, entry in entries.items()} == {
        "dropout": "folded",
        "layer_norm_1": "inserted",
        "relu": "folded",
    }
    assert entries["dropout"]["into"] == ["layer_norm"]
    assert entries["relu"]["into"] == ["linear_2"]
    assert "reads 'layer_norm_1' too" in entries["layer_norm_1"]["why"]
    assert record["inserted"] == sum(str(node.target) == "aten.div.Tensor" for node in module.graph.nodes) == 1
    with torch.no_grad():
        largest = torch.cat([block.first(batch["x"]).reshape(-1, WIDTH) for batch in tensors()]).abs().amax(0)
        rows = torch.cat([block.a.weight, block.b.weight]).abs().amax(0)
    factors = smoothing_factors(largest.numpy(), rows.numpy(), 0.5)
    linears = {node.name: node for node in module.graph.nodes if str(node.target) == "aten.linear.default"}
    for name, layer in (("linear", block.a), ("linear_1", block.b)):
        weight = getattr(module, linears[name].args[1].target)
        np.testing.assert_allclose(weight.numpy(), layer.weight.detach().numpy() * factors, rtol=1e-5)


def test_int8_of_outliers(block: nn.Module, program: Artifact, tmp_path: Path) -> None:
    errors = {}
    for form in ("static", "static-smooth"):
        out = tmp_path / f"{form}.pt2"
        record = quantize_program(program, out, form=form, samples=batches)
        assert record["quantized"] == 4
        assert ("smoothing" in record) == (form == "static-smooth")
        loaded = torch.export.load(out).module(check_guards=False)
        with torch.no_grad():
            found = [
                rms(loaded(x=torch.from_numpy(b["x"]))["y"].numpy(), block(torch.from_numpy(b["x"]))["y"].numpy())
                for b in batches(6, seed=5)
            ]
        errors[form] = np.mean(found)
    assert errors["static"] > 0.03
    assert errors["static-smooth"] < 0.3 * errors["static"]


def test_no_samples(block: nn.Module) -> None:
    with pytest.raises(RequestError, match="no calibration samples"):
        smooth_program(exported(block).module(check_guards=False), [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activation_that_is_not_finite(block: nn.Module, value: float) -> None:
    samples = list(tensors())
    samples[2]["x"][0, 1, 4] = value
    with pytest.raises(RequestError, match="NaN or infinite") as caught:
        smooth_program(exported(block).module(check_guards=False), samples)
    assert "calibration batch 2" in str(caught.value.value)


def test_nothing_to_smooth() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": torch.relu(x)}

    module = exported(Plain()).module(check_guards=False)
    before = module.code
    assert smooth_program(module, tensors())["groups"] == []
    assert module.code == before


def test_constant_input_is_left_alone(block: nn.Module) -> None:
    with torch.no_grad():
        block.first.weight.zero_()
    record = smooth_program(exported(block).module(check_guards=False), tensors(), 0.5)
    assert [(entry["node"], entry["rule"]) for entry in record["kept"]] == [
        ("linear", "constant_input"),
        ("linear_1", "constant_input"),
    ]


@pytest.mark.parametrize("alpha", [0.6, 0.85])
def test_a_given_alpha_is_every_groups(program: Artifact, tmp_path: Path, alpha: float) -> None:
    asked = {"form": "static-smooth", "samples": batches}
    told = quantize_program(program, tmp_path / "given.pt2", alpha=alpha, **asked)["smoothing"]
    assert told["alpha"] == alpha
    assert {group["alpha"] for group in told["groups"]} == {alpha}
    free = quantize_program(program, tmp_path / "free.pt2", **asked)["smoothing"]
    assert free["alpha"] is None
    assert {tuple(group["products"]): group["factor_max"] for group in told["groups"]} != {
        tuple(group["products"]): group["factor_max"] for group in free["groups"]
    }


@pytest.mark.slow
def test_compiled_code_multiplies_integers(block: nn.Module, program: Artifact, tmp_path: Path) -> None:
    quantize_program(program, tmp_path / "int8.pt2", form="static-smooth", samples=batches)
    session = compiled(tmp_path / "int8.pt2", SIGNATURE, "static-smooth", tmp_path / "engine")
    told = session.executed()
    assert told["precision"] == "int8"
    assert told["integer_kernels"] == {"qlinear": 4}
    for batch in batches(4, seed=5):
        with torch.no_grad():
            expected = block(torch.from_numpy(batch["x"]))["y"].numpy()
        assert rms(session.run(batch)["y"], expected) < 0.1
