from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.stages.files import ROWS, read_rows, write_rows


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\r", "\n", "\r\n"])
def test_rows_come_back_whatever_ends_lines_in_their_texts(tmp_path: Path, mark: str) -> None:
    rows = [{"text": f"one{mark}two", "label": 1}, {"text": mark, "tokens": [mark, "é"]}]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows


def test_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path) is None
    write_rows(tmp_path, [])
    assert (tmp_path / ROWS).is_file()
    assert read_rows(tmp_path) == []
