"""The main job, whole: from a model folder to a bundle, by the command line as users call it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporter.errors import EnvironmentLackError, RequestError
from exporter.targets import get_target
from pipelines import Recipe, load, run
from pipelines.bundle import Bundle, check_integrity, read_bundle
from pipelines.runner import outcome
from pipelines.verification.latency_result import spoils
from tests.pipelines.jobs import (
    COMMAND,
    ENCODER,
    SMALL,
    TEXTS,
    digests,
    environment,
    export,
    manifest,
    planish,
    settings,
    verdicts,
)

pytestmark = pytest.mark.slow
ORT = "onnxruntime-cpu-fp32"
ENGINE = "inductor-cpu-fp32"
Folders = Callable[..., Path]
Planish = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))


def encoded(folder: Path) -> dict[str, np.ndarray]:
    """The sentences as one padded batch, by transformers' own tokenizer."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(list(TEXTS), padding=True, truncation=True, return_tensors="np")
    return {name: np.asarray(array, dtype=np.int64) for name, array in tokens.items()}


def originals(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers' model says."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        outputs = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return {"last_hidden_state": outputs.last_hidden_state.numpy()}


def pooled(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the tokens, normalised, as the folder's ``modules.json`` says."""
    weights = mask[:, :, None]
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def rms(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.linalg.norm(expected - actual) / np.linalg.norm(expected))


def test_the_graph_runs_in_plain_onnxruntime_as_in_transformers(bundle: Path, model_folder: Folders) -> None:
    import onnxruntime

    source = model_folder("bert")
    inputs = encoded(source)
    session = onnxruntime.InferenceSession(bundle / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, inputs), strict=True))
    hidden = originals(source, inputs)["last_hidden_state"]
    valid = inputs["attention_mask"].astype(bool)
    assert names == ["last_hidden_state", "sentence_embedding"]
    assert rms(hidden[valid], outputs["last_hidden_state"][valid]) < 1e-5
    assert rms(pooled(hidden, inputs["attention_mask"]), outputs["sentence_embedding"]) < 1e-5


def test_the_bundle_is_a_model_folder_of_transformers(bundle: Path, model_folder: Folders) -> None:
    from transformers import AutoConfig

    source = model_folder("bert")
    assert AutoConfig.from_pretrained(bundle).to_dict() | {"_name_or_path": ""} == (
        AutoConfig.from_pretrained(source).to_dict() | {"_name_or_path": ""}
    )
    inputs, again = encoded(source), encoded(bundle)
    assert {name: array.tolist() for name, array in again.items()} == {k: v.tolist() for k, v in inputs.items()}
    # include_source: the weights are there too
    np.testing.assert_array_equal(
        originals(bundle, inputs)["last_hidden_state"], originals(source, inputs)["last_hidden_state"]
    )


def test_the_bundle_says_what_it_is(bundle: Path, model_folder: Folders) -> None:
    written = manifest(bundle)
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    page = (bundle / "report.html").read_text(encoding="utf-8")
    assert written["task"] == "feature-extraction"
    assert written["selected"]["overall"] in (ORT, f"{ORT}-fused")
    # latency ranks, and gates only where the recipe says so
    assert verdicts(bundle)[ORT] == ("passed", {"parity": "passed", "quality": "passed", "latency": "skipped"})
    point = next(entry for entry in written["variants"] if entry["id"] == ORT)["points"]["1x8"]
    assert 0 < point["speedup_low"] <= point["speedup"] <= point["speedup_high"]
    assert [stage["cached"] for stage in report["timeline"]] == [False] * len(report["timeline"])
    assert "texts.jsonl" in json.dumps(report["data"])
    assert ORT in page
    assert str(model_folder("bert").parent) not in json.dumps(written)  # a release tells nobody's folders
    assert not any(name.endswith((".py", ".log")) for name in digests(bundle))
    assert check_integrity(bundle) == []


def test_load_agrees_with_the_original(bundle: Path, model_folder: Folders) -> None:
    source = model_folder("bert")
    inputs = encoded(source)
    expected = pooled(originals(source, inputs)["last_hidden_state"], inputs["attention_mask"])
    with load(bundle) as model:
        assert rms(expected, model(list(TEXTS))) < 1e-5


def test_weights_beside_their_graphs(here: Planish, model_folder: Folders, texts: Path, tmp_path: Path) -> None:
    """As every model beyond 2 GB has them: each graph finds its own, wherever the bundle is."""
    import onnx

    targets = "targets=[onnxruntime-cpu, onnxruntime-cuda]"
    more = settings("export.external_data=always", "precisions=[fp32, fp16, bf16]", targets)
    status, _, told = here("export", model_folder("bert"), *more, "--data", texts, "--out", tmp_path / "out")
    assert status == 0, told
    bundle = (tmp_path / "out").rename(tmp_path / "moved")
    graphs = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*.onnx")}
    assert set(graphs) == {
        "onnx/model.onnx",
        "onnx/model_fp16.onnx",
        "onnx/model_bf16.onnx",
        f"variants/{ORT}-fused/model_fused.onnx",
    }
    sizes = {}
    for name, path in graphs.items():
        model = onnx.load(path, load_external_data=False)
        places = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert places == {f"{path.stem}.onnx_data"}
        onnx.checker.check_model(str(path))
        sizes[name] = (path.parent / places.pop()).stat().st_size
    assert sizes["onnx/model_fp16.onnx"] < sizes["onnx/model.onnx"]
    for entry in manifest(bundle)["variants"]:
        if entry["files"] and entry["files"][0].endswith(".onnx"):
            assert [Path(name).suffix for name in entry["files"]] == [".onnx", ".onnx_data"]
    inputs = encoded(model_folder("bert"))
    with load(bundle, variant=ORT) as model:
        found = model.run(inputs)
    wanted = originals(model_folder("bert"), inputs)
    np.testing.assert_allclose(found["last_hidden_state"], wanted["last_hidden_state"], atol=1e-5)
    assert here("verify", bundle, "--no-latency")[0] == 0


def test_a_second_run_is_up_to_date(bundle: Path, model_folder: Folders, cache: Path, texts: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in bundle.rglob("*")}
    again = export(model_folder("bert"), bundle, cache, *ENCODER, options=["--data", texts])
    assert again.returncode == 0, again.stderr
    assert "is up to date" in again.stderr
    assert ORT in again.stdout
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in bundle.rglob("*")} == before


def test_a_bundle_timed_on_a_busy_machine_is_timed_again(
    bundle: Path, cache: Path, model_folder: Folders, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    # Another budget than in other tests: on a quiet machine the timings of those are kept, and would be taken here.
    overrides = [*SMALL, f"data.evaluation={texts}", "latency.budget_s=0.9"]
    recipe = Recipe.from_source(str(model_folder("bert")), overrides=overrides)
    # That the machine was busy, or was not, is said here and not measured.
    monkeypatch.setattr("pipelines.verification.latency_result.BUSY", -1.0)
    first = run(recipe, out=tmp_path / "out")
    again = run(recipe, out=tmp_path / "out", overwrite=True)

    assert first.manifest.files["evidence/latency.json"] != again.manifest.files["evidence/latency.json"]
    monkeypatch.setattr("pipelines.verification.latency_result.BUSY", 1.0)
    kept = run(recipe, out=tmp_path / "out", overwrite=True)
    assert kept.manifest == again.manifest


def test_a_bundle_of_another_version_is_made_anew_only_where_asked(
    bundle: Path, cache: Path, model_folder: Folders, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    monkeypatch.setattr("pipelines.verification.latency_result.BUSY", 1.0)
    recipe = Recipe.from_source(str(model_folder("bert")), overrides=[*SMALL, f"data.evaluation={texts}"])
    made = run(recipe, out=tmp_path / "out")
    monkeypatch.setattr("pipelines.assemble.package_version", lambda name: "99.0")
    assert run(recipe, out=tmp_path / "out").manifest == made.manifest
    assert run(recipe, out=tmp_path / "out", overwrite=True).manifest.planish_version == "99.0"


def test_two_runs_of_the_same_at_once_into_one_folder(
    bundle: Path, model_folder: Folders, cache: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = [model_folder("bert"), "--out", out, *settings("include_source=true", "seed=7"), "--data", texts]
    command = [*COMMAND, "export", *map(str, asked)]
    runs = [
        subprocess.Popen(command, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in runs:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert not check_integrity(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_everything_is_taken_from_the_cache(
    bundle: Path, model_folder: Folders, cache: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    done = export(model_folder("bert"), out, cache, *ENCODER, options=["--data", texts])
    assert done.returncode == 0, done.stderr
    timeline = json.loads((out / "report.json").read_text(encoding="utf-8"))["timeline"]
    assert timeline
    made = {stage["stage"] for stage in timeline if not stage["cached"]}
    assert made <= {"race"}, done.stderr
    same, now = digests(bundle), digests(out)
    # Timings of a busy machine are not kept: then this race, or one kept since, may have selected another form.
    timed_anew = bool(made) or spoils(manifest(bundle)["environment"]["busy_elsewhere"])
    if timed_anew:  # only what was selected lies under variants/
        same, now = ({n: d for n, d in files.items() if not n.startswith("variants/")} for files in (same, now))
    differing = {name for name, digest in now.items() if same.get(name) != digest}
    told = {"planish.json", "report.json", "report.html"}  # they say when, and what was cached
    assert differing <= told | ({"evidence/latency.json"} if timed_anew else set())
    assert now.keys() == same.keys()


def test_an_export_repeats_byte_for_byte(bundle: Path, model_folder: Folders, texts: Path, tmp_path: Path) -> None:
    """Another source folder, another working folder, nothing cached, no data given: the same ``onnx/``."""
    shutil.copytree(model_folder("bert"), tmp_path / "deep" / "er" / "a model")
    (tmp_path / "work").mkdir()
    arguments = ["export", "../deep/er/a model", "--out", "made", "--no-cache", *settings()]
    done = planish(*arguments, cache=tmp_path / "unused", cwd=tmp_path / "work", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = tmp_path / "work" / "made"
    assert digests(made / "onnx") == digests(bundle / "onnx")
    assert digests(made / "variants") == digests(bundle / "variants")
    assert not (made / "model.safetensors").exists()
    assert not (tmp_path / "unused" / "stages").exists()
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith("planish-no-cache-")]
    assert left == []  # the private cache is gone
    assert "built-in" in json.dumps(json.loads((made / "report.json").read_text(encoding="utf-8"))["data"])


def test_overwriting(bundle: Path, here: Planish, model_folder: Folders, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["export", model_folder("bert"), "--out", out, "--data", texts, "--quiet"]
    assert here(*command, *settings("include_source=true"))[0] == 0
    first = digests(out)
    status, _, err = here(*command, *settings("keep=selected"))
    assert status == 2
    assert "another recipe" in err
    assert "--overwrite" in err
    assert digests(out) == first
    assert here(*command, *settings("keep=selected"), "--overwrite")[0] == 0
    assert "model.safetensors" not in digests(out)
    assert check_integrity(out) == []
    (out / "notes.txt").write_text("mine")
    status, _, err = here(*command, *settings(), "--overwrite")
    assert status == 2
    assert "notes.txt" in err
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_json_is_one_document(bundle: Path, model_folder: Folders, cache: Path, texts: Path) -> None:
    options = ["--data", texts, "--json"]
    done = export(model_folder("bert"), bundle, cache, *ENCODER, options=options)
    document = json.loads(done.stdout)
    assert document["bundle"] == str(bundle)
    assert document["verdict"]["ok"] is True
    assert {entry["id"] for entry in document["variants"]} == set(verdicts(bundle))


def test_no_variant_passes(bundle: Path, here: Planish, model_folder: Folders, texts: Path, tmp_path: Path) -> None:
    command = ["export", model_folder("bert"), "--data", texts]
    asked = [
        "--out",
        tmp_path / "fast",
        "--quiet",
        *settings("latency.min_speedup=1000000000.0", "latency.baselines=[eager]", "require=[]"),
    ]
    status, out, err = here(*command, *asked)
    assert status == 1
    assert ORT in out
    assert err.startswith("error: no variant passed")
    assert manifest(tmp_path / "fast")["selected"] == {"overall": None, "1x8": None}
    assert verdicts(tmp_path / "fast")[ORT][0] == "failed"
    status, out, err = here(*command, *asked, "--json")
    assert (status, err) == (1, "")
    assert json.loads(out)["verdict"]["ok"] is False


def test_a_required_variant_does_not_pass(
    bundle: Path, here: Planish, model_folder: Folders, texts: Path, tmp_path: Path
) -> None:
    if get_target("onnxruntime-cuda").availability().available:
        pytest.skip("here that target runs")
    asked = settings("targets=[onnxruntime-cpu, onnxruntime-cuda]", f"require=[{ORT}, onnxruntime-cuda-fp32]")
    status, _, err = here("export", model_folder("bert"), "--data", texts, "--out", tmp_path / "out", *asked)
    assert status == 1
    assert "error: a required variant did not pass: onnxruntime-cuda-fp32" in err
    assert manifest(tmp_path / "out")["selected"]["overall"] is not None
    entry = next(e for e in manifest(tmp_path / "out")["variants"] if e["id"] == "onnxruntime-cuda-fp32")
    assert entry["status"] == "skipped"
    assert entry["reason"]


def test_labels_give_the_metric_with_an_interval(classifier: Path) -> None:
    quality = json.loads((classifier / "evidence" / "quality.json").read_text(encoding="utf-8"))
    assert quality["data"]["labelled"] is True
    assert quality["data"]["rows"] == 36
    for name in (ORT, ENGINE):
        gate = quality["variants"][name]
        assert gate["verdict"] == "passed"
        assert gate["metric"] == "accuracy"
        assert gate["samples"] == 36
        assert gate["low"] <= gate["difference"] <= gate["high"]
        assert 0 <= gate["original_low"] <= gate["original"] <= gate["original_high"] <= 1


def test_every_variant_classifies_like_the_original(classifier: Path, model_folder: Folders) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    source = model_folder("bert-classifier")
    inputs = encoded(source)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    with torch.inference_mode():
        logits = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    digest = manifest(classifier)["files"][f"variants/{ENGINE}/model.pt2"]["sha256"]
    for name in (ORT, ENGINE):
        with load(classifier, variant=name, trusted_digests=frozenset([digest])) as loaded:
            assert rms(logits, loaded.run(inputs)["logits"]) < 1e-5, name


def test_only_what_was_selected_is_kept(
    classifier: Path, here: Planish, model_folder: Folders, labelled_texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = settings("targets=[onnxruntime-cpu, inductor-cpu]", "keep=selected")
    arguments = ["export", model_folder("bert-classifier"), "--data", labelled_texts, "--out", out, *asked]
    assert here(*arguments)[0] == 0
    chosen = set(manifest(out)["selected"].values())
    kept = {path.name for path in (out / "variants").iterdir()} if (out / "variants").is_dir() else set()
    assert kept <= chosen
    assert (out / "onnx" / "model.onnx").is_file()
    assert {path.name for path in (classifier / "variants").iterdir()} - kept, "nothing was there to drop"
    for entry in manifest(out)["variants"]:
        assert bool(entry["files"]) is (entry["id"] in chosen or entry["id"] == ORT)
    assert verdicts(out) == verdicts(classifier)
    assert check_integrity(out) == []


def test_from_python(
    bundle: Path, cache: Path, model_folder: Folders, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    recipe = Recipe.from_source(str(model_folder("bert")), overrides=[*SMALL, f"data.evaluation={texts}"])
    made = run(recipe, out=tmp_path / "out")
    assert isinstance(made, Bundle)
    assert outcome(made) is None
    assert made.manifest == read_bundle(tmp_path / "out").manifest
    assert made.selected() is not None
    with pytest.raises(RequestError, match="another recipe"):
        run(recipe.model_copy(update={"seed": 1}), out=tmp_path / "out")


def test_an_engine_that_cannot_be_remembered_is_no_failed_variant(
    classifier: Path,
    cache: Path,
    model_folder: Folders,
    labelled_texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", str(cache))
    targets = "targets=[onnxruntime-cpu, inductor-cpu]"
    recipe = Recipe.from_source(
        str(model_folder("bert-classifier")), overrides=[*SMALL, targets, f"data.evaluation={labelled_texts}"]
    )

    def refuse(digest: str) -> None:
        """As `remember_engine` does in a folder of somebody else."""
        raise EnvironmentLackError("the engines cannot be remembered", digest, "Set PLANISH_CACHE")

    monkeypatch.setattr("pipelines.artifacts.remember_engine", refuse)
    with pytest.raises(EnvironmentLackError, match="cannot be remembered"):
        run(recipe, out=tmp_path / "out")


def test_a_recipe_file(bundle: Path, here: Planish, model_folder: Folders, texts: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder("bert"), tmp_path / "model")
    shutil.copy(texts, tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(
        "source: model\nname: from-a-file\ntargets: [onnxruntime-cpu]\nprecisions: [fp32]\nthreads: 1\n"
        "data: {evaluation: rows.jsonl}\nparity: {samples: 4}\n"
        "latency: {points: [1x8], budget_s: 1.0, min_block_ms: 5.0, baselines: [eager]}\n"
    )
    status, out, err = here("run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--json")
    assert status == 0, err
    assert json.loads(out)["name"] == "from-a-file"
    # the same model and rows, wherever they lie
    assert all(stage["cached"] for stage in json.loads(out)["timeline"] if stage["stage"] != "race")
    assert manifest(tmp_path / "out")["recipe"]["data"]["evaluation"] == "rows.jsonl"
    assert json.loads(out)["data"]["evaluation"]["origin"] == "rows.jsonl"  # and named as they are called now
