"""Programs in half precision: weights and arithmetic are lowered, inputs and outputs stay as the signature has them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.original import Original, open_original
from exporter.original.shapes import resize
from exporter.sources import resolve_source
from exporter.targets import inductor_compile
from exporter.targets.inductor import Package
from exporter.targets.inductor_compile import compile_program, free_dimensions
from exporter.tasks import get_task
from exporter.torch_export import export_program, lower_module

ROOT = Path(__file__).resolve().parent.parent.parent
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
ALLOWED = {"fp16": 5e-3, "bf16": 4e-2}
"""Relative to an output's largest value: some units in the last place of 11 and of 8 bits."""
MODELS = ("bert-plain", "conv")


def opened(name: str, model_folder: Callable[..., Path]) -> Original:
    if name == "conv":
        return open_original(resolve_source("tests.models:conv_factory"), get_task("custom"))
    return open_original(resolve_source(str(model_folder(name))), get_task("feature-extraction"))


@pytest.fixture(scope="module", params=[(name, precision) for name in MODELS for precision in HALVES], ids="-".join)
def lowered(
    request: pytest.FixtureRequest, model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, ...]:
    """A program in half precision, the precision, its signature, and inputs with outputs in FP32."""
    name, precision = request.param
    original = opened(name, model_folder)
    cases = []
    for batch in (1, 3):
        given = resize(original.signature.inputs, original.example, {"batch": batch})
        arrays = {name: tensor.numpy() for name, tensor in given.items()}
        cases.append((given, original.run(arrays)))
    artifact = export_program(original, tmp_path_factory.mktemp("program"), precision=precision)
    assert artifact.signature == original.signature
    return torch.export.load(str(artifact.path)), precision, artifact.signature, cases


def test_a_program_in_half_precision(lowered: tuple[Any, ...]) -> None:
    program, precision, signature, cases = lowered
    floats = {name: value.dtype for name, value in program.state_dict.items() if value.is_floating_point()}
    assert floats
    assert set(floats.values()) == {HALVES[precision]}
    _, example = program.example_inputs
    assert {name: str(value.dtype).split(".")[1] for name, value in example.items()} == {
        spec.name: spec.dtype for spec in signature.inputs
    }
    module = program.module()
    for given, expected in cases:
        with torch.no_grad():
            found = module(**given)
        assert list(found) == [spec.name for spec in signature.outputs]
        for spec in signature.outputs:
            value = found[spec.name].numpy()
            assert str(value.dtype) == spec.dtype
            assert value.shape == expected[spec.name].shape
            error = np.abs(value - expected[spec.name]).max() / np.abs(expected[spec.name]).max()
            assert 0 < error < ALLOWED[precision]  # near, and not the same: it is lowered


def test_products_of_a_lowered_program_are_in_half_precision(lowered: tuple[Any, ...]) -> None:
    program, precision, _, _ = lowered
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    products = [node for node in calls if any(name in str(node.target) for name in ("linear", "conv", "matmul"))]
    assert {node.meta["val"].dtype for node in products} == {HALVES[precision]}


def test_a_program_in_fp32_is_left_as_it_is(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    original = opened("conv", model_folder)
    program = torch.export.load(str(export_program(original, tmp_path / "program").path))
    assert {value.dtype for value in program.state_dict.values() if value.is_floating_point()} == {torch.float32}
    assert not [node for node in program.graph.nodes if node.op == "call_function" and "_to_copy" in str(node.target)]


def test_what_is_no_float_passes_a_lowered_module_untouched() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("steps", torch.arange(2))

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            assert x.dtype == torch.bfloat16
            return {"y": x * self.scale, "picked": ids + self.steps, "wide": x.double()}

    module = Mixed()
    lower_module(module, "bf16")
    found = module(x=torch.tensor([1.0, 1.001]), ids=torch.tensor([2**40, 3]))
    assert module.steps.dtype == torch.int64
    assert {name: value.dtype for name, value in found.items()} == {
        "y": torch.float32,
        "picked": torch.int64,
        "wide": torch.float64,
    }
    assert found["picked"].tolist() == [2**40, 4]
    assert found["y"].tolist() == [1.0, 1.0]
    assert isinstance(module, Mixed)


def test_a_program_without_example_inputs_cannot_be_compiled(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    program.example_inputs = None
    torch.export.save(program, path)
    with pytest.raises(ValueError, match="carries no example inputs"):
        compile_program(path)


def test_a_program_traced_again_with_a_larger_example_takes_the_same_shapes(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    original = opened("bert", model_folder)
    program = torch.export.load(str(export_program(original, tmp_path).path))
    free = free_dimensions(program)
    assert set(free) == set(program.example_inputs[1])
    batch, length = (dim.__name__ for dim in free["input_ids"].values())
    assert all([dim.__name__ for dim in dims.values()] == [batch, length] for dims in free.values())
    shapes = dict.fromkeys(free, (6, 24))
    example, module = inductor_compile._traced_at(
        program.module(check_guards=False), *program.example_inputs, shapes, free
    )
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == shapes
    for size in (1, 5):
        given = resize(original.signature.inputs, original.example, {"batch": size, "sequence": size + 2})
        expected = original.run({name: tensor.numpy() for name, tensor in given.items()})
        for name, value in module(**given).items():
            np.testing.assert_allclose(value.numpy(), expected[name], atol=2e-6)


TIMES_KERNELS = """
import time
from torch._inductor.runtime import triton_heuristics
from exporter.targets.inductor_compile import _time_kernels_alone

class Tuner:
    def benchmark_all_configs(self):
        begin = time.monotonic()
        time.sleep(0.02)
        return begin, time.monotonic()

triton_heuristics.CachingAutotuner = Tuner
_time_kernels_alone()
print("ready", flush=True)
input()
for _ in range(30):
    print(*Tuner().benchmark_all_configs())
"""


def test_two_compilations_never_time_kernels_at_once(tmp_path: Path) -> None:
    """Two real processes; the kernels are pretended: there are none without a GPU."""
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", TIMES_KERNELS], env=env, **how) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60)[0] for process in both]
    spans = [sorted(tuple(map(float, line.split())) for line in lines.splitlines()) for lines in told]
    assert [len(one) for one in spans] == [30, 30]
    assert spans[0][0][0] < spans[1][-1][1]
    assert spans[1][0][0] < spans[0][-1][1], "they ran beside each other"
    together = sorted(span for one in spans for span in one)
    assert all(before[1] <= after[0] for before, after in pairwise(together))


@pytest.mark.slow
def test_a_lowered_program_compiles_and_keeps_its_inputs_and_outputs(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from torch._inductor.package import package_aoti

    from exporter.targets import get_target, inductor

    if not (state := get_target("inductor-cpu").availability()).available:
        pytest.skip(state.reason)
    original = opened("conv", model_folder)
    given = resize(original.signature.inputs, original.example, {"batch": 3})
    expected = original.run({name: tensor.numpy() for name, tensor in given.items()})
    artifact = export_program(original, tmp_path / "program", precision="bf16")
    package = tmp_path / "built.pt2"
    package_aoti(str(package), inductor.compile_program(artifact.path, tmp_path))
    assert "bfloat16" in inductor.compiled_types(package)
    loaded = Package(package)
    assert loaded.inputs == ["image"]
    found = dict(zip(loaded.outputs, loaded.run([given["image"]]), strict=True))
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert np.abs(found[name].numpy() - value).max() < ALLOWED["bf16"] * np.abs(value).max()
