"""What a certificate says in sentences, each from its figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.formats import count, large_count, ratio, scientific, size
from pipelines.verification.latency_result import spoils

SPARSE_FROM = 0.05
"""Share of zeros from which a model counts as sparse, and its zeros are worth a measurement."""
FASTER_FROM = 1.02
"""The least that the low end of a speed-up's interval must be for a target to count as faster."""
NOT_FASTER_TO = 1.05
"""The most that the high end may be for one that is not to count as no faster; between the two nothing can be told."""
BY_CHANCE_FROM = 0.75
"""Sparsity from which a small matrix may conform to 2:4 without anybody having meant it."""
_NAMED = 3


def findings(record: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing that was found, and one where nothing was."""
    told = [
        *_sparsity(record["sparsity"]),
        *_void(record["sparsity"]["matrices"]),
        *_two_four(record["two_four"]),
        *_removable(record["structure"], record["removal"]),
        *[_identical(group) for group in record["identical_layers"]],
        *_low_rank(record["low_rank"]["matrices"]),
        *_few_values(record["few_values"]["matrices"]),
    ]
    if not compressed(record):
        told.append(
            "Nothing of it is compressed: no zeros to speak of, nothing that is dead, equal, low-rank or clustered."
        )
    if not record["structure"]["known"]:
        told.append(f"Dead heads and neurons were not looked for: {record['structure']['reason']}.")
    if (latency := record["latency"]) is not None:
        told += speed_sentences(record["sparsity"]["overall"], latency)
    return told


def compressed(record: Mapping[str, Any]) -> bool:
    """Whether anything was found at all."""
    parts = record["structure"]
    return bool(
        record["sparsity"]["overall"] >= SPARSE_FROM
        or record["two_four"]["exact"]
        or parts["dead_heads"]
        or parts["dead_neurons"]
        or record["identical_layers"]
        or record["low_rank"]["matrices"]
        or record["few_values"]["matrices"]
    )


def worth_measuring(record: Mapping[str, Any]) -> bool:
    """Whether there are zeros, or dead parts, that could make it faster than its dense twin."""
    return record["sparsity"]["overall"] >= SPARSE_FROM or record["removal"] is not None


def percentage(share: float) -> str:
    """A share in per cent; never 0 or 100 where it is neither."""
    shown = f"{100 * share:.1f}"
    if shown == "100.0" and share < 1.0:
        shown = "99.9"
    if shown == "0.0" and share > 0.0:
        return "less than 0.1 %"
    return f"{shown.removesuffix('.0')} %"


def speed_sentences(sparsity: float, latency: Mapping[str, Any]) -> list[str]:
    """What the zeros are worth in time, and what it is worth to remove the dead parts.

    Args:
        sparsity: Share of zeros.
        latency: ``ratios`` as `pipelines.compress.speed.ratios_of` gives them, ``busy_elsewhere``; or ``skipped_all``,
            the reason why nothing was measured.
    """
    if reason := latency.get("skipped_all"):
        return [f"Whether it is faster than its dense twin was not measured: {reason}."]
    told = []
    for form, subject in (("found", f"{percentage(sparsity)} sparse"), ("smaller", "Without its dead parts")):
        ratios = {name: forms[form] for name, forms in latency["ratios"].items() if form in forms}
        if ratios:
            told.append(speed_sentence(subject, ratios))
    if spoils(latency.get("busy_elsewhere")):
        told.append(
            f"Not to be relied on: other programs took {latency['busy_elsewhere']:.0%} of the processors meanwhile."
        )
    return told


def speed_sentence(subject: str, ratios: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether any target is faster than the dense twin.

    Args:
        subject: What is compared with it.
        ratios: By target ``{"value", "low", "high"}`` or ``{"error"}``.
    """
    timed = {name: found for name, found in ratios.items() if "error" not in found}
    failed = [f"{name} was not timed: {found['error']}" for name, found in ratios.items() if "error" in found]
    faster = {name: found for name, found in timed.items() if found["low"] >= FASTER_FROM}
    others = {name: found for name, found in timed.items() if name not in faster}
    told_all = all(found["high"] <= NOT_FASTER_TO for found in others.values())
    if not timed:
        text = f"{subject}, and no target could be timed"
    elif faster:
        text = f"{subject}, faster than the dense twin on {_list(faster)}"
        if others:
            text += f"; {'not' if told_all else 'not shown to be faster'} on {_list(others)}"
    elif told_all:
        text = f"{subject}, 0 % faster on every target measured here ({_list(others)})"
    else:
        text = f"{subject}, not shown to be faster on any target measured here ({_list(others)})"
    return "; ".join([text, *failed]) + "."


def _list(ratios: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {ratio(r['value'])} [{r['low']:.2f}, {r['high']:.2f}]" for name, r in ratios.items())


def _sparsity(found: Mapping[str, Any]) -> list[str]:
    share, where = found["overall"], "of the weights of linear and convolutional layers are zero (embeddings apart)"
    if share < SPARSE_FROM:
        return [f"Dense: {percentage(share)} {where}."]
    inner = found["in_layers"]
    layers = "" if inner is None or abs(inner - share) < 5e-4 else f"; {percentage(inner)} in the layers that repeat"
    return [f"Sparse: {percentage(share)} {where}{layers}."]


def _void(matrices: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [entry["name"] for entry in matrices if entry["zeros"] == entry["elements"]]
    if not names:
        return []
    what = "All zeros: " if len(names) == 1 else f"{count(len(names))} matrices are all zeros: "
    told = "What goes in there has no effect on the outputs: see whether these are of any use"
    return [f"{what}{_names(names)}. {told}."]


def _two_four(found: Mapping[str, Any]) -> list[str]:
    exact, of = found["exact"], found["matrices"]
    if not exact:
        return [] if (found["share"] or 0.0) < 0.5 else [_nearly(found)]
    every = f"all {of} matrices" if len(exact) == of else f"{len(exact)} of {of} matrices ({_names(exact)})"
    chance = "; as sparse as they are, this may be chance" if found["exact_sparsity"] > BY_CHANCE_FROM else ""
    return [f"Exactly 2:4 sparse in {every}: of any four weights along the inputs at least two are zero{chance}."]


def _nearly(found: Mapping[str, Any]) -> str:
    share = percentage(found["share"])
    return f"Not 2:4 sparse: {share} of the groups of four conform, but throughout no matrix that is not all zeros."


def _removable(structure: Mapping[str, Any], removal: Mapping[str, Any] | None) -> list[str]:
    told = []
    for kind, what in (("heads", "attention heads"), ("neurons", "feed-forward neurons")):
        dead, of, left = structure[f"dead_{kind}"], structure[kind], structure[f"removable_{kind}"]
        if not dead:
            continue
        are = "is dead: removing it" if dead == 1 else "are dead: removing them"
        text = f"{count(dead)} of {count(of)} {what} {are} changes no output"
        if kind == "heads" and structure["why_no_heads"]:
            text += f"; they cannot be removed here, for {structure['why_no_heads']}"
        elif left < dead:
            text += f"; {count(dead - left)} of them must stay, for a layer keeps at least one"
        told.append(f"{text}.")
    if removal is not None:
        told.append(_removal(removal))
    return told


def _removal(found: Mapping[str, Any]) -> str:
    parity = found["parity"]
    before, after = found["parameters_before"], found["parameters_after"]
    less = f"{large_count(before)} parameters become {large_count(after)} ({percentage(1 - after / before)} less)"
    proof = f"{count(parity['cases'])} batches of examples"
    if parity["verdict"] != "passed":
        return f"Removed, the outputs could not be shown to be the same ({parity['reason']}): nothing was written."
    where = f", written to {found['folder']} in FP32 ({size(found['bytes_after'])})" if found["folder"] else ""
    return (
        f"Removed: {less}{where}; outputs over {proof} agree within rounding (relative error "
        f"{scientific(parity['rms_relative'])}, limit {scientific(parity['limit'])})."
    )


def _identical(group: Mapping[str, Any]) -> str:
    numbers = ", ".join(str(number) for number in group["layers"])
    how = (
        "stored once"
        if group["stored_once"]
        else f"storing them once saves {large_count(group['parameters'])} parameters"
    )
    return f"Layers {numbers} of {group['list']} are identical, weight for weight ({how})."


def _low_rank(matrices: Sequence[Mapping[str, Any]]) -> list[str]:
    if not matrices:
        return []
    saving = [entry for entry in matrices if entry["saves"] > 0]
    saved = sum(entry["saves"] for entry in saving)
    ranks = sorted(entry["rank"] for entry in matrices)
    span = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
    names = _names([entry["name"] for entry in matrices])
    gain = f"two factors each would save {large_count(saved)} parameters" if saving else "factors would save nothing"
    return [
        f"Low rank: {_matrices(len(matrices))} of rank {span}, below half of what they could have ({names}); {gain}."
    ]


def _few_values(matrices: Sequence[Mapping[str, Any]]) -> list[str]:
    if not matrices:
        return []
    most = max(entry["values"] for entry in matrices)
    names = _names([entry["name"] for entry in matrices])
    return [f"Clustered: {_matrices(len(matrices))} of at most {most} distinct values other than zero ({names})."]


def _matrices(number: int) -> str:
    return f"{number} matrix" if number == 1 else f"{number} matrices"


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
