from __future__ import annotations

import doctest
import hashlib
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.errors import EnvironmentLackError, RequestError
from exporter.hardware import fingerprint
from exporter.onnx_export import export_onnx
from exporter.original import Original, open_original
from exporter.sources import resolve_source
from exporter.tasks import infer_task
from pipelines import loading, postprocess, routing
from pipelines.bundle import Bundle, write_bundle
from pipelines.loading import FallbackWarning, load
from pipelines.manifest import InputContractEntry, parse_manifest
from pipelines.recipe import Recipe
from tests.pipelines.jobs import files_under

TEXTS = [
    "the river is long",
    "music",
    "what a film , said the old man , and the city was small again",
    "",
    "a good day",
]
ORT = "onnxruntime-cpu-fp32"
Entry = dict[str, Any]
Make = Callable[..., tuple[Bundle, Original]]


def entry(target: str, files: Sequence[str], status: str = "passed", precision: str = "fp32", **more: Any) -> Entry:
    form = more.pop("form", None)
    name = "-".join(part for part in (target, precision, form) if part)
    points = {"1x16": {"speedup_low": more.pop("speed")}} if "speed" in more else {}
    return {"id": name, "target": target, "precision": precision, "form": form, "files": list(files), "status": status,
            "points": points, **more}  # fmt: skip


PORTABLE = entry("onnxruntime-cpu", ["onnx/model.onnx"])
OPENVINO = entry("openvino-cpu", ["onnx/model.onnx"], speed=1.5)


@pytest.fixture(scope="module")
def exports(model_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    made: dict[str, tuple[Original, Path]] = {}

    def get(spec: str) -> tuple[Original, Path]:
        if spec not in made:
            source = resolve_source(spec if ":" in spec else str(model_folder(spec)))
            original = open_original(source, infer_task(source), max_batch=16)
            made[spec] = original, tmp_path_factory.mktemp("export")
            export_onnx(original, made[spec][1])
        return made[spec]

    return get


@pytest.fixture
def make(exports: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(kind, variants, selected, extra)``: a real bundle of a tiny model, and its original."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))

    def build(
        kind: str,
        variants: Sequence[Entry] = (PORTABLE,),
        selected: dict[str, str | None] | None = None,
        extra: dict[str, bytes] | None = None,
        drop: tuple[str, ...] = (),
        signature: Signature | None = None,
    ) -> tuple[Bundle, Original]:
        original, export = exports(kind)
        files: dict[str, Path | bytes] = {**files_under(export, "onnx/"), **(extra or {})}
        if original.encoder_folder is not None:
            own = files_under(original.encoder_folder)
            files |= {name: path for name, path in own.items() if not name.endswith(".safetensors")}
        manifest = parse_manifest(
            {
                "planish_version": "0.1.0",
                "name": "tiny",
                "task": original.task.name,
                "created": "2026-01-02T03:04:05+00:00",
                "source": {"kind": "factory", "digest": "1" * 64},
                "recipe": Recipe(source="a:b", threads=1).resolved(),
                "input_contract": InputContractEntry.of(signature or original.signature, original.contract).model_dump(
                    mode="json"
                ),
                "variants": list(variants),
                "selected": selected or {"overall": variants[0]["id"]},
            },
            Path("planish.json"),
        )
        kept = {name: content for name, content in files.items() if name not in drop}
        return write_bundle(kept, manifest, tmp_path / "bundle"), original

    return build


def run_alone(original: Original, *texts: str) -> dict[str, np.ndarray]:
    encoder: Any = original.encoder
    return original.run(encoder.encode([texts[0]], [texts[1]] if len(texts) == 2 else None))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


# Tasks


def test_embeddings_are_the_originals_in_the_order_given(make: Make) -> None:
    bundle, original = make("bert")
    with load(bundle.path, threads=1) as model:
        assert model.opened == ()
        found = model(TEXTS, batch_size=2)
        assert model.opened == (ORT,)
        wanted = np.concatenate([run_alone(original, text)["sentence_embedding"] for text in TEXTS])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        np.testing.assert_allclose(model(TEXTS[2]), wanted[2], atol=2e-6)
        np.testing.assert_allclose(model(iter(TEXTS * 8)), np.tile(wanted, (8, 1)), atol=2e-6)  # beyond the batch's 16
        assert model([]).shape == (0, wanted.shape[1])
        assert model.notes == []


def test_without_pooling_the_mean_over_tokens(make: Make) -> None:
    bundle, original = make("bert-plain")
    found = load(bundle)(TEXTS)
    wanted = [run_alone(original, text)["last_hidden_state"][0].mean(axis=0) for text in TEXTS]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_classes_of_texts_and_pairs(make: Make) -> None:
    bundle, original = make("bert-classifier")
    names = ["bad", "fair", "good"]
    model = load(bundle)
    for text, answer in zip(TEXTS, model(TEXTS), strict=True):
        scores = softmax(run_alone(original, text)["logits"][0])
        assert answer["label"] == names[int(scores.argmax())]
        assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-5)
    pairs = TEXTS[::-1]
    for text, pair, answers in zip(TEXTS, pairs, model(TEXTS, pairs=pairs, top_k=3), strict=True):
        scores = softmax(run_alone(original, text, pair)["logits"][0])
        assert [answer["label"] for answer in answers] == [names[i] for i in np.argsort(-scores)]
        assert sum(answer["score"] for answer in answers) == pytest.approx(1.0)
    assert set(model("music")) == {"label", "score"}
    assert model([]) == []


@pytest.mark.parametrize(
    ("logits", "problem", "wanted"),
    [
        ([0.0, 0.0], "", [0.5, 0.5]),
        ([0.0, 2.0], "multi_label_classification", [0.5, 0.880797]),
        ([2.0], "", [0.880797]),
        ([-3.5], "regression", [-3.5]),
        ([-1e4], "", [0.0]),
    ],
)
def test_class_scores(logits: list[float], problem: str, wanted: list[float]) -> None:
    np.testing.assert_allclose(postprocess.class_scores(np.array([logits]), problem)[0], wanted, atol=1e-6)


def test_tags_of_words(make: Make) -> None:
    bundle, original = make("mpnet")
    texts = ["The  river, rivers.", "old"]
    found = load(bundle)(texts)
    assert [tag["word"] for tag in found[0]] == ["The", "river", ",", "rivers", "."]
    assert [texts[0][tag["start"] : tag["end"]] for tag in found[0]] == [tag["word"] for tag in found[0]]
    scores = softmax(run_alone(original, texts[0])["logits"][0])
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    # After <s>, every word is one token, but "rivers" is two, and its first one counts.
    encoder: Any = original.encoder
    assert encoder.token_counts([texts[0]]) == [8]
    for tag, place in zip(found[0], [1, 2, 3, 4, 6], strict=True):
        assert tag["label"] == labels[int(scores[place].argmax())]
        assert tag["score"] == pytest.approx(float(scores[place].max()), abs=1e-5)


def test_answers_to_questions(make: Make) -> None:
    bundle, original = make("distilbert")
    model = load(bundle)
    question, contexts = "what is long", ["the river is long and old", "music"]
    found = model([(question, context) for context in contexts])
    assert found == model(question=[question] * 2, context=contexts)
    alone = model(question=question, context=contexts[0])
    outputs = run_alone(original, question, contexts[0])
    begins, ends = (softmax(outputs[name][0, 5:11]) for name in ("start_logits", "end_logits"))
    scores = np.triu(np.outer(begins, ends))  # [CLS] what is long [SEP], then the six words of the context
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    assert alone["answer"] == " ".join(contexts[0].split()[first : last + 1])
    assert alone["answer"] == contexts[0][alone["start"] : alone["end"]]
    assert alone["score"] == pytest.approx(float(scores.max()), rel=1e-4)
    assert found[0]["answer"] == alone["answer"]
    with pytest.raises(RequestError, match="as many contexts as inputs: 1 and 2"):
        model(question=question, context=contexts)
    with pytest.raises(RequestError, match=r"inputs\[1\] is no pair"):
        model([(question, "x"), "y"])
    with pytest.raises(RequestError, match="context must be a text"):
        model(question=question)


def test_tokens_for_masks(make: Make) -> None:
    bundle, original = make("albert")
    model = load(bundle)
    one, two, none = model("the [MASK] is long", top_k=3), model(["a [MASK] and [MASK]"])[0], "no mask here"
    scores = softmax(run_alone(original, "the [MASK] is long")["logits"][0, 2])
    encoder: Any = original.encoder
    known = encoder.tokenizer.get_vocab_size()
    best = [int(i) for i in np.argsort(-scores) if i < known][:3]
    assert [answer["token_id"] for answer in one] == best
    assert [answer["token"] for answer in one] == [encoder.tokenizer.id_to_token(i) for i in best]
    np.testing.assert_allclose([answer["score"] for answer in one], scores[best], atol=1e-5)
    assert [len(answers) for answers in two] == [5, 5]
    with pytest.raises(RequestError, match=r"has no mask.*no mask here.*Write \[MASK\]"):
        model(["[MASK]", none])


def test_classes_of_images(make: Make, tmp_path: Path) -> None:
    bundle, original = make("vit")
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, size, dtype=np.uint8) for size in [(40, 30, 3), (32, 32, 3), (9, 64, 3)]]
    Image.fromarray(pixels[0]).save(tmp_path / "image.png")
    model = load(bundle)
    found = model([tmp_path / "image.png", Image.fromarray(pixels[1]), pixels[2]])
    encoder: Any = original.encoder
    scores = softmax(original.run(encoder.encode(pixels))["logits"])
    assert [answer["label"] for answer in found] == [["bad", "fair", "good"][i] for i in scores.argmax(axis=1)]
    np.testing.assert_allclose([answer["score"] for answer in found], scores.max(axis=1), atol=1e-5)
    assert model(pixels[1]) == model([pixels[1]])[0]
    with pytest.raises(RequestError, match=r"inputs\[1\] is no image: 3"):
        model([pixels[0], 3])


def test_arrays_by_name(make: Make) -> None:
    bundle, original = make("tests.models:conv_factory")
    inputs = {"image": np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)}
    model = load(bundle)
    wanted = original.run(inputs)
    for found in (model.run(inputs), model(inputs)):
        assert list(found) == ["scores", "embedding"]
        for name, value in found.items():
            np.testing.assert_allclose(value, wanted[name], atol=1e-5)
    with pytest.raises(RequestError, match="takes arrays, not texts or images: custom"):
        model(["text"])
    with pytest.raises(RequestError, match="an input is missing: image"):
        model({"picture": inputs["image"]})


def test_arrays_for_a_text_model(make: Make) -> None:
    bundle, original = make("bert")
    encoder: Any = original.encoder
    inputs = encoder.encode(TEXTS)
    found, wanted = load(bundle).run(inputs), original.run(inputs)
    np.testing.assert_allclose(found["last_hidden_state"], wanted["last_hidden_state"], atol=5e-6)


def test_a_graph_that_takes_no_small_batches(make: Make, exports: Callable[..., Any]) -> None:
    real = exports("bert")[0].signature
    signature = Signature(real.inputs, real.outputs, (Axis("batch", 4, 6), Axis("sequence", 12, 40)))
    bundle, original = make("bert", signature=signature)
    found = load(bundle)(TEXTS[:3])
    wanted = np.concatenate([run_alone(original, text)["sentence_embedding"] for text in TEXTS[:3]])
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    assert load(bundle)(TEXTS * 3).shape == (15, 32)


def test_a_graph_of_fixed_shape(make: Make, exports: Callable[..., Any]) -> None:
    real = exports("bert")[0].signature
    fixed = {"batch": 2, "sequence": 20}

    def fix(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(s.name, s.dtype, tuple(fixed.get(str(d), d) for d in s.shape)) for s in specs)

    bundle, original = make("bert", signature=Signature(fix(real.inputs), fix(real.outputs)))
    found = load(bundle)(TEXTS)
    wanted = np.concatenate([run_alone(original, text)["sentence_embedding"] for text in TEXTS])
    np.testing.assert_allclose(found, wanted, atol=2e-6)


# Refusals


def test_unfit_inputs_are_named(make: Make) -> None:
    bundle, _ = make("bert")
    model = load(bundle)
    for value, message in [
        (["a", 3], r"inputs\[1\] is no text: 3"),
        (None, "must be a text or a list of texts: None"),
        (b"bytes", "must be a text"),
        (7, "must be a text"),
    ]:
        with pytest.raises(RequestError, match=message):
            model(value)
    with pytest.raises(RequestError, match=r"feature-extraction has no argument 'top_k'.*It takes inputs alone"):
        model(TEXTS, top_k=2)
    with pytest.raises(RequestError, match="batch_size must be a whole number of at least 1: 0"):
        model(TEXTS, batch_size=0)
    with pytest.raises(RequestError, match="threads must be"):
        load(bundle, threads=0)
    with pytest.raises(RequestError, match=f"no such variant: x. It has: {ORT}"):
        load(bundle, variant="x")
    with pytest.raises(RequestError, match="no such bundle"):
        load(str(bundle.path / "nowhere"))


def test_a_bundle_without_its_tokenizer_runs_arrays_only(make: Make) -> None:
    bundle, original = make("bert", drop=("tokenizer.json",))
    model = load(bundle)
    with pytest.raises(RequestError, match="the folder has no tokenizer"):
        model(TEXTS)
    encoder: Any = original.encoder
    assert model.run(encoder.encode(["music"]))["sentence_embedding"].shape == (1, 32)


def test_a_broken_configuration_is_named(make: Make) -> None:
    bundle, _ = make("bert-classifier")
    (bundle.path / "config.json").write_text("{")
    with pytest.raises(RequestError, match=r"config\.json is not valid JSON"):
        load(bundle, check=False)("music")


def test_a_bundle_of_which_nothing_passed(make: Make) -> None:
    bundle, _ = make("bert", [{**PORTABLE, "status": "failed"}], {"overall": None})
    with pytest.raises(RequestError, match="no variant of this bundle passed"):
        load(bundle)
    assert load(bundle, variant=ORT)("music").shape == (32,)


def test_a_closed_model_says_so(make: Make) -> None:
    bundle, _ = make("bert")
    with load(bundle) as model:
        model("music")
    with pytest.raises(RequestError, match="the model was closed"):
        model("music")
    assert model.opened == ()


# Routing


def test_batches_go_to_the_variant_of_the_nearest_point(make: Make) -> None:
    points = {"overall": ORT, "1x8": OPENVINO["id"], "1x32": None, "8x40": ORT}
    bundle, _ = make("bert", [PORTABLE, OPENVINO], points)
    model = load(bundle, threads=1)
    assert model.selected_for(1, 4) == model.selected_for(1, 8) == model.selected_for(1, 17) == OPENVINO["id"]
    assert model.selected_for(8, 40) == model.selected_for(16, 64) == ORT
    assert model.selected_for(1, 32) == OPENVINO["id"]  # nothing was selected there: the next point's
    short = model("music")
    assert model.opened == (OPENVINO["id"],)
    model(TEXTS * 3)
    assert set(model.opened) == {OPENVINO["id"], ORT}
    np.testing.assert_allclose(short, load(bundle, variant=ORT)("music"), atol=2e-6)
    assert load(bundle, variant=ORT).selected_for(1, 8) == ORT


def test_points_of_models_without_sequences() -> None:
    assert routing.nearest_point(["1", "8"], 3, None) == "8"
    assert routing.nearest_point(["1", "8"], 2, None) == "1"
    assert routing.nearest_point([], 2, None) is None


# What takes the place of a variant that cannot be opened


def engine(here: dict[str, Any] | None = None) -> tuple[Entry, dict[str, bytes]]:
    """An engine's entry and files: no real code, with the fingerprint of a real one."""
    code = b"not really compiled"
    sheet = {"fingerprint": here or fingerprint(), "sha256": hashlib.sha256(code).hexdigest()}
    folder = "variants/inductor-cpu-fp32"
    files = {f"{folder}/model.pt2": code, f"{folder}/fingerprint.json": json.dumps(sheet).encode()}
    return entry("inductor-cpu", list(files), speed=3.0), files


def test_an_engine_that_is_not_trusted(make: Make) -> None:
    first, files = engine()
    cuda = entry("onnxruntime-cuda", ["onnx/model.onnx"], precision="fp16", speed=2.0)
    points = {"overall": first["id"], "1x8": first["id"], "8x16": cuda["id"]}
    bundle, _ = make("bert", [first, PORTABLE, cuda, OPENVINO], points, files)
    model = load(bundle)
    with pytest.warns(FallbackWarning) as caught:
        found = model("music")
    assert len(caught) == len(model.notes) == 1
    told = str(caught[0].message)
    assert told.startswith(f"{first['id']} is not used: an engine is native code, and this one was not built by your")
    assert "onnxruntime-cuda-fp16 is not used: this target cannot run here" in told
    assert told.endswith("Using openvino-cpu-fp32 in their place")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TEXTS)
        model(TEXTS * 4)  # the nearest point is that of the CUDA variant, which is known not to open
    assert model.opened == ("openvino-cpu-fp32",)
    np.testing.assert_allclose(found, load(bundle, variant=ORT)("music"), atol=2e-6)


def test_an_engine_that_does_not_fit(make: Make) -> None:
    first, files = engine({**fingerprint(), "cpu_features": ["avx9000"]})
    bundle, _ = make("bert", [first, PORTABLE], extra=files)
    with pytest.warns(FallbackWarning, match=f"built for another machine.*avx9000.*Using {ORT} in its place"):
        load(bundle, trust=True)("music")


def test_trust_is_for_what_the_manifest_names(make: Make) -> None:
    from pipelines.trust import remember_engine

    first, files = engine()
    bundle, _ = make("bert", [first, PORTABLE], extra=files)
    digest = bundle.manifest.files[first["files"][0]].sha256
    refused, opened = "was not built by your own cache", "the AOTInductor package cannot be opened"
    for arguments, reason in [
        ({}, refused),
        ({"trusted_digests": frozenset({"0" * 64})}, refused),
        ({"trusted_digests": frozenset({digest})}, opened),
        ({"trust": True}, opened),
    ]:
        with pytest.warns(FallbackWarning, match=reason):
            load(bundle, **arguments)("music")  # type: ignore[arg-type]
    remember_engine(digest)
    with pytest.warns(FallbackWarning, match=opened):
        load(bundle)("music")


def test_a_runtime_that_is_not_installed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = make("bert", [OPENVINO, PORTABLE])
    monkeypatch.setitem(sys.modules, "openvino", None)  # what an import finds where the package is missing
    with pytest.warns(FallbackWarning, match=f"{OPENVINO['id']} is not used: a package .* is not installed: openvino"):
        load(bundle)("music")


def test_a_named_variant_is_used_or_refused(make: Make) -> None:
    first, files = engine()
    bundle, _ = make("bert", [first, PORTABLE], extra=files)
    with pytest.raises(RequestError, match="an engine is native code"):
        load(bundle, variant=first["id"])("music")


def test_a_damaged_file_beside_an_engine(make: Make) -> None:
    first, files = engine()
    bundle, _ = make("bert", [first, PORTABLE], extra=files)
    (bundle.path / first["files"][1]).write_text("{")
    with pytest.warns(FallbackWarning, match=f"inductor-cpu-fp32 is not used: .*Using {ORT}"):
        load(bundle)("music")


def test_nothing_can_be_opened(make: Make) -> None:
    first, files = engine()
    bundle, _ = make("bert", [first, PORTABLE], extra=files)
    (bundle.path / "onnx/model.onnx").write_bytes(b"broken")
    with pytest.raises(EnvironmentLackError, match=f"{first['id']}: .*; {ORT}: a file .* is not as it was written"):
        load(bundle)("music")
    with pytest.raises(EnvironmentLackError, match=f"{first['id']}: .*; {ORT}: ONNX Runtime cannot open"):
        load(bundle, check=False)("music")


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_variant_of_which_one_bit_was_changed_is_not_used(make: Make, exports: Callable[..., Any]) -> None:
    copy = {"variants/other/model.onnx": (exports("bert")[1] / "model.onnx").read_bytes()}
    bundle, _ = make("bert", [PORTABLE, {**OPENVINO, "files": list(copy)}], extra=copy)
    expected = load(bundle, variant=ORT)(TEXTS)
    flip(bundle.path / "variants/other/model.onnx")
    with pytest.raises(RequestError, match=r"variants/other/model.onnx: changed \(its SHA-256 differs\)"):
        load(bundle, variant=OPENVINO["id"])(TEXTS)
    with pytest.warns(FallbackWarning, match=f"its SHA-256 differs.*Using {ORT}"):
        found = load(Bundle(bundle.path, bundle.manifest.model_copy(update={"selected": {"overall": OPENVINO["id"]}})))(
            TEXTS
        )
    np.testing.assert_array_equal(found, expected)


def test_a_changed_tokenizer_is_refused_and_a_changed_model_card_is_not(make: Make) -> None:
    bundle, _ = make("bert", [PORTABLE])
    names = [name for name in bundle.manifest.files if "/" not in name and name.endswith((".json", ".txt"))]
    assert {"tokenizer.json", "config.json"} <= set(names)
    for name in names:
        kept = (bundle.path / name).read_bytes()
        flip(bundle.path / name)
        with pytest.raises(RequestError, match=f"{name}: changed"):
            load(bundle)
        (bundle.path / name).write_bytes(kept)
    (bundle.path / "README.md").write_text("our own words")
    load(bundle)("music")


# Beside


def test_no_torch_is_imported(make: Make) -> None:
    bundle, _ = make("bert", [PORTABLE, OPENVINO], {"overall": ORT, "1x8": OPENVINO["id"], "16x8": ORT})
    code = f"""
import sys
from pipelines import load
with load({str(bundle.path)!r}) as model:
    assert model(["music", "the river"]).shape == (2, 32)
    assert model(["the river is long"] * 16).shape == (16, 32)
    print(*model.opened)
heavy = {{"torch", "transformers", "onnx", "optimum", "sklearn", "scipy", "pyarrow", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {ORT, OPENVINO["id"]}


def test_calls_from_several_threads(make: Make) -> None:
    bundle, _ = make("bert", [PORTABLE, OPENVINO], {"overall": ORT, "1x8": OPENVINO["id"], "8x8": ORT})
    model = load(bundle, threads=1)
    wanted = load(bundle, threads=1, variant=ORT)(TEXTS)
    wrong: list[Any] = []

    def work(number: int) -> None:
        try:
            for turn in range(12):
                some = [(number + turn + i) % len(TEXTS) for i in range(1 + turn % 4)]
                found = model([TEXTS[i] for i in some], batch_size=1 + turn % 3)
                np.testing.assert_allclose(found, wanted[some], atol=5e-6)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_the_examples_in_the_documentation(make: Make) -> None:
    bundle, _ = make("bert")
    names = {"load": load, "bundle": bundle}
    for module in (loading, routing, postprocess):
        for found in doctest.DocTestFinder().find(module, extraglobs=names):
            assert doctest.DocTestRunner().run(found).failed == 0, found.name


@pytest.mark.slow
def test_a_real_engine_is_opened_when_trusted(make: Make, classifier: Path) -> None:
    from exporter.targets import get_target

    if not (state := get_target("inductor-cpu").availability()).available:
        pytest.skip(state.reason)
    built = files_under(classifier / "variants" / "inductor-cpu-fp32", "variants/inductor-cpu-fp32/")
    files = {name: path.read_bytes() for name, path in built.items()}

    def scores(model: Any) -> list[list[float]]:
        return [[one["score"] for one in sorted(told, key=lambda one: one["label"])] for told in model(TEXTS, top_k=3)]

    first = entry("inductor-cpu", sorted(files, key=lambda name: not name.endswith(".pt2")))  # what is opened first
    bundle, _ = make("bert-classifier", [first, PORTABLE], extra=files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        model = load(bundle, trust=True)
        found = scores(model)
    assert model.opened == (first["id"],)
    np.testing.assert_allclose(found, scores(load(bundle, variant=ORT)), atol=5e-6)
