"""What somebody says of a checkpoint, held against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.errors import RequestError
from pipelines.compress.wording import percentage

TOLERANCE = 5e-4
"""By so much a sparsity may fall short of the claim: pruning rounds to whole weights in every matrix."""
_REMEDY = "As in --claims sparsity=0.9,2:4; a sparsity is a share from 0 to 1"


def parse_claims(text: str) -> list[tuple[str, float]]:
    """``"sparsity=0.9,2:4"`` as ``[("sparsity", 0.9), ("2:4", 1.0)]``.

    Raises:
        RequestError: It claims something else.
    """
    found = []
    for item in (part.strip() for part in text.split(",")):
        name, equals, value = item.partition("=")
        if item == "2:4":
            found.append((item, 1.0))
            continue
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if name.strip() != "sparsity" or not equals or not 0.0 <= share <= 1.0:
            raise RequestError("not a claim that can be checked", repr(item), _REMEDY)
        found.append(("sparsity", share))
    return found


def check_claims(claims: list[tuple[str, float]], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each claim with ``true`` and a sentence.

    Sparsity is that of all linear and convolutional weights. 2:4 is claimed of the matrices in the layers that repeat;
    of all of them where none does.
    """
    return [_two_four(record) if name == "2:4" else _sparsity(share, record) for name, share in claims]


def _sparsity(share: float, record: Mapping[str, Any]) -> dict[str, Any]:
    found = record["sparsity"]["overall"]
    true = found >= share - TOLERANCE
    text = f"sparsity={share:g} is {'true' if true else 'NOT true'}: measured {percentage(found)}"
    return {"claim": f"sparsity={share:g}", "true": true, "measured": found, "sentence": f"{text}."}


def _two_four(record: Mapping[str, Any]) -> dict[str, Any]:
    matrices = record["sparsity"]["matrices"]
    asked = [entry for entry in matrices if entry["in_layers"]] or list(matrices)
    exact = sum(entry["exactly_two_four"] for entry in asked)
    true = 0 < exact == len(asked)
    text = f"2:4 is {'true' if true else 'NOT true'}: {exact} of {len(asked)} matrices in the layers conform throughout"
    return {"claim": "2:4", "true": true, "measured": exact / len(asked) if asked else 0.0, "sentence": f"{text}."}
