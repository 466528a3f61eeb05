"""Whether the names that our code and its fake library use exist in TensorRT 10 and 11, and in TensorRT for RTX.

`tensorrt_api` holds the names of NVIDIA's real bindings (`tensorrt_names` says how they were had); where bindings are
installed, the list of their version is compared with them.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from exporter.targets import tensorrt_child, tensorrt_session
from tests.exporter.targets import fake_tensorrt
from tests.exporter.targets.tensorrt_names import CLASSES, FOLDER, names_of

VERSIONS = ("10", "11")
BUILDING = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "error": "ParserError",
    "profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "plan": "IHostMemory",
    "cache": "ITimingCache",
    "severity": "Severity",
}
"""What variables of `tensorrt_child` hold."""
RUNNING = {
    "opened.runtime": "Runtime",
    "engine": "ICudaEngine",
    "self.engine": "ICudaEngine",
    "context": "IExecutionContext",
    "severity": "Severity",
}
"""What variables and attributes of `tensorrt_session` hold."""
OURS = ("errors", "warnings", "text", "told", "tell", "unheard")
"""Methods of classes that TensorRT calls which our own code alone calls."""
GUARDED = {("IBuilderConfig", "num_compute_capabilities"), ("IBuilderConfig", "set_compute_capability")}
"""What is used only behind a look for `ComputeCapability`, which TensorRT for RTX alone has."""


def listed(name: str) -> dict[str, list[str]]:
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert content["version"].startswith(f"{name}.")
    names: dict[str, list[str]] = content["names"]
    return names


def used(source: str, owners: Mapping[str, str] = BUILDING) -> set[tuple[str, str]]:
    """The attributes of TensorRT's objects in some code: pairs of a class (empty: the module) and a name in it.

    Also what classes of ours that TensorRT calls define for it.
    """
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.bases and (base := ast.unparse(node.bases[0])).startswith("trt."):
            methods = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found |= {(base[4:], name) for name in methods if not name.startswith("__") and name not in OURS}
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        if owner in ("trt", "self._trt"):
            found.add(("", node.attr))
        elif owner in owners:
            found.add((owners[owner], node.attr))
        elif owner.startswith(("trt.", "self._trt.")):
            found.add((owner.rpartition(".")[2], node.attr))
    return found


CHILD = used(Path(tensorrt_child.__file__).read_text(encoding="utf-8"))
SESSION = used(Path(tensorrt_session.__file__).read_text(encoding="utf-8"), RUNNING)
USES = pytest.mark.parametrize("uses", [CHILD, SESSION], ids=["building", "running"])


def test_the_names_are_found_in_the_code() -> None:
    code = "network = builder.create_network(1)\nx = trt.BuilderFlag.TF32\ny = getattr(trt, 'Later', None)\n"
    assert used(code) == {("Builder", "create_network"), ("", "BuilderFlag"), ("BuilderFlag", "TF32")}
    code = "class Log(trt.ILogger):\n    def log(self, level, text):\n        self.engine.get_tensor_name(0)\n"
    assert used(code, RUNNING) == {("", "ILogger"), ("ILogger", "log"), ("ICudaEngine", "get_tensor_name")}
    assert {("Builder", "build_serialized_network"), ("OnnxParser", "parse_from_file")} <= CHILD
    assert {
        ("", "Runtime"),
        ("Runtime", "engine_host_code_allowed"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("IExecutionContext", "execute_async_v3"),
        ("IOutputAllocator", "reallocate_output_async"),
        ("ILogger", "log"),
        ("Severity", "ERROR"),
    } <= SESSION


def lacking(uses: set[tuple[str, str]], names: dict[str, list[str]]) -> set[tuple[str, str]]:
    return {(owner, name) for owner, name in uses if name not in names.get(owner, []) and name != "__version__"}


@pytest.mark.parametrize("name", VERSIONS)
def test_what_is_used_exists_in_the_native_library(name: str) -> None:
    assert lacking(CHILD, listed(name)) == GUARDED
    assert lacking(SESSION, listed(name)) == set()
    assert "ComputeCapability" not in listed(name)[""]


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("flag", sorted(tensorrt_child.FLAGS.values()))
def test_every_flag_is_one_of_the_native_library(name: str, flag: str) -> None:
    assert flag in listed(name)["BuilderFlag"]


@USES
def test_what_went_with_version_11_is_not_used(uses: set[tuple[str, str]]) -> None:
    gone = {
        (owner, name)
        for owner, names in listed("10").items()
        for name in names
        if name not in listed("11").get(owner, [])
    }
    assert ("BuilderFlag", "FP16") in gone
    assert not uses & gone


def real_classes(library: Any) -> dict[str, Any]:
    found = {name: getattr(library, name) for name in CLASSES if hasattr(library, name)}
    return found | {"Severity": library.ILogger.Severity}


def names_in(library: Any) -> dict[str, list[str]]:
    """As `tensorrt_names` lists them."""
    classes = real_classes(library).items()
    return {"": dir(library)} | {
        name: [*dir(cls), *re.findall(r"\bdef (\w+)[(]", cls.__doc__ or "")] for name, cls in classes
    }


@USES
def test_what_is_used_exists_in_tensorrt_for_rtx(uses: set[tuple[str, str]]) -> None:
    assert lacking(uses, names_in(pytest.importorskip("tensorrt_rtx"))) == set()


def fake_names() -> set[tuple[str, str]]:
    """All that the fake library offers: public names of its module, and of its classes and their objects."""
    found = {("", name) for name in vars(fake_tensorrt.module("tensorrt")) if not name.startswith("_")}
    for owner, cls in fake_tensorrt.CLASSES.items():
        names = {name for name in (*dir(cls), *assigned(cls)) if not name.startswith("_")}
        found |= {(owner, name) for name in names}
    return found


def assigned(cls: type) -> set[str]:
    """The attributes that a class's own code gives its objects."""
    code = ast.parse(inspect.getsource(cls))
    return {node.attr for node in ast.walk(code) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def test_all_names_of_the_fake_are_looked_at() -> None:
    assert {
        ("", "Runtime"),
        ("Runtime", "engine_host_code_allowed"),
        ("ICudaEngine", "num_io_tensors"),
        ("IOutputAllocator", "notify_shape"),
        ("Severity", "ERROR"),
    } <= fake_names()
    assert ("", "FakeRuntime") not in fake_names()


@pytest.mark.parametrize("name", VERSIONS)
def test_the_fake_has_no_name_that_the_native_library_lacks(name: str) -> None:
    assert lacking(fake_names(), listed(name)) == set()


def test_the_fake_has_no_name_that_tensorrt_for_rtx_lacks() -> None:
    assert lacking(fake_names(), names_in(pytest.importorskip("tensorrt_rtx"))) == set()


@pytest.mark.parametrize("owner", sorted(fake_tensorrt.CLASSES))
def test_methods_of_the_fake_take_the_arguments_of_those_of_tensorrt_for_rtx(owner: str) -> None:
    """The first line of a binding's documentation has its signature, or each of its overloads has one."""
    real, fake = real_classes(pytest.importorskip("tensorrt_rtx"))[owner], fake_tensorrt.CLASSES[owner]
    for name, method in inspect.getmembers(fake, inspect.isfunction):
        if name.startswith("_"):
            continue
        taken = list(inspect.signature(method).parameters)
        document = getattr(real, name).__doc__ if hasattr(real, name) else real.__doc__
        accepted = []
        for given in re.findall(rf"\b{name}\((.*)\)", document):
            parameters = [(text.partition(":")[0].strip(), "=" in text) for text in given.split(", ")]
            accepted.append([parameter for parameter, _ in parameters])
            accepted.append([parameter for parameter, optional in parameters if not optional])
        assert taken in accepted, (owner, name)


def test_the_list_is_that_of_the_bindings_installed_here() -> None:
    try:
        installed = version("tensorrt-cu13-bindings")
    except PackageNotFoundError:
        pytest.skip("tensorrt-cu13-bindings is not installed")
    major = installed.partition(".")[0]
    if major not in VERSIONS:
        pytest.skip(f"there is no list of TensorRT {major} yet")
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None
    assert spec.origin is not None
    found = names_of(Path(spec.origin).parents[1], int(major))
    if found["version"] != json.loads((FOLDER / f"{major}.json").read_text(encoding="utf-8"))["version"]:
        pytest.skip(f"the list is of another {major}.x than {installed}")
    assert found["names"] == listed(major)
