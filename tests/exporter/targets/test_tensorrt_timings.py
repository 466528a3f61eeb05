"""The timings that builds leave for later ones: whose they are, and that builds at the same time lose none."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from exporter.errors import RequestError
from exporter.targets.tensorrt_builder import EngineOptions
from exporter.targets.tensorrt_child import give_timings, keep_timings, timings_file, timings_name
from tests.exporter.targets.tensorrt_graphs import ADA, build, needs_rtx, product, save


class Cache:
    """Stands for the library's cache, in which TensorRT for RTX writes no timings: entries by key, of one version."""

    def __init__(self, entries: dict[str, int], version: int) -> None:
        self.entries, self.version = entries, version

    def serialize(self) -> bytes:
        return json.dumps({"entries": self.entries, "version": self.version}).encode()

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        time.sleep(0.01)  # long enough for another build to come between reading and writing
        if other.version != self.version and not ignore_mismatch:
            return False
        self.entries = {**other.entries, **self.entries}
        return True


class Config:
    """Stands for the builder's configuration."""

    def __init__(self, version: int = 11) -> None:
        self.version = version
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        if not content:
            return Cache({}, self.version)
        try:
            found = json.loads(content)
        except ValueError:
            return None
        return Cache(found["entries"], found["version"])

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if cache.version != self.version and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def after_build(place: Path, key: str, value: int, version: int = 11) -> Config:
    """A build that began with what is in the file and timed one thing more."""
    config = Config(version)
    give_timings(config, place)
    assert config.cache is not None
    config.cache.entries[key] = value
    return config


def read(place: Path) -> dict[str, int]:
    entries: dict[str, int] = json.loads(place.read_bytes())["entries"]
    return entries


def test_the_file_is_of_one_module_version_and_gpu() -> None:
    ada = timings_name("tensorrt", "11.0.0.1", ["NVIDIA GeForce RTX 4090"])
    assert ada == "tensorrt-11.0.0.1-NVIDIA-GeForce-RTX-4090.timings"
    others = {
        timings_name("tensorrt_rtx", "11.0.0.1", ["NVIDIA GeForce RTX 4090"]),
        timings_name("tensorrt", "11.0.0.2", ["NVIDIA GeForce RTX 4090"]),
        timings_name("tensorrt", "11.0.0.1", ["NVIDIA H100"]),
        timings_name("tensorrt", "11.0.0.1", ["SM89"]),
        timings_name("tensorrt", "11.0.0.1", ["SM89", "SM120"]),
    }
    assert len(others | {ada}) == 6
    assert timings_name("a", "1", ["SM89", "SM120"]) == timings_name("a", "1", ["SM120", "SM89", "SM89"])
    assert Path(timings_name("a", "1", ["../x/y"])).name == timings_name("a", "1", ["../x/y"])


def test_nothing_is_kept_where_nobody_asks_or_the_gpu_is_not_known(tmp_path: Path) -> None:
    request: dict[str, Any] = {"module": "tensorrt", "gpus": ["SM89"], "options": {"timing_cache": str(tmp_path)}}
    assert timings_file(request, "11.0") == tmp_path / "tensorrt-11.0-SM89.timings"
    assert timings_file({**request, "gpus": []}, "11.0") is None
    assert timings_file({**request, "options": {"timing_cache": None}}, "11.0") is None


def test_builds_at_the_same_time_keep_each_other_s_timings(tmp_path: Path) -> None:
    place = tmp_path / "timings" / "file"
    configs = [after_build(place, f"kernel {number}", number) for number in range(8)]
    barrier = threading.Barrier(len(configs))

    def end(config: Config) -> None:
        barrier.wait()
        keep_timings(config, place)

    with ThreadPoolExecutor(len(configs)) as pool:
        list(pool.map(end, configs))
    assert read(place) == {f"kernel {number}": number for number in range(8)}
    assert after_build(place, "kernel 3", 33).cache.entries["kernel 5"] == 5  # type: ignore[union-attr]
    assert sorted(path.name for path in place.parent.iterdir()) == [".file.lock", "file"]


def test_the_newer_timing_wins(tmp_path: Path) -> None:
    place = tmp_path / "file"
    keep_timings(after_build(place, "a", 1), place)
    keep_timings(after_build(place, "a", 2), place)
    assert read(place) == {"a": 2}


@pytest.mark.parametrize("content", [b"damaged", json.dumps({"entries": {"old": 1}, "version": 10}).encode()])
def test_what_does_not_fit_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "file"
    place.write_bytes(content)
    (tmp_path / ".file.part").write_bytes(b"of a build that was killed while it wrote")
    keep_timings(after_build(place, "new", 2), place)
    assert read(place) == {"new": 2}


def test_a_reader_sees_whole_files_only(tmp_path: Path) -> None:
    place = tmp_path / "file"
    keep_timings(after_build(place, "x" * 200_000, 0), place)
    ended = threading.Event()

    def write() -> None:
        for number in range(20):
            keep_timings(after_build(place, "x" * 200_000, number), place)
        ended.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        while not ended.is_set() and not done.done():
            seen |= set(read(place).values())  # an unfinished file would be no JSON
        done.result()
    assert len(seen) > 1


def kept(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@needs_rtx
@pytest.mark.slow
def test_each_gpu_has_a_file_of_its_own(tmp_path: Path) -> None:
    path, folder = product(tmp_path / "model.onnx"), tmp_path / "timings"
    options = EngineOptions(compute_capabilities=("SM89",), timing_cache=folder)
    built = build(path, options)
    build(path, replace(options, compute_capabilities=("SM120",)))
    first = kept(folder)
    assert set(first) == {f"tensorrt_rtx-{built.version}-{gpu}.timings" for gpu in ("SM89", "SM120")}
    assert all(first.values())
    place = folder / f"tensorrt_rtx-{built.version}-SM89.timings"
    place.write_bytes(b"damaged")
    assert build(path, options).warnings == ()
    assert kept(folder) == first
    assert not [other for other in folder.iterdir() if other.name.endswith(".part")]


@needs_rtx
@pytest.mark.slow
def test_real_builds_at_the_same_time_leave_a_whole_file(tmp_path: Path) -> None:
    options = replace(ADA, timing_cache=tmp_path / "timings")
    paths = [product(tmp_path / f"model{number}.onnx") for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda path: build(path, options), paths))
    assert all(one.bytes > 0 and one.warnings == () for one in built)
    (content,) = kept(tmp_path / "timings").values()
    alone = replace(ADA, timing_cache=tmp_path / "alone")
    build(paths[0], alone)
    assert [content] == list(kept(tmp_path / "alone").values())


@needs_rtx
@pytest.mark.slow
def test_timings_of_no_use_are_not_the_reason_of_a_refusal(tmp_path: Path) -> None:
    """The library says errors about such a file and goes on without it."""
    options = replace(ADA, timing_cache=tmp_path / "timings")
    build(product(tmp_path / "good.onnx"), options)
    attention = helper.make_node("Attention", ["q", "k", "v"], ["y"], name="layer/Attention")
    path = save(tmp_path / "model.onnx", [attention], inputs=("q", "k", "v"), shape=(2, 64, 64), opset=23)
    with pytest.raises(RequestError, match="Attention operation was not supported"):
        build(path, options)


@needs_rtx
@pytest.mark.slow
def test_a_folder_that_cannot_be_written_costs_no_engine(tmp_path: Path) -> None:
    (tmp_path / "timings").write_text("a file")
    built = build(product(tmp_path / "model.onnx"), replace(ADA, timing_cache=tmp_path / "timings"))
    assert built.bytes == built.plan.stat().st_size > 0
    assert "The timings were not kept" in " ".join(built.warnings)
