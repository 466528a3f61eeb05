from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter.errors import InternalError, PlanishError, RequestError
from exporter.passes import Change, Pass, PassContext, PassRecord, Pipeline, run_pass
from exporter.passes.base import FUSED_RMS
from tests.exporter.passes.builders import model, operators, run

TEXT = """
g (float[n, 3] x) => (float[n, 3] y, float[n, 3] z) <float two = {2.0}> {
    a = Mul (x, two)
    y = Add (a, two)
    z = Log (x)
}"""
SAMPLES = [{"x": np.array([[1, 2, 3]], np.float32)}, {"x": np.array([[1, -1, 0], [4, 5, 6]], np.float32)}]


class Scale(Pass):
    """Multiplies the constant by a factor: what a wrong rewrite looks like."""

    name, why = "scale", "a test"

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        value = model.graph.initializers["two"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(self.factor), name="two")
        return self.record([Change("two", "Initializer", "scaled")])


class Custom(Pass):
    name, why = "custom", "a test"

    def __init__(self, action: object, *, name: str = "custom") -> None:
        self.action, self.name = action, name

    def apply(self, model: ir.Model, context: PassContext) -> PassRecord:
        self.action(model)  # type: ignore[operator]
        return self.record([Change("?", "?", "a test")])


def test_a_pass_that_breaks_parity_is_named_with_output_and_error() -> None:
    with pytest.raises(InternalError) as caught:
        run(Pipeline([Scale(1.0), Scale(1.001)]), model(TEXT), SAMPLES)
    assert "'scale'" in str(caught.value)
    assert "output 'y'" in str(caught.value)
    assert "1e-06" in str(caught.value)


def test_rounding_alone_is_within_the_bound() -> None:
    record = run(Scale(1 + 2.0**-23), model(TEXT), SAMPLES)
    assert record.rms_relative is not None
    assert 0 < record.rms_relative < 1e-6


def test_small_errors_cannot_add_up_unseen() -> None:
    steps = [Scale(1 + 4e-7) for _ in range(4)]
    run(steps[0], model(TEXT), SAMPLES)
    with pytest.raises(InternalError, match="changed what the model computes"):
        run(Pipeline(steps), model(TEXT), SAMPLES)


def test_an_exact_pass_after_a_fused_one_is_held_to_the_fused_bound() -> None:
    fused = Scale(1 + 5e-6)
    fused.rms_bound = FUSED_RMS
    record = run(
        Pipeline([fused, Custom(lambda m: m.graph.sort(), name="sort"), Scale(1 + 2.0**-23)]), model(TEXT), SAMPLES
    )
    assert [leaf.name for leaf in record.leaves()] == ["scale", "sort", "scale"]


def test_a_nan_that_appears_or_goes_breaks_parity() -> None:
    def hide(graph: ir.Model) -> None:
        log = next(node for node in graph.graph if node.op_type == "Log")
        absolute = ir.node("Abs", [log.inputs[0]])
        graph.graph.insert_before(log, absolute)
        log.replace_input_with(0, absolute.outputs[0])

    with pytest.raises(InternalError, match=r"'hide'.*output 'z': NaN, infinities"):
        run(Custom(hide, name="hide"), model(TEXT), SAMPLES)


def test_an_illegal_graph_is_named() -> None:
    def misspell(graph: ir.Model) -> None:
        next(iter(graph.graph)).op_type = "Mull"

    with pytest.raises(InternalError, match="after the graph pass 'misspell': the graph is not legal ONNX"):
        run(Custom(misspell, name="misspell"), model(TEXT), SAMPLES)


def test_a_changed_interface_is_named() -> None:
    def rename(graph: ir.Model) -> None:
        graph.graph.outputs[0].name = "other"

    with pytest.raises(InternalError, match="'rename' changed the model's inputs or outputs"):
        run(Custom(rename, name="rename"), model(TEXT), SAMPLES)


def test_a_pass_that_raises_is_named_and_planish_errors_go_through() -> None:
    def fail(graph: ir.Model) -> None:
        raise AttributeError("no such thing")

    def refuse(graph: ir.Model) -> None:
        raise RequestError("not this model")

    with pytest.raises(InternalError, match=r"the graph pass 'fail' failed.*no such thing"):
        run(Custom(fail, name="fail"), model(TEXT), SAMPLES)
    with pytest.raises(RequestError, match="not this model"):
        run(Custom(refuse), model(TEXT), SAMPLES)


def test_requires_and_ensures_are_asked() -> None:
    class Picky(Custom):
        def requires(self, model: ir.Model, context: PassContext) -> None:
            if "Conv" not in operators(model):
                raise RequestError("needs a convolution")

    class Unfaithful(Custom):
        def ensures(self, model: ir.Model, context: PassContext) -> None:
            raise InternalError("a promise is broken")

    with pytest.raises(PlanishError, match="needs a convolution"):
        run(Picky(lambda m: None), model(TEXT), SAMPLES)
    with pytest.raises(InternalError, match="after the graph pass 'custom': a promise is broken"):
        run(Unfaithful(lambda m: None), model(TEXT), SAMPLES)


def test_pipelines_nest_and_record_every_pass() -> None:
    inner = Pipeline([Scale(1.0), Scale(1.0)], name="inner", why="two")
    with PassContext(samples=SAMPLES) as context:
        record = run_pass(Pipeline([Scale(1.0), inner], name="outer"), model(TEXT), context)
    assert [part.name for part in record.parts] == ["scale", "inner"]
    assert [leaf.name for leaf in record.leaves()] == ["scale"] * 3
    assert record.changed == 3
    assert record.rms_relative == 0
    assert record.leaves()[0].to_dict()["changes"] == [{"node": "two", "op": "Initializer", "why": "scaled"}]


def test_a_broken_pass_in_a_nested_pipeline_is_the_one_that_is_named() -> None:
    broken = Scale(2.0)
    broken.name = "broken"
    with pytest.raises(InternalError, match="'broken' changed what"):
        run(Pipeline([Pipeline([Scale(1.0), broken])]), model(TEXT), SAMPLES)


def test_without_samples_nothing_is_claimed() -> None:
    record = run(Scale(1.0), model(TEXT), [])
    assert record.rms_relative is None
    assert record.max_abs_difference is None
