from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter import onnx_files
from exporter.errors import EnvironmentLackError, RequestError
from exporter.onnx_files import (
    external_data_name,
    has_embedded_weights,
    load_model,
    save_model,
    strip_metadata,
    weight_bytes,
)

WEIGHT = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)


def proto() -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="node_MatMul_1", doc_string="from /home/me/model.py"),
        helper.make_node("Add", ["a", "b"], ["y"], name="node_Add_2"),
    ]
    for node, scopes in zip(nodes, (["", "encoder", "encoder.dense", "linear"], ["", "encoder", "add"]), strict=True):
        entry = node.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", repr(scopes)
        trace = node.metadata_props.add()
        trace.key, trace.value = "pkg.torch.onnx.stack_trace", 'File "/home/me/model.py", line 3'
    graph = helper.make_graph(
        nodes,
        "main_graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s1", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s1", 30])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.ones(30, np.float32), "b")],
        value_info=[helper.make_tensor_value_info("a", TensorProto.FLOAT, ["s1", 30])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], producer_name="pytorch")
    model.ir_version = 10
    helper.set_model_props(model, {"graph_signature": "/home/me"})
    return model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(proto(), tmp_path / "raw.onnx")
    return tmp_path / "raw.onnx"


@pytest.fixture
def external(tmp_path: Path) -> Path:
    folder = tmp_path / "external"
    folder.mkdir()
    onnx.save(proto(), folder / "raw.onnx", save_as_external_data=True, location="w.bin", size_threshold=100)
    return folder / "raw.onnx"


def run(path: Path) -> np.ndarray:
    import onnxruntime

    x = np.ones((2, 40), np.float32)
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]


@pytest.mark.parametrize("embedded", [True, False])
def test_a_round_trip_keeps_what_the_model_computes(path: Path, external: Path, tmp_path: Path, embedded: bool) -> None:
    for source in (path, external):
        out = save_model(load_model(source), tmp_path / "out" / "model.onnx", external_data=not embedded)
        assert (out.parent / "model.onnx_data").exists() is not embedded
        np.testing.assert_array_equal(run(out), run(path))
        assert has_embedded_weights(load_model(out)) is embedded
        (out.parent / "model.onnx_data").unlink(missing_ok=True)


def test_weights_are_embedded_when_they_fit(external: Path, tmp_path: Path) -> None:
    model = load_model(external)
    out = save_model(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx_data").exists()
    np.testing.assert_array_equal(run(out), run(external))
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_weights_above_the_threshold_go_beside_the_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.onnx_files.EXTERNAL_DATA_THRESHOLD_BYTES", 1000)
    out = save_model(load_model(path), tmp_path / "big" / "model.onnx")
    assert sorted(p.name for p in out.parent.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert external_data_name(out) == "model.onnx_data"
    np.testing.assert_array_equal(run(out), run(path))


def test_saving_twice_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    model = load_model(path)
    for name in ("a", "b"):
        save_model(model, tmp_path / name / "model.onnx", external_data=True)
        save_model(model, tmp_path / name / "inside.onnx")
    for name in ("model.onnx", "model.onnx_data", "inside.onnx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tensor_that_two_initializers_share_counts_once(path: Path) -> None:
    model = load_model(path)
    before = weight_bytes(model)
    tied = ir.Value(name="tied", const_value=model.graph.initializers["w"].const_value)
    model.graph.register_initializer(tied)
    assert weight_bytes(model) == before == WEIGHT.nbytes + 120


def test_metadata_goes_and_nodes_are_named_after_modules(path: Path, tmp_path: Path) -> None:
    model = load_model(path)
    strip_metadata(model)
    out = save_model(model, tmp_path / "clean.onnx")
    data = out.read_bytes()
    for noise in (b"/home/me", b"stack_trace", b"pytorch", b"graph_signature", b"name_scopes"):
        assert noise not in data
    assert [node.name for node in load_model(out).graph] == ["encoder.dense/MatMul", "encoder/Add"]
    np.testing.assert_array_equal(run(out), run(path))


def test_metadata_goes_from_functions_and_branches_too(tmp_path: Path) -> None:
    def noisy(node: onnx.NodeProto) -> onnx.NodeProto:
        node.doc_string = "from /home/me/model.py"
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value='File "/home/me/model.py"')
        return node

    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4])
        return helper.make_graph(
            [noisy(helper.make_node("Neg", ["a"], [name]))], name, [], [output], doc_string="/home"
        )

    inside = noisy(helper.make_node("If", ["c"], ["b"], then_branch=branch("t"), else_branch=branch("e")))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my", 1)]
    graph = helper.make_graph(
        [noisy(helper.make_node("F", ["x", "c"], ["y"], domain="my"))],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]), helper.make_tensor_value_info("c", 9, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    function = helper.make_function("my", "F", ["a", "c"], ["b"], [inside], opsets)
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10), tmp_path / "f.onnx")
    model = load_model(tmp_path / "f.onnx")
    strip_metadata(model)
    assert b"/home" not in save_model(model, tmp_path / "clean.onnx").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(RequestError, match=r"truncated|damaged|well formed"):
        load_model(path)


def test_every_truncation_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 97):
        path.write_bytes(data[:size])
        with pytest.raises(RequestError):
            load_model(path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.onnx"
    other.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(RequestError):
        load_model(other)
    with pytest.raises(RequestError, match="does not exist"):
        load_model(tmp_path / "none.onnx")
    with pytest.raises(RequestError, match="does not exist"):
        load_model(tmp_path)


def test_missing_external_data_is_refused(external: Path) -> None:
    (external.parent / "w.bin").unlink()
    with pytest.raises(RequestError, match=r"external data .* is missing: .*w\.bin"):
        load_model(external)


def test_short_external_data_is_refused(external: Path) -> None:
    data = (external.parent / "w.bin").read_bytes()
    (external.parent / "w.bin").write_bytes(data[:-1])
    with pytest.raises(RequestError, match="too short"):
        load_model(external)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "a/../../w.bin", ""])
def test_external_data_outside_the_folder_is_refused(external: Path, tmp_path: Path, location: str) -> None:
    (tmp_path / "w.bin").write_bytes((external.parent / "w.bin").read_bytes())
    model = onnx.load(external, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    external.write_bytes(model.SerializeToString())
    with pytest.raises(RequestError, match="outside its folder"):
        load_model(external)


def test_a_link_that_leads_outside_is_refused(external: Path, tmp_path: Path) -> None:
    (external.parent / "w.bin").rename(tmp_path / "elsewhere.bin")
    (external.parent / "w.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(RequestError, match="outside its folder"):
        load_model(external)


def test_a_cache_whose_files_are_all_links_is_read(external: Path, tmp_path: Path) -> None:
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    snapshot.mkdir()
    for file, blob in (("raw.onnx", "1f"), ("w.bin", "2e")):
        (external.parent / file).rename(store / blob)
        (snapshot / file).symlink_to(store / blob)
    assert weight_bytes(load_model(snapshot / "raw.onnx")) == WEIGHT.nbytes + 120
    out = save_model(load_model(snapshot / "raw.onnx"), tmp_path / "model.onnx")
    assert run(out).shape == (2, 30)


def constant(**tensor: onnx.AttributeProto) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Constant", [], ["w"], **tensor), helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 30])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("embedded", [True, False])
def test_a_constant_node_with_its_data_in_a_file_takes_it_along(tmp_path: Path, embedded: bool) -> None:
    (tmp_path / "in").mkdir()
    onnx.save(
        constant(value=numpy_helper.from_array(WEIGHT, "w")),
        tmp_path / "in" / "m.onnx",
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    assert (tmp_path / "in" / "w.bin").stat().st_size == WEIGHT.nbytes
    model = load_model(tmp_path / "in" / "m.onnx")
    out = save_model(model, tmp_path / "out" / "m.onnx", external_data=not embedded)
    np.testing.assert_allclose(run(out), np.ones((2, 40), np.float32) @ WEIGHT, rtol=1e-5)


def test_sparse_tensors_are_refused(path: Path, tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "thin")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([2]), "at"), [40, 30])
    model = onnx.load(path)
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, path)
    onnx.save(constant(sparse_value=sparse), tmp_path / "node.onnx")
    for file in (path, tmp_path / "node.onnx"):
        with pytest.raises(RequestError, match="sparse"):
            load_model(file)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.FLOAT, [1.0, 2.0]),
        (TensorProto.FLOAT, [1.0] * 4),
        (TensorProto.FLOAT16, [1.0, 2.0]),
        (TensorProto.INT64, [1, 2]),
        (TensorProto.COMPLEX64, [1.0, 2.0]),
        (TensorProto.INT4, [1, 2]),
        (TensorProto.STRING, [b"a", b"b"]),
    ],
)
def test_numbers_that_are_not_as_many_as_the_shape_says_are_refused(path: Path, kind: int, values: list) -> None:
    model = onnx.load(path)
    tensor = helper.make_tensor("few", kind, [len(values)], values)
    model.graph.initializer.append(tensor)
    onnx.save(model, path)
    assert "few" in load_model(path).graph.initializers
    model.graph.initializer[-1].dims[0] = 3
    onnx.save(model, path)
    with pytest.raises(RequestError, match="truncated"):
        load_model(path)


@pytest.mark.parametrize("embedded", [True, False])
def test_a_full_disk_simulated_leaves_nothing_and_keeps_the_old_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: bool
) -> None:
    out = save_model(load_model(path), tmp_path / "out" / "model.onnx")
    before = out.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((onnx_files, "_write_parts") if embedded else (ir, "save")), full)
    with pytest.raises(EnvironmentLackError, match="no space"):
        save_model(load_model(path), out, external_data=not embedded)
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
    assert out.read_bytes() == before


def every_type() -> ir.Model:
    """Initializers of all sizes and types that are stored differently, in the graph and below it."""
    types = [np.float32, np.float16, np.int64, np.uint8, np.bool_]
    arrays = {f"large_{np.dtype(t)}": np.ones((40, 50), t) for t in types}
    arrays |= {"scalar": np.float32(3.0), "none": np.ones((0, 4), np.float32), "128 bytes": np.ones(32, np.float32)}
    arrays |= {f"{size}": np.arange(size, dtype=np.float32) for size in (255, 256, 4095, 4096, 40_000)}
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    tensors.append(helper.make_tensor("packed", TensorProto.INT4, [4001], b"\x21" * 2001, raw=True))
    tensors.append(helper.make_tensor("rounded", TensorProto.BFLOAT16, [2000], b"\x80\x3f" * 2000, raw=True))
    tensors.append(helper.make_tensor("words", TensorProto.STRING, [400], [b"word"] * 400))
    inner = [numpy_helper.from_array(np.ones(1000, np.float32), "inner")]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1000])],
        inner,
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        "g",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1000])],
        tensors,
    )
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )


def test_a_file_in_one_piece_is_what_protobuf_would_have_written(tmp_path: Path) -> None:
    model = every_type()
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    path = save_model(model, tmp_path / "ours.onnx", external_data=False)
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == tensors  # left as it was
    ir.save(model, tmp_path / "theirs.onnx")
    ours, theirs = onnx.load(path), onnx.load(tmp_path / "theirs.onnx")
    assert ours.SerializeToString() == theirs.SerializeToString()
    assert path.stat().st_size == (tmp_path / "theirs.onnx").stat().st_size
    onnx.checker.check_model(str(path))


def test_memory_to_write_a_file_in_one_piece(tmp_path: Path) -> None:
    """Protobuf itself would take five times the weights."""
    code = (
        "import resource, sys, numpy as np, onnx_ir as ir\n"
        "from exporter.onnx_files import save_model\n"
        "tensors = [ir.Tensor(np.ones((4 << 20), np.float32), name=f'w{i}') for i in range(12)]\n"
        "values = [ir.Value(name=t.name, const_value=t, shape=t.shape, type=ir.TensorType(t.dtype)) for t in tensors]\n"
        "node = ir.node('Sum', values)\n"
        "node.outputs[0].name = 'y'\n"
        "graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={'': 20}, name='g')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "save_model(ir.Model(graph, ir_version=10), sys.argv[1], external_data=False)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    path = tmp_path / "model.onnx"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert path.stat().st_size > 12 * (16 << 20)
    assert int(done.stdout) < 4 * (16 << 20)
