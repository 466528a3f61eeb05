"""An AOTInductor package, compiled, opened and run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from exporter.artifact import Artifact, Variant
from exporter.digests import file_digest
from exporter.errors import RequestError
from exporter.original import Original, open_original
from exporter.sources import resolve_source
from exporter.targets import get_target
from exporter.targets.base import Session
from exporter.targets.inductor import compiled_types
from exporter.tasks import get_task
from exporter.torch_export import export_program

VARIANT = Variant("inductor-cpu", "fp32")


@pytest.fixture(scope="module")
def original() -> Original:
    return open_original(resolve_source("tests.models:conv_factory"), get_task("custom"))


@pytest.fixture(scope="module")
def engine(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    target = get_target("inductor-cpu")
    if not (state := target.availability()).available:
        pytest.skip(state.reason)
    folder = tmp_path_factory.mktemp("engine")
    program = export_program(original, folder / "program")
    package, _ = target.build(program, VARIANT, folder / "built")
    return Artifact(package, "pt2", original.signature, original.contract)


@pytest.fixture(scope="module")
def session(engine: Artifact) -> Session:
    trusted = frozenset([file_digest(engine.path)])
    return get_target("inductor-cpu").open(engine, VARIANT, threads=1, trusted_digests=trusted)


@pytest.mark.slow
def test_a_package_computes_what_the_original_does(session: Session, original: Original) -> None:
    given = {name: value.numpy() for name, value in original.example.items()}
    found = session.run(given)
    for name, value in original.run(given).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_package_says_what_it_was_compiled_to(session: Session, tmp_path: Path) -> None:
    executed = session.executed()
    assert executed["precision"] == "fp32"
    assert executed["types"] == ["float32"]
    package = tmp_path / "half.pt2"
    with zipfile.ZipFile(session.artifact.path) as built, zipfile.ZipFile(package, "w") as half:
        for name in built.namelist():
            if name.endswith(".cpp"):
                half.writestr(name, built.read(name).replace(b"dtype_float32", b"dtype_bfloat16"))
    assert compiled_types(package) == {"bfloat16"}
    with zipfile.ZipFile(package, "w") as bare:
        bare.writestr("model/nothing.so", b"")
    assert compiled_types(package) == frozenset()


@pytest.mark.slow
def test_a_length_beyond_the_range_never_reaches_the_compiled_code(session: Session, original: Original) -> None:
    axis = original.signature.axes[0]
    example = next(iter(original.example.values())).numpy()
    name = next(iter(original.example))
    given = {name: np.repeat(example[:1], axis.max + 1, axis=0)}
    with pytest.raises(RequestError, match="out of range"):
        session.run(given)


@pytest.mark.slow
def test_a_package_opens_where_there_is_no_compiler_and_imports_none(session: Session) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from exporter.targets.inductor import Package\n"
        "package = Package(Path(sys.argv[1]))\n"
        "print(package.inputs, package.outputs, 'torch._inductor' in sys.modules)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(session.artifact.path)],
        env={"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    inputs = [spec.name for spec in session.artifact.signature.inputs]
    outputs = [spec.name for spec in session.artifact.signature.outputs]
    assert told.stdout.strip() == f"{inputs} {outputs} False"
