from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import RequestError
from exporter.targets.base import check_inputs
from pipelines.verification.envelope import Case, build_cases, counting_positions

POINTS = [(1, 16), (1, 32), (1, 128), (8, 128)]
PAD = {"ids": 9, "types": 3}


def text_signature(max_batch: int = 64, max_length: int = 256, min_length: int = 1) -> Signature:
    names = ("ids", "mask", "types")
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    return Signature(specs, (), (Axis("batch", 1, max_batch), Axis("sequence", min_length, max_length)))


def text_samples(count: int = 20, longest: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    samples = []
    for length in np.linspace(3, longest, count).astype(int):
        ids = rng.integers(100, 200, (1, length))
        samples.append({"ids": ids, "mask": np.ones_like(ids), "types": np.zeros_like(ids)})
    return samples


CONTRACT = InputContract(True, "mask", {"ids": (0, 200)})


def by_kind(cases: list[Case], kind: str) -> list[Case]:
    return [case for case in cases if case.kind == kind]


def test_corners_of_the_shapes_are_there() -> None:
    signature = text_signature()
    cases = build_cases(text_samples(), signature, CONTRACT, POINTS, pad=PAD)
    shapes = {case.name: case.shape(signature) for case in cases}
    assert shapes["smallest-1x1"] == "1x1"
    assert shapes["largest-length-2x256"] == "2x256"
    assert shapes["largest-batch-32x16"] == "32x16"
    assert {f"point-{batch}x{length}" for batch, length in POINTS} <= set(shapes)
    kinds = {case.kind for case in cases}
    assert kinds == {"sample", "shape", "ragged", "left-padded", "right-padded", "alone"}
    assert len(shapes) == len(cases)


def test_all_samples_are_used_and_padding_is_what_was_asked() -> None:
    samples = text_samples()
    cases = build_cases(samples, text_signature(), CONTRACT, POINTS, pad=PAD)
    found = []
    for case in by_kind(cases, "sample"):
        for ids, mask, types in zip(*(case.inputs[name] for name in ("ids", "mask", "types")), strict=True):
            length = int(mask.sum())
            found.append(ids[:length].tolist())
            assert (ids[length:] == 9).all()
            assert (types[length:] == 3).all()
            assert (mask[:length] == 1).all()
    assert found == [sample["ids"][0].tolist() for sample in samples]


def test_left_and_right_padding() -> None:
    cases = build_cases(text_samples(), text_signature(), CONTRACT, POINTS, pad=PAD)
    (left,), (right,) = by_kind(cases, "left-padded"), by_kind(cases, "right-padded")
    ragged = next(case for case in by_kind(cases, "ragged") if case.name.startswith("ragged"))
    lengths = ragged.inputs["mask"].sum(axis=1)
    assert (lengths.min(), lengths.max(), len(set(lengths)) > 3) == (1, 128, True)
    np.testing.assert_array_equal(np.sort(left.inputs["mask"], axis=1), left.inputs["mask"])
    np.testing.assert_array_equal(left.inputs["mask"].sum(axis=1), lengths)
    for row in range(len(lengths)):
        own = ragged.inputs["ids"][row, : lengths[row]]
        np.testing.assert_array_equal(left.inputs["ids"][row, -lengths[row] :], own)
    assert not right.inputs["mask"][:, -1].any(), "every row is padded"


def test_one_sample_alone_and_in_a_padded_batch() -> None:
    cases = build_cases(text_samples(), text_signature(), CONTRACT, POINTS, pad=PAD)
    named = {case.name: case for case in cases}
    (alone,) = by_kind(cases, "alone")
    batch = named[alone.partner or ""]
    length = alone.inputs["ids"].shape[1]
    assert batch.inputs["ids"].shape[1] > length
    np.testing.assert_array_equal(batch.inputs["ids"][alone.row, :length], alone.inputs["ids"][0])
    assert batch.inputs["mask"][alone.row].sum() == length


def test_rows_that_attend_to_nothing_only_without_the_promise() -> None:
    def empty_rows(contract: InputContract) -> list[str]:
        cases = build_cases(text_samples(), text_signature(), contract, POINTS, pad=PAD)
        return [case.kind for case in cases if not case.inputs["mask"].any(axis=1).all()]

    assert empty_rows(CONTRACT) == []
    assert empty_rows(InputContract(False, "mask")) == ["unattended"]


def test_which_positions_count() -> None:
    case = Case("a", {"mask": np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1]])}, "unattended")
    counting = counting_positions(case, InputContract(False, "mask"))
    assert counting is not None
    assert counting.tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert counting_positions(case, InputContract(False, None)) is None


@settings(max_examples=60, deadline=None)
@given(
    max_batch=st.integers(1, 40),
    max_length=st.integers(4, 300),
    min_length=st.integers(1, 4),
    attends=st.booleans(),
    budget=st.sampled_from([1, 500, 2**14, 2**24]),
    count=st.integers(1, 12),
    points=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 600)), min_size=1, max_size=3),
)
def test_no_case_goes_beyond_what_the_model_accepts(
    max_batch: int,
    max_length: int,
    min_length: int,
    attends: bool,
    budget: int,
    count: int,
    points: list[tuple[int, int | None]],
) -> None:
    signature = text_signature(max_batch, max_length, min_length)
    contract = InputContract(attends, "mask", {"ids": (0, 200)})
    samples = text_samples(count, longest=min(40, max_length))
    cases = build_cases(samples, signature, contract, points, pad=PAD, budget_elements=budget)
    for case in cases:
        check_inputs(case.inputs, signature, contract)
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    assert all(case.partner in names for case in cases if case.partner)


def test_the_budget_bounds_the_cases_and_the_name_says_so() -> None:
    signature = text_signature(max_length=8192)
    cases = build_cases(text_samples(), signature, CONTRACT, POINTS, budget_elements=2**18)
    assert "largest-length-of-8192-1x512" in {case.name for case in cases}
    for case in cases:
        batch, length = case.inputs["ids"].shape
        assert batch * length * length <= 2**18


def test_the_same_seed_gives_the_same_cases() -> None:
    one, two, other = (
        build_cases(text_samples(), text_signature(), CONTRACT, POINTS, seed=seed)[-3].inputs for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one["ids"], two["ids"])
    assert one["ids"].tolist() != other["ids"].tolist()


def test_images_vary_in_batch_only() -> None:
    signature = Signature((TensorSpec("pixel_values", "float32", ("batch", 3, 4, 4)),), (), (Axis("batch", 1, 16),))
    rng = np.random.default_rng(0)
    samples = [{"pixel_values": rng.standard_normal((1, 3, 4, 4)).astype(np.float32)} for _ in range(10)]
    cases = build_cases(samples, signature, InputContract(), [(1, None), (8, None)])
    shapes = {case.name: case.inputs["pixel_values"].shape[0] for case in cases}
    assert shapes == {
        "samples-0": 8,
        "samples-8": 2,
        "smallest-1": 1,
        "typical-odd-3": 3,
        "point-1": 1,
        "point-8": 8,
        "largest-batch-16": 16,
        "alone-1": 1,
        "alone-1-in-batch-of-4": 4,
    }
    (alone,) = by_kind(cases, "alone")
    batch = next(case for case in cases if case.name == alone.partner)
    np.testing.assert_array_equal(batch.inputs["pixel_values"][alone.row], alone.inputs["pixel_values"][0])


def test_tensors_of_several_free_axes_share_a_batch_only_with_their_like() -> None:
    spec = TensorSpec("x", "float32", ("batch", "height", "width"))
    axes = (Axis("batch", 1, 8), Axis("height", 1, 9), Axis("width", 1, 9))
    samples = [{"x": np.full((1, h, w), h, np.float32)} for h, w in ((2, 3), (4, 5), (2, 3))]
    cases = build_cases(samples, Signature((spec,), (), axes), InputContract(), [(2, None)])
    shapes = [case.inputs["x"].shape for case in by_kind(cases, "sample")]
    assert sorted(shapes) == [(1, 4, 5), (2, 2, 3)]


def test_a_model_without_dynamic_axes_gets_its_samples() -> None:
    signature = Signature((TensorSpec("x", "float32", (2, 3)),), ())
    samples = [{"x": np.zeros((2, 3), np.float32)}, {"x": np.ones((2, 3), np.float32)}]
    assert [case.name for case in build_cases(samples, signature, InputContract(), [(1, None)])] == [
        "sample-0",
        "sample-1",
    ]


def test_what_does_not_fit_is_refused() -> None:
    signature = text_signature(max_length=8)
    with pytest.raises(RequestError, match="at least one sample"):
        build_cases([], signature, CONTRACT, POINTS)
    with pytest.raises(RequestError, match="lacks an input"):
        build_cases([{"ids": np.zeros((1, 3), np.int64)}], signature, CONTRACT, POINTS)
    with pytest.raises(RequestError, match="batch of one"):
        build_cases([{name: np.zeros((2, 3), np.int64) for name in ("ids", "mask", "types")}], signature, CONTRACT, [])
    with pytest.raises(RequestError, match="longer than the model accepts"):
        build_cases(text_samples(longest=9), signature, CONTRACT, POINTS)
