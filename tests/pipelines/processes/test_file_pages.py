"""Pages of mapped files that are given back: memory falls, and what was read or changed stays as it was."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.processes.file_pages import release_file_pages

MEGABYTE = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise(MADV_PAGEOUT) is Linux's")


def of_files() -> int:
    """Bytes of mapped files that this process holds in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssFile")


@pytest.fixture
def values(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    np.arange(8 * MEGABYTE, dtype=np.int64).tofile(path)  # 64 MB
    return path


def test_pages_of_a_mapped_file_are_given_back_and_read_again_when_needed(values: Path) -> None:
    weights = np.memmap(values, dtype=np.int64, mode="r")
    total = int(weights.sum())
    held = of_files()
    assert release_file_pages() >= 64 * MEGABYTE
    assert of_files() < held - 48 * MEGABYTE
    assert int(weights.sum()) == total


def test_what_was_changed_in_a_private_mapping_stays(values: Path) -> None:
    weights = np.memmap(values, dtype=np.int64, mode="c")
    weights[::512] += 1  # a number on each page
    expected = weights.copy()
    release_file_pages()
    assert np.array_equal(weights, expected)


def test_small_mappings_are_left_alone(values: Path) -> None:
    weights = np.memmap(values, dtype=np.int64, mode="r")
    assert weights[-1] == 8 * MEGABYTE - 1
    assert release_file_pages(smallest=1 << 40) == 0
