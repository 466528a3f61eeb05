from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.datasets import load_dataset, load_task_dataset, read_image
from exporter.errors import PlanishError, RequestError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path, **options: object) -> list[dict]:
    return list(load_dataset(path, **options))  # type: ignore[arg-type]


EXPECTED = [{"text": 'He said, "no"', "label": 1}, {"text": "née", "label": 0}]


def as_csv(folder: Path) -> Path:
    return write(folder / "a.csv", '\ufefftext,label,other\r\n"He said, ""no""",1,x\r\n\r\nnée,0,y\r\n')


def as_tsv(folder: Path) -> Path:
    return write(folder / "a.tsv", 'label\ttext\n1\tHe said, "no"\n0\tnée\n')


def as_jsonl(folder: Path) -> Path:
    return write(folder / "a.jsonl", "\n".join(json.dumps({**row, "extra": None}) for row in EXPECTED) + "\n\n")


def as_json(folder: Path) -> Path:
    return write(folder / "a.json", json.dumps(EXPECTED))


def as_parquet(folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(EXPECTED), folder / "a.parquet")
    return folder / "a.parquet"


def as_datasets_folder(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(EXPECTED).save_to_disk(str(folder / "hf"))
    return folder / "hf"


@pytest.mark.parametrize("make", [as_csv, as_tsv, as_jsonl, as_json, as_parquet, as_datasets_folder])
def test_every_format_gives_the_same_rows_and_digest(make, tmp_path: Path) -> None:
    path = make(tmp_path)
    data = load_dataset(path, roles=("text",), optional=("label",))
    assert list(data) == EXPECTED
    assert list(data) == EXPECTED, "a second pass reads the same"
    assert (len(data), data.labelled, data.origin) == (2, True, path.name)
    assert data.digest == load_dataset(as_json(tmp_path), roles=("text",), optional=("label",)).digest


def test_columns_by_position_take_the_first_line_as_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", '3.5\tone "quoted\ttwo\n0\tthree\tfour\n')
    for columns in ({"score": 0, "text": 1, "text_pair": 2}, {"score": "0", "text": "1", "text_pair": "2"}):
        data = load_task_dataset("feature-extraction", path, columns=columns)
        assert next(iter(data)) == {"text": 'one "quoted', "text_pair": "two", "score": 3.5}
        assert (len(data), data.labelled) == (2, True)


def test_a_quoted_field_may_hold_line_breaks_and_separators(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text\n"one,\ntwo"\nthree\n')
    assert rows_of(path, roles=("text",)) == [{"text": "one,\ntwo"}, {"text": "three"}]


def test_a_score_without_its_second_text_is_no_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,score\na,1\n")
    assert not load_task_dataset("feature-extraction", path).labelled


def test_text_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one, two\n\n  three\n")
    assert rows_of(path, roles=("text",)) == [{"text": "one, two"}, {"text": "three"}]


def test_tokens_and_tags(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "tokens,tags\nAda met Grace,1 0 1\n")
    data = load_task_dataset("token-classification", path)
    assert list(data) == [{"tokens": ["Ada", "met", "Grace"], "tags": [1, 0, 1]}]
    write(path, "tokens,tags\nAda met,PER O\nAda met Grace,PER O\n")
    with pytest.raises(RequestError, match="line 3: 3 tokens, 2 tags"):
        load_task_dataset("token-classification", path)


def test_squad_form_is_flattened(tmp_path: Path) -> None:
    document = {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "Ada wrote it.",
                        "qas": [
                            {"id": 7, "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]},
                            {"id": "8", "question": "When?", "answers": [], "is_impossible": True},
                        ],
                    }
                ]
            }
        ]
    }
    path = write(tmp_path / "a.json", json.dumps(document))
    data = load_task_dataset("question-answering", path)
    assert list(data) == [
        {"question": "Who?", "context": "Ada wrote it.", "id": "7", "answers": ["Ada"]},
        {"question": "When?", "context": "Ada wrote it.", "id": "8", "answers": []},
    ]
    assert [answer.start for row in data for answer in row["answers"]] == [0]
    document["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 1
    other = load_task_dataset("question-answering", write(tmp_path / "b.json", json.dumps(document)))
    assert other.digest != data.digest, "a model learns something else from it"
    del document["data"][0]["paragraphs"][0]["context"]
    with pytest.raises(RequestError, match="near question 1"):
        load_task_dataset("question-answering", write(path, json.dumps(document)))


def test_answers_of_the_columnar_form(tmp_path: Path) -> None:
    row = {"question": "Who?", "context": "Ada.", "answers": {"text": ["Ada", "ada"], "answer_start": [0, 1]}}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    answers = rows_of(path, roles=("question",), optional=("answers",))[0]["answers"]
    assert answers == ["Ada", "ada"]
    assert [answer.start for answer in answers] == [0, 1]
    for same in (answers, pickle.loads(pickle.dumps(answers)), copy.deepcopy(answers)):
        assert [answer.start for answer in same] == [0, 1]


@pytest.mark.parametrize(
    ("given", "starts"),
    [
        ("Ada", [None]),
        (["Ada"], [None]),
        ({"text": "Ada", "answer_start": 3}, [3]),
        ([{"text": "Ada", "answer_start": 3}, {"text": "Ada"}], [3, None]),
        ({"text": ["Ada", "Ada"]}, [None, None]),
    ],
)
def test_answers_and_where_they_begin_in_all_their_forms(tmp_path: Path, given: Any, starts: list[int | None]) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "Who?", "answers": given}))
    answers = rows_of(path, roles=("question",), optional=("answers",))[0]["answers"]
    assert set(answers) == {"Ada"}
    assert [answer.start for answer in answers] == starts


@pytest.mark.parametrize(
    "given", [{"answer_start": [0]}, [{"answer_start": 0}], {"text": ["Ada"], "answer_start": []}, [3], None]
)
def test_what_is_no_answer_is_named(tmp_path: Path, given: Any) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "Who?", "answers": given}))
    with pytest.raises(RequestError, match="a value cannot be a answers"):
        rows_of(path, roles=("question",), optional=("answers",))


def test_npz_rows_are_batches_of_one(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    np.savez(tmp_path / "a.npz", x=x, ids=np.array([5, 6, 7]))
    data = load_task_dataset("custom", tmp_path / "a.npz", inputs=("x", "ids"))
    found = list(data)
    assert len(found) == 3
    assert found[1]["x"].shape == (1, 2, 2)
    np.testing.assert_array_equal(found[1]["x"], x[1:2])
    assert found[2]["ids"].tolist() == [7]


def test_images_are_relative_to_the_file_and_digested_by_content(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 3), (255, 0, 0)).save(tmp_path / "pictures" / "a.png")
    path = write(tmp_path / "a.csv", "image,label\npictures/a.png,7\n")
    data = load_task_dataset("image-classification", path)
    row = next(iter(data))
    assert row["label"] == 7
    assert np.asarray(read_image(row["image"])).tolist() == [[[255, 0, 0]] * 4] * 3
    Image.new("RGB", (4, 3), (0, 255, 0)).save(tmp_path / "pictures" / "a.png")
    assert load_task_dataset("image-classification", path).digest != data.digest
    write(path, "image\npictures/b.png\n")
    with pytest.raises(RequestError, match=r"line 2.*pictures/b\.png"):
        load_task_dataset("image-classification", path)


def test_images_inside_a_datasets_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.full((2, 2, 3), 9, np.uint8)
    table = datasets.Dataset.from_dict({"image": [pixels]}, features=datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(str(tmp_path / "hf"))
    row = rows_of(tmp_path / "hf", roles=("image",))[0]
    np.testing.assert_array_equal(np.asarray(read_image(row["image"])), pixels)


def test_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "hf"))
    with pytest.raises(RequestError, match="several splits"):
        rows_of(tmp_path / "hf", roles=("text",))
    assert rows_of(tmp_path / "hf", roles=("text",), split="test") == [{"text": "test"}]
    with pytest.raises(RequestError, match="train, test"):
        rows_of(tmp_path / "hf", roles=("text",), split="dev")


def test_the_limit_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\n".join(f"{i:03}" for i in range(200)))
    one, same, other = (load_dataset(path, roles=("text",), limit=20, seed=seed) for seed in (1, 1, 2))
    texts = [row["text"] for row in one]
    assert texts == [row["text"] for row in same] == sorted(set(texts))
    assert len(texts) == len(one) == 20
    assert one.digest == same.digest != other.digest
    assert texts != [f"{i:03}" for i in range(20)]
    assert len(load_dataset(path, roles=("text",), limit=500)) == 200


def broken(name: str, content: str | bytes, message: str, **options: object) -> object:
    return pytest.param(name, content, message, options, id=message[:40])


@pytest.mark.parametrize(
    ("name", "content", "message", "options"),
    [
        broken("a.csv", "title,body\n1,2\n", "columns are missing.*text.*The file has: title, body"),
        broken("a.csv", "title,body\n1,2\n", "'text' is missing.*nope.*title, body", columns={"text": "nope"}),
        broken("a.csv", "a,b\n", "'text' is missing.*: 2.*The file has: 0, 1", columns={"text": 2}),
        broken("a.csv", "a,text\n1,b\n", "partly by name", columns={"text": "text", "label": 0}),
        broken("a.csv", "", "no rows"),
        broken("a.csv", "text\n", "no rows"),
        broken("a.jsonl", "\n\n", "no rows"),
        broken("a.json", "[]", "no rows"),
        broken("a.csv", b"text\nfine\nbro\xffken\n", "not UTF-8.*line 3: byte 0xff"),
        broken("a.csv", "text\nfine\n".encode("utf-16"), "not UTF-8.*line 1"),
        broken("a.jsonl", "text".encode("utf-16-le"), "null character.*line 1"),
        broken("a.csv", "text,label\na,1\nb,c,2\n", "3 fields where the first has 2.*line 3"),
        broken("a.csv", 'text\n"open\n', "broken.*line 2"),
        broken("a.jsonl", '{"text": "a"}\n{"text": \n', "not JSON.*line 2"),
        broken("a.jsonl", '["a"]\n', "not a JSON object.*line 1"),
        broken("a.jsonl", '{"text": "a"}\n{"text": null}\n', "cannot be a text.*line 2"),
        broken("a.jsonl", '{"text": "a"}\n{"other": "b"}\n', "cannot be a text.*line 2"),
        broken("a.csv", "text,score\na,high\n", "cannot be a score.*line 2", optional=("score",)),
        broken("a.csv", "text,score\na,nan\n", "cannot be a score.*line 2", optional=("score",)),
        broken("a.csv", "text,label\na,\n", "cannot be a label.*line 2", optional=("label",)),
        broken("a.json", '{"rows": []}', "neither a list"),
        broken("a.json", "[1", "not JSON"),
        broken("a.parquet", "no parquet", "cannot be read"),
        broken("a.npz", "no zip", "cannot be read"),
        broken("a.xyz", "text", r"format.*not known.*\.csv"),
        broken("a.jsonl", '{"text": "a"}', "columns by number", columns={"text": 0}),
        broken("a.txt", "a", "at least 1", limit=0),
        broken("a.txt", "a", "takes a split", split="train"),
    ],
)
def test_broken_data_is_a_request_error(
    name: str, content: str | bytes, message: str, options: dict, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(RequestError, match=f"(?s){message}"):
        rows_of(path, **{"roles": ("text",), **options})


def test_missing_files_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        rows_of(tmp_path / "none.csv", roles=("text",))
    with pytest.raises(RequestError, match="save_to_disk"):
        rows_of(tmp_path, roles=("text",))


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RequestError, match="cannot be read"):
        rows_of(tmp_path / "a.npz", roles=("x",))
    np.savez(tmp_path / "b.npz", x=np.zeros(2), y=np.zeros(3))
    with pytest.raises(RequestError, match="x: 2, y: 3"):
        rows_of(tmp_path / "b.npz", roles=("x", "y"))


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    path = as_parquet(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RequestError, match="cannot be read"):
        rows_of(path, roles=("text",))


def test_stray_roles_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\na\n")
    with pytest.raises(RequestError, match=r"tetx.*text, text_pair, score"):
        load_task_dataset("feature-extraction", path, columns={"tetx": "text"})


def test_a_broken_picture_is_a_request_error(tmp_path: Path) -> None:
    with pytest.raises(PlanishError, match="cannot be read"):
        read_image(write(tmp_path / "a.png", b"no picture"))


@pytest.mark.shared
def test_the_shared_data(shared: Path) -> None:
    sts = load_task_dataset(
        "feature-extraction",
        shared / "data" / "sts" / "2014-images.tsv",
        columns={"score": 0, "text": 1, "text_pair": 2},
    )
    assert (len(sts), sts.labelled) == (750, True)
    sst2 = load_task_dataset(
        "text-classification", shared / "data" / "sst2" / "test.tsv", columns={"text": 0, "label": 1}, limit=50
    )
    assert {row["label"] for row in sst2} == {0, 1}
    assert len(load_task_dataset("question-answering", shared / "data" / "xquad" / "xquad.en.json")) == 1190
