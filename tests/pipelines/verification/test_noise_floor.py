from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.artifact import InputContract
from exporter.errors import RequestError
from pipelines.verification.envelope import Case
from pipelines.verification.noise_floor import fp32_floor, fp64_outputs, half_floor, half_outputs

NO_CONTRACT = InputContract()


def vectors(count: int = 2, width: int = 16) -> list[Case]:
    rng = np.random.default_rng(0)
    return [Case(f"case-{i}", {"x": rng.standard_normal((3, width)).astype(np.float32)}, "shape") for i in range(count)]


def tokens(count: int = 2) -> list[Case]:
    rng = np.random.default_rng(0)
    return [Case(f"case-{i}", {"ids": rng.integers(0, 50, (2, 7 + i))}, "shape") for i in range(count)]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))
        self.scale = nn.Parameter(torch.rand(8))  # owned by a module that has children
        self.register_buffer("shift", torch.rand(8))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.softmax(self.layers(x) * self.scale + self.shift, dim=-1)}


class ReadsWeightsOfOthers(nn.Module):
    """Uses a child's weight without calling the child, and ties its output to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.inner = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 50, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = nn.functional.linear(self.embedding(ids), self.inner.weight.t() * 2, self.inner.bias[:16])
        hidden = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return {"y": self.out(hidden), "z": nn.functional.embedding(ids, self.out.weight)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        outputs, (last, _) = self.lstm(self.embedding(ids))
        return outputs, last


class RepeatsALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return x


class FollowsTheTypeOfAWeight(nn.Module):
    """Brings its input to the type of a weight that another module owns, as vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner((x * 1.1).to(self.inner.weight.dtype)))


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Case]]]] = {
    "plain": (Plain, vectors),
    "reads weights of others": (ReadsWeightsOfOthers, tokens),
    "recurrent": (Recurrent, tokens),
    "repeats a layer": (RepeatsALayer, vectors),
    "follows the type of a weight": (FollowsTheTypeOfAWeight, vectors),
}


class Guard:
    """The state of a module, to be compared with the state afterwards: same objects, same storages, same bits."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = {name: (id(t), t.data_ptr(), t.dtype, t.detach().clone()) for name, t in self._tensors()}
        self.training = [owner.training for owner in module.modules()]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers()]

    def check(self) -> None:
        now = dict(self._tensors())
        assert now.keys() == self.state.keys()
        for name, (identity, pointer, dtype, values) in self.state.items():
            tensor = now[name]
            assert (id(tensor), tensor.data_ptr(), tensor.dtype) == (identity, pointer, dtype), name
            assert torch.equal(tensor, values), name
        assert [owner.training for owner in self.module.modules()] == self.training
        for owner in self.module.modules():
            assert not owner._forward_hooks
            assert not owner._forward_pre_hooks


def named(outputs: object) -> dict[str, np.ndarray]:
    if isinstance(outputs, Tensor):
        return {"output": outputs.numpy()}
    if isinstance(outputs, dict):
        return {name: value.numpy() for name, value in outputs.items()}
    return {f"output_{i}": value.numpy() for i, value in enumerate(outputs)}  # type: ignore[arg-type]


def run(module: nn.Module, case: Case, dtype: torch.dtype) -> dict[str, np.ndarray]:
    tensors = {name: torch.from_numpy(array) for name, array in case.inputs.items()}
    with torch.no_grad():
        return named(module(**{name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("whole_below_bytes", [0, 2**40], ids=["piecewise", "whole"])
def test_fp64_equals_the_module_converted_to_fp64(name: str, whole_below_bytes: int) -> None:
    torch.manual_seed(1)
    make, cases = MODULES[name]
    module = make().eval()
    guard = Guard(module)
    found = fp64_outputs(module, cases(), whole_below_bytes=whole_below_bytes)
    guard.check()
    assert found.outputs is not None, found.reason
    expected = make().double().eval()
    expected.load_state_dict({key: value.double() for key, value in module.state_dict().items()})
    for case in cases():
        for output, value in run(expected, case, torch.float64).items():
            got = found.outputs[case.name][output]
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", MODULES)
def test_the_fp32_floor_is_of_fp32_size(name: str) -> None:
    torch.manual_seed(2)
    make, cases = MODULES[name]
    module = make().eval()
    reference = {case.name: run(module, case, torch.float32) for case in cases()}
    floor = fp32_floor(module, cases(), reference.__getitem__, NO_CONTRACT)
    for case in cases():
        for output in reference[case.name]:
            error = floor.errors[case.name][output]
            assert 0 <= error < 2e-6, (output, error)
    assert "FP64" in floor.note


class Pinned(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.Linear(16, 16)
        self.register_buffer("steps", torch.arange(16.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "float":
            return y.float().exp().to(y.dtype) + y
        if self.how == "softmax":
            return torch.softmax(y, dim=-1, dtype=torch.float32) + y
        if self.how == "copy":
            held = torch.zeros(y.shape, dtype=torch.float32)
            held.copy_(y)
            return held + y
        if self.how == "angles":  # never FP64, but rounded in FP32 and mixed in
            return y + torch.arange(16, dtype=torch.float32).cos()
        return y.float()


@pytest.mark.parametrize("how", ["float", "softmax", "copy", "angles", "output"])
@pytest.mark.parametrize("whole_below_bytes", [0, 2**40], ids=["piecewise", "whole"])
def test_models_that_pin_fp32_are_found_out(how: str, whole_below_bytes: int) -> None:
    module = Pinned(how).eval()
    guard = Guard(module)
    found = fp64_outputs(module, vectors(), whole_below_bytes=whole_below_bytes)
    guard.check()
    assert found.outputs is None
    assert "float32" in found.reason
    floor = fp32_floor(module, vectors(), lambda _: {}, NO_CONTRACT)
    assert floor.of("any", "any") == 2e-7
    assert found.reason in floor.note


class ExactInFp32(nn.Module):
    """FP32 on the way that rounds nothing: a mask, and buckets by a logarithm that become integers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.bias = nn.Embedding(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        mask = (1.0 - torch.ones(x.shape[0], 16, dtype=torch.int64).float()) * torch.finfo(torch.float32).min
        bucket = torch.log(torch.arange(1, x.shape[0] + 1).float()).long()
        return self.layer(x) / torch.sqrt(torch.tensor(16.0)) + mask + self.bias(bucket)


def test_exact_fp32_on_the_way_is_no_pin() -> None:
    found = fp64_outputs(ExactInFp32().eval(), vectors())
    assert found.outputs is not None, found.reason


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer(x).dtype != torch.float32:
            raise ValueError("only FP32 here\nand more")
        return x


def test_a_model_that_raises_gives_the_reason_and_is_left_whole() -> None:
    module = Raises().eval()
    guard = Guard(module)
    assert "only FP32 here" in fp64_outputs(module, vectors(), whole_below_bytes=0).reason
    assert half_outputs(module, vectors(), "fp16").reason == "it does not run in float16: only FP32 here"
    guard.check()
    floor = half_floor(module, vectors(), lambda _: {}, NO_CONTRACT, "bf16")
    assert floor.of("case-0", "y") is None
    assert "only FP32 here" in floor.note


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_equals_the_module_converted_to_half(name: str, precision: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    make, cases = MODULES[name]
    module = make().train()
    guard = Guard(module)
    found = half_outputs(module, cases(), precision)
    guard.check()
    assert found.outputs is not None, found.reason
    expected = make().to(dtype).eval()
    expected.load_state_dict({key: value.to(dtype) for key, value in module.state_dict().items()})
    for case in cases():
        with torch.no_grad():
            inputs = {k: torch.from_numpy(v) for k, v in case.inputs.items()}
            result = expected(**{k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()})
        pairs = result.items() if isinstance(result, dict) else []
        for output, value in pairs:
            np.testing.assert_array_equal(found.outputs[case.name][output], value.float().numpy())
    reference = {case.name: run(module.eval(), case, torch.float32) for case in cases()}
    floor = half_floor(module, cases(), reference.__getitem__, NO_CONTRACT, precision)
    low, high = (1e-5, 1e-2) if precision == "fp16" else (1e-4, 1e-1)
    pooled = floor.pooled(next(iter(reference["case-0"])))
    assert pooled is not None
    assert low < pooled < high


class Loud(nn.Module):
    """Its product leaves FP16's range, and what becomes of it is of ordinary size again."""

    def __init__(self, loudness: float) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)
        self.loudness = loudness

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.layer(x)
        loud = hidden * self.loudness
        return {"quiet": hidden, "y": loud * loud / (self.loudness * self.loudness)}


def test_where_fp16_overflows_its_floor_comes_from_bf16() -> None:
    torch.manual_seed(0)
    module = Loud(1e4).eval()
    reference = {case.name: run(module, case, torch.float32) for case in vectors()}
    floor = half_floor(module, vectors(), reference.__getitem__, NO_CONTRACT, "fp16")
    wide = half_floor(module, vectors(), reference.__getitem__, NO_CONTRACT, "bf16")
    assert "of y it is NaN or infinite: an eighth of the error of its bf16 run instead" in floor.note
    assert {case: errors["y"] for case, errors in floor.errors.items()} == {
        case: errors["y"] / 8 for case, errors in wide.errors.items()
    }
    quiet = half_floor(Loud(1.0).eval(), vectors(), reference.__getitem__, NO_CONTRACT, "fp16")
    assert "bf16" not in quiet.note
    # The rule holds where both can be measured: FP16 is about eight times as exact.
    assert 4 < wide.errors["case-0"]["quiet"] / floor.errors["case-0"]["quiet"] < 16


def test_half_names_its_precisions_and_no_module_has_no_run() -> None:
    with pytest.raises(RequestError, match="not a half precision"):
        half_outputs(Plain(), vectors(), "fp32")
    assert fp32_floor(None, [], lambda _: {}, NO_CONTRACT).fixed == 2e-7
    assert half_floor(None, [], lambda _: {}, NO_CONTRACT, "fp16").pooled("y") is None


def test_the_floor_counts_the_positions_that_errors_count() -> None:
    class Ragged(nn.Module):
        """Wrong by its FP32 rounding only where nobody looks."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"y": x * torch.where(mask[..., None] == 0, self.weight, 1.0)}

    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    case = Case("case", {"x": x, "mask": np.array([[1, 1, 0], [1, 0, 0]])}, "ragged")
    module = Ragged().eval()
    reference = run(module, case, torch.float32)
    counted = fp32_floor(module, [case], lambda _: reference, InputContract(True, "mask"))
    everything = fp32_floor(module, [case], lambda _: reference, NO_CONTRACT)
    assert counted.errors["case"]["y"] == 0.0
    assert everything.errors["case"]["y"] > 0.0


@pytest.mark.parametrize("kind", ["bert", "albert", "distilbert", "mpnet", "deberta-v2"])
def test_transformers_models_have_a_true_fp64_run(kind: str, model_folder: Callable[..., Path]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = model_folder(kind)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            found = self.model(input_ids=input_ids, attention_mask=attention_mask)
            return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    ids = np.random.default_rng(0).integers(5, 40, (2, 9))
    mask = np.array([[1] * 9, [1] * 5 + [0] * 4])
    cases = [Case("case", {"input_ids": ids, "attention_mask": mask}, "ragged")]
    module = Flat().eval()
    guard = Guard(module)
    pieces, whole = (fp64_outputs(module, cases, whole_below_bytes=size) for size in (0, 2**40))
    guard.check()
    assert pieces.outputs is not None, pieces.reason
    assert whole.outputs is not None, whole.reason
    reference = run(module, cases[0], torch.float32)
    for name, value in whole.outputs["case"].items():
        np.testing.assert_allclose(pieces.outputs["case"][name], value, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(reference[name], value, rtol=1e-2, atol=1e-4)
        assert not np.array_equal(reference[name].astype(np.float64), value)


def test_piecewise_needs_little_memory_beside_the_weights() -> None:
    """Measured in a child process, whose peak starts from its own base."""
    import subprocess
    import sys

    script = """
import resource, numpy as np, torch
from torch import nn
from pipelines.verification.envelope import Case
from pipelines.verification.noise_floor import fp64_outputs
module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(48))).eval()   # 192 MiB of weights, 4 MiB a layer
class Flat(nn.Module):
    def __init__(self):
        super().__init__(); self.m = module
    def forward(self, x): return self.m(x)
case = Case("a", {"x": np.zeros((1, 1024), np.float32)}, "shape")
small = nn.Linear(4, 4)
fp64_outputs(small, [Case("a", {"input": np.zeros((1, 4), np.float32)}, "shape")], whole_below_bytes=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert fp64_outputs(Flat(), [case], whole_below_bytes=0).outputs is not None
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 1024, "in KiB; all weights in FP64 would be 384 MiB"
