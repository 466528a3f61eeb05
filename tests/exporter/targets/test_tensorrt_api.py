"""Whether the names that our code uses exist in TensorRT 10 and 11, and in TensorRT for RTX.

`tensorrt_api` holds the names of NVIDIA's real bindings (`tensorrt_names` says how they were had); where bindings are
installed, the list of their version is compared with them.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from exporter.targets import tensorrt_child
from tests.exporter.targets.tensorrt_names import CLASSES, FOLDER, names_of

VERSIONS = ("10", "11")
OWNERS = {
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
GUARDED = {("IBuilderConfig", "num_compute_capabilities"), ("IBuilderConfig", "set_compute_capability")}
"""What is used only behind a look for `ComputeCapability`, which TensorRT for RTX alone has."""


def listed(name: str) -> dict[str, list[str]]:
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert content["version"].startswith(f"{name}.")
    names: dict[str, list[str]] = content["names"]
    return names


def used(source: str) -> set[tuple[str, str]]:
    """The attributes of TensorRT's objects in some code: pairs of a class (empty: the module) and a name in it."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name):
            if node.value.id == "trt":
                found.add(("", node.attr))
            elif node.value.id in OWNERS:
                found.add((OWNERS[node.value.id], node.attr))
        elif ast.unparse(node.value).startswith("trt.") and isinstance(node.value, ast.Attribute):
            found.add((node.value.attr, node.attr))
    return found


CODE = Path(tensorrt_child.__file__).read_text(encoding="utf-8")


def test_the_names_are_found_in_the_code() -> None:
    code = "network = builder.create_network(1)\nx = trt.BuilderFlag.TF32\ny = getattr(trt, 'Later', None)\n"
    assert used(code) == {("Builder", "create_network"), ("", "BuilderFlag"), ("BuilderFlag", "TF32")}
    assert {("Builder", "build_serialized_network"), ("OnnxParser", "parse_from_file")} <= used(CODE)


def lacking(uses: set[tuple[str, str]], names: dict[str, list[str]]) -> set[tuple[str, str]]:
    return {(owner, name) for owner, name in uses if name not in names.get(owner, []) and name != "__version__"}


@pytest.mark.parametrize("name", VERSIONS)
def test_what_the_builder_uses_exists_in_the_native_library(name: str) -> None:
    assert lacking(used(CODE), listed(name)) == GUARDED
    assert "ComputeCapability" not in listed(name)[""]


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("flag", sorted(tensorrt_child.FLAGS.values()))
def test_every_flag_is_one_of_the_native_library(name: str, flag: str) -> None:
    assert flag in listed(name)["BuilderFlag"]


def test_what_went_with_version_11_is_not_used() -> None:
    gone = {
        (owner, name)
        for owner, names in listed("10").items()
        for name in names
        if name not in listed("11").get(owner, [])
    }
    assert ("BuilderFlag", "FP16") in gone
    assert not used(CODE) & gone


def test_what_the_builder_uses_exists_in_tensorrt_for_rtx() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    names = {"": dir(library), "Severity": dir(library.ILogger.Severity)}
    names |= {name: dir(getattr(library, name)) for name in CLASSES if hasattr(library, name)}
    assert lacking(used(CODE), names) == set()


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
