"""Labelled texts into fixed splits, for the examples: without repetitions, stratified, the same on every machine."""

from __future__ import annotations

import csv
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path


def split(rows: Iterable[tuple[str, str]], sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Texts with their labels by split, every class in each as often as in all.

    Texts that occur several times are taken once, so that none is both trained and tested on; those that occur with
    different labels are left out, as are empty ones.

    Args:
        rows: Text and label.
        sizes: Rows per split.
        seed: Of the drawing.
    """
    labels: dict[str, set[str]] = defaultdict(set)
    for text, label in rows:
        labels[" ".join(text.split())].add(label)
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, found in labels.items():
        if text and len(found) == 1:
            by_label[next(iter(found))].append(text)
    total = sum(map(len, by_label.values()))
    if sum(sizes.values()) > total:
        raise SystemExit(f"{sum(sizes.values())} rows are asked for, and there are {total}")
    generator = random.Random(seed)
    for texts in by_label.values():
        texts.sort()
        generator.shuffle(texts)
    taken = dict.fromkeys(by_label, 0)
    splits: dict[str, list[tuple[str, str]]] = {}
    for name, size in sizes.items():
        counts = _shares({label: len(texts) for label, texts in by_label.items()}, size)
        splits[name] = []
        for label in sorted(by_label):
            start = taken[label]
            splits[name] += [(text, label) for text in by_label[label][start : start + counts[label]]]
            taken[label] += counts[label]
        generator.shuffle(splits[name])
    return splits


def write(splits: Mapping[str, list[tuple[str, str]]], folder: Path) -> dict[str, str]:
    """Write each split as CSV with the columns ``text`` and ``label``; returns their SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, rows in splits.items():
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows(rows)
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _shares(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """`size` divided as `counts` are, by largest remainders."""
    total = sum(counts.values())
    exact = {label: size * count / total for label, count in counts.items()}
    found = {label: int(value) for label, value in exact.items()}
    rest = sorted(exact, key=lambda label: (found[label] - exact[label], label))
    for label in rest[: size - sum(found.values())]:
        found[label] += 1
    return found
