from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from exporter.artifact import Axis, Signature, TensorSpec
from exporter.errors import RequestError
from exporter.preprocess import ImageEncoder, ImageSettings, TextEncoder, load_encoder, read_labels
from exporter.sources import resolve_source
from exporter.tasks import get_task

Folders = Callable[..., Path]
THREE = ("input_ids", "attention_mask", "token_type_ids")
TEXTS = ["The river is long.", "What a film, said the old man; and the city sleeps!", "music", ""]


def minilm_folder(minilm: str) -> Path:
    path = resolve_source(minilm).path
    assert path is not None
    return path


# Texts


def test_the_real_tokenizer_agrees_with_transformers(minilm: str) -> None:
    from transformers import AutoTokenizer

    folder = minilm_folder(minilm)
    encoder = TextEncoder.load(folder, inputs=THREE, limit=512)
    reference = AutoTokenizer.from_pretrained(folder)
    assert encoder.max_length == 256  # sentence-transformers' own limit
    texts = [*TEXTS, "Ünïcode — naïve café 北京 🙂 don't", "word " * 400]
    ours = encoder.encode(texts)
    theirs = reference(texts, padding=True, truncation=True, max_length=256, return_tensors="np")
    assert list(ours) == list(THREE)
    for name in THREE:
        np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours[name].dtype == np.int64


@pytest.mark.parametrize("kind", ["bert", "distilbert", "mpnet", "deberta-v2", "modernbert"])
def test_pairs_agree_with_transformers(model_folder: Folders, kind: str) -> None:
    from transformers import AutoTokenizer

    folder = model_folder(kind)
    encoder = TextEncoder.load(folder, inputs=THREE, limit=24)
    pairs = ["The old city and the river.", "no", "a long answer " * 30, "x"]
    ours = encoder.encode(TEXTS, pairs)
    theirs = AutoTokenizer.from_pretrained(folder)(
        TEXTS, pairs, padding=True, truncation=True, max_length=24, return_tensors="np", return_token_type_ids=True
    )
    for name in THREE:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_only_the_wanted_inputs_are_made_in_their_order(model_folder: Folders) -> None:
    encoder = TextEncoder.load(model_folder("distilbert"), inputs=("attention_mask", "input_ids"), limit=64)
    assert list(encoder.encode(["a"])) == ["attention_mask", "input_ids"]


def test_padding_uses_the_model_types_own_token_and_either_side(model_folder: Folders) -> None:
    encoder = TextEncoder.load(model_folder("mpnet"), inputs=("input_ids", "attention_mask"), limit=64)
    assert encoder.pad_id == 1
    right = encoder.encode(["a", "a man and a city"])
    assert right["input_ids"][0].tolist()[3:] == [1] * 4
    left = encoder.padded("left").encode(["a", "a man and a city"])
    assert left["input_ids"][0].tolist()[:4] == [1] * 4
    np.testing.assert_array_equal(left["attention_mask"][0], right["attention_mask"][0][::-1])
    np.testing.assert_array_equal(left["input_ids"][0][4:], right["input_ids"][0][:3])


def test_pad_to_fixes_the_length_and_cuts(model_folder: Folders) -> None:
    encoder = TextEncoder.load(model_folder("bert"), inputs=THREE, limit=64)
    assert encoder.encode(["a"], pad_to=16)["input_ids"].shape == (1, 16)
    assert encoder.encode(["man " * 40], pad_to=16)["attention_mask"].sum() == 16
    assert encoder.encode(["man " * 40])["input_ids"].shape == (1, 42)  # the cut does not outlast the call
    with pytest.raises(RequestError, match="beyond the limit"):
        encoder.encode(["a"], pad_to=65)
    with pytest.raises(RequestError, match="Special tokens alone take 2"):
        encoder.encode(["a"], pad_to=2)


def test_a_long_context_is_cut_and_the_question_stays(model_folder: Folders) -> None:
    folder = model_folder("distilbert")
    encoder = load_encoder(folder, get_task("question-answering"), text_signature(32))
    assert isinstance(encoder, TextEncoder)
    question, context = "what is the name of the river", "the old river " * 50
    found = encoder.encode_with_offsets([question], [context])
    assert found.inputs["input_ids"].shape == (1, 32)
    assert (found.sequence_ids[0] == 0).sum() == 7
    second = found.sequence_ids[0] == 1
    words = [context[begin:end] for begin, end in found.offsets[0][second]]
    assert words == (["the", "old", "river"] * 50)[: second.sum()]
    too_long = encoder.encode(["question " * 60], ["city"])  # cutting the second alone is not enough here
    assert too_long["input_ids"].shape == (1, 32)


def test_a_question_that_is_too_long_changes_nothing_for_the_rows_beside_it(model_folder: Folders) -> None:
    encoder = load_encoder(model_folder("distilbert"), get_task("question-answering"), text_signature(32))
    assert isinstance(encoder, TextEncoder)
    # So long a question that cutting the longest first would cut it, and not the context alone.
    questions = ["what is the name of the river " * 3, "question " * 60, "what is it"]
    contexts = ["the old river " * 6, "city", "the old river"]
    together = encoder.encode(questions, contexts)["input_ids"]
    for row, pair in enumerate(zip(questions, contexts, strict=True)):
        alone = encoder.encode([pair[0]], [pair[1]])["input_ids"][0]
        np.testing.assert_array_equal(together[row][: len(alone)], alone)
    assert (encoder.encode_with_offsets(questions, contexts).sequence_ids[0] == 0).sum() == 21


def test_texts_are_cut_at_the_side_that_the_folder_names(model_folder: Folders, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation_side": "left"}))
    text = "the old river and the city " * 4
    ours = TextEncoder.load(folder, inputs=THREE, limit=9).encode([text])
    theirs = AutoTokenizer.from_pretrained(folder)(text, truncation=True, max_length=9)
    assert ours["input_ids"][0].tolist() == theirs["input_ids"]
    assert (
        ours["input_ids"][0].tolist()
        != TextEncoder.load(model_folder("bert"), inputs=THREE, limit=9).encode([text])["input_ids"][0].tolist()
    )


def test_threads_that_share_a_tokenizer_do_not_change_each_others_cut(model_folder: Folders) -> None:
    from concurrent.futures import ThreadPoolExecutor

    encoder = TextEncoder.load(model_folder("bert"), inputs=THREE, limit=64)
    texts = ["man " * 60] * 8

    def length(cut: int) -> int:
        return encoder.encode(texts, pad_to=cut)["attention_mask"].sum(axis=1).max()

    cuts = [8, 16, 32, 48] * 50
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(length, cuts)) == cuts


def test_words_keep_their_numbers(model_folder: Folders) -> None:
    encoder = TextEncoder.load(model_folder("mpnet"), inputs=("input_ids", "attention_mask"), limit=64)
    found = encoder.encode_words([["the", "rivers"], ["city"]])
    assert found.word_ids.tolist() == [[-1, 0, 1, 1, -1], [-1, 0, -1, -1, -1]]


def test_the_default_prompt_and_lower_casing_come_first(model_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    plain = TextEncoder.load(folder, inputs=THREE, limit=64)
    settings = {"prompts": {"query": "question: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    prompted = TextEncoder.load(folder, inputs=THREE, limit=64)
    wanted = plain.encode(["question: the city"])["input_ids"]
    np.testing.assert_array_equal(prompted.encode(["the city"])["input_ids"], wanted)


def test_token_counts_cut_nothing(model_folder: Folders) -> None:
    encoder = TextEncoder.load(model_folder("bert"), inputs=THREE, limit=16)
    assert encoder.token_counts(["man " * 40, ""]) == [42, 2]


def test_older_tokenizers_are_converted_and_saved(minilm: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(minilm_folder(minilm) / name, folder)
    converted = TextEncoder.load(folder, inputs=THREE, limit=256)
    wanted = TextEncoder.load(minilm_folder(minilm), inputs=THREE).encode(TEXTS)
    np.testing.assert_array_equal(converted.encode(TEXTS)["input_ids"], wanted["input_ids"])
    assert converted.save(folder).name == "tokenizer.json"
    np.testing.assert_array_equal(
        TextEncoder.load(folder, inputs=THREE, limit=256).encode(TEXTS)["input_ids"], wanted["input_ids"]
    )


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        TextEncoder.load(tmp_path, inputs=THREE)


def test_a_broken_tokenizer(model_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[:200])
    with pytest.raises(RequestError, match=r"tokenizer\.json is broken"):
        TextEncoder.load(folder, inputs=THREE)


@pytest.mark.parametrize(
    ("texts", "pairs", "told"),
    [
        ([], None, "no text"),
        ("one text", None, "list of texts"),
        ([3], None, "no string"),
        (["a"], ["b", "c"], "as many"),
    ],
)
def test_texts_that_are_none(model_folder: Folders, texts: Any, pairs: Any, told: str) -> None:
    encoder = TextEncoder.load(model_folder("bert"), inputs=THREE, limit=64)
    with pytest.raises(RequestError, match=told):
        encoder.encode(texts, pairs)


def test_a_tokenizer_without_padding_encodes_texts_of_one_length_only(model_folder: Folders, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "m"))
    for name, key in (("tokenizer_config.json", "pad_token"), ("config.json", "pad_token_id")):
        settings = json.loads((folder / name).read_text())
        settings.pop(key)
        (folder / name).write_text(json.dumps(settings))
    encoder = TextEncoder.load(folder, inputs=THREE, limit=64)
    assert encoder.encode(["a", "man"])["input_ids"].shape == (2, 3)
    with pytest.raises(RequestError, match="no padding token"):
        encoder.encode(["a", "a man"])


def test_encoding_needs_neither_torch_nor_transformers(model_folder: Folders) -> None:
    code = f"""
import sys
from pathlib import Path
from exporter.preprocess import ImageEncoder, TextEncoder
from PIL import Image
TextEncoder.load(Path({str(model_folder("bert"))!r}), inputs=("input_ids",), limit=64).encode(["the city"])
ImageEncoder.load(Path({str(model_folder("vit"))!r})).encode([Image.new("RGB", (5, 5))])
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Images


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth structure and noise, so that resampling filters differ."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 127 + 100 * np.sin(rows / 7)[..., None] * np.cos(columns / 5)[..., None] * np.array([1.0, 0.5, -1.0])
    return np.clip(waves + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("shape", [(40, 50), (32, 32), (9, 70)])
def test_pixels_agree_with_the_models_own_processor(
    model_folder: Folders, tmp_path: Path, resample: int, shape: tuple[int, int]
) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = Path(shutil.copytree(model_folder("vit"), tmp_path / "m"))
    path = folder / "preprocessor_config.json"
    settings = {**json.loads(path.read_text()), "resample": resample, "image_mean": [0.4, 0.5, 0.6]}
    path.write_text(json.dumps(settings))
    image = picture(*shape)
    ours = ImageEncoder.load(folder).encode([image])["pixel_values"]
    theirs = ViTImageProcessorPil.from_pretrained(folder)(Image.fromarray(image), return_tensors="np")["pixel_values"]
    assert ours.shape == (1, 3, 32, 32)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (90, 120), (224, 224)])
def test_shortest_edge_and_crop_agree_with_the_models_own_processor(shape: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = {
        "do_resize": True,
        "size": {"shortest_edge": 64},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 60, "width": 56},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48, 0.45, 0.4],
        "image_std": [0.26, 0.26, 0.27],
    }
    image = picture(*shape)
    ours = ImageEncoder(ImageSettings.from_config(config)).encode([image])["pixel_values"]
    theirs = CLIPImageProcessorPil(**config)(Image.fromarray(image), return_tensors="np")["pixel_values"]
    assert ours.shape == (1, 3, 60, 56)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_crop_larger_than_the_image_is_filled_with_zeros() -> None:
    config = {
        "do_resize": False,
        "do_center_crop": True,
        "crop_size": 8,
        "do_normalize": False,
        "rescale_factor": 1 / 255,
    }
    found = ImageEncoder(ImageSettings.from_config(config)).encode([np.full((4, 5, 3), 255, np.uint8)])["pixel_values"]
    assert found.shape == (1, 3, 8, 8)
    assert found.sum() == pytest.approx(4 * 5 * 3)
    assert found[0, :, 2:6, 2:7].min() == pytest.approx(1.0)


def test_images_come_as_files_pictures_or_arrays(model_folder: Folders, tmp_path: Path) -> None:
    encoder = load_encoder(model_folder("vit"), get_task("image-classification"), image_signature())
    assert isinstance(encoder, ImageEncoder)
    array = picture(20, 30)
    Image.fromarray(array).save(tmp_path / "a.png")
    found = encoder.encode([tmp_path / "a.png", Image.fromarray(array), array])["pixel_values"]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    grey = encoder.encode([Image.fromarray(array[..., 0])])["pixel_values"]
    assert grey.shape == (1, 3, 32, 32)


def test_a_photograph_is_turned_upright_as_transformers_does(tmp_path: Path) -> None:
    from transformers.image_utils import load_image

    from calibration.datasets import read_image
    from exporter.encoders.image import open_image

    held = Image.fromarray(picture(8, 16))
    exif = held.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    path = tmp_path / "held.png"
    held.save(path, exif=exif)
    expected = np.asarray(load_image(str(path)).convert("RGB"))
    assert expected.shape == (16, 8, 3)
    for found in (open_image(path), open_image(Image.open(path)), read_image(path), open_image(read_image(path))):
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_files_that_are_no_images(model_folder: Folders, tmp_path: Path) -> None:
    encoder = ImageEncoder.load(model_folder("vit"))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(RequestError, match="cannot be read"):
        encoder.encode([tmp_path / "a.png"])
    with pytest.raises(RequestError, match="no such image"):
        encoder.encode([tmp_path / "b.png"])
    with pytest.raises(RequestError, match="uint8"):
        encoder.encode([np.zeros((3, 4, 4), np.float32)])
    with pytest.raises(RequestError, match="no image"):
        encoder.encode([])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": "big"}, "size"),
        ({"image_mean": None}, "image_mean"),
        ({"crop_pct": 0.875}, "crop_pct"),
        ({"do_pad": True}, "do_pad"),
    ],
)
def test_settings_that_are_not_understood(model_folder: Folders, change: dict[str, Any], told: str) -> None:
    config = json.loads((model_folder("vit") / "preprocessor_config.json").read_text())
    with pytest.raises(RequestError, match=told):
        ImageSettings.from_config({**config, **change})


def test_a_folder_without_image_settings(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="preprocessor_config"):
        ImageEncoder.load(tmp_path)


# Both


def test_raw_tensors_need_no_encoder(tmp_path: Path) -> None:
    spec = TensorSpec("image", "float32", ("batch", 3))
    assert load_encoder(tmp_path, get_task("custom"), Signature((spec,), (), (Axis("batch", 1, 2),))) is None


def test_labels(model_folder: Folders, tmp_path: Path) -> None:
    assert read_labels(model_folder("bert-classifier")) == {0: "bad", 1: "fair", 2: "good"}
    assert read_labels(tmp_path) == {}


def text_signature(limit: int) -> Signature:
    specs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    return Signature(specs, (), (Axis("batch", 1, 8), Axis("sequence", 1, limit)))


def image_signature() -> Signature:
    return Signature((TensorSpec("pixel_values", "float32", ("batch", 3, 32, 32)),), (), (Axis("batch", 1, 8),))
