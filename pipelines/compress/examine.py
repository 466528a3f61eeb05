"""Job: look at every weight of a checkpoint, and write what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError
from pipelines.compress.forms import DENSE, SMALLER
from pipelines.processes import report_progress

if TYPE_CHECKING:
    from exporter.original import Original
    from exporter.sources import Source
    from pipelines.compress.dead import DeadParts


def examine(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint is; its dense twin and the checkpoint without its dead parts go into folders of these names.

    Args:
        arguments: ``original`` (what to open), ``twin`` (whether one is wanted, where there is something to measure),
            ``folder``.

    Returns:
        ``model_type``, ``weights``, ``sparsity``, ``two_four``, ``low_rank``, ``few_values``, ``identical_layers``,
        ``structure``, ``removal``.
    """
    from exporter.original import open_described
    from pipelines.compress.wording import worth_measuring

    folder = Path(arguments["folder"])
    report_progress("opening the checkpoint")
    original = open_described(arguments["original"])
    report_progress("looking at every weight matrix")
    record = {
        "model_type": original.module.config.model_type,
        "weights": _weights(original.source, original),
        **_measured(original.module),
    }
    dead, record["structure"] = _structure(original)
    record["removal"] = None
    if any(parts.removable_heads or parts.removable_neurons for parts in dead):
        report_progress("removing what is dead, and comparing")
        record["removal"] = _remove(original, dead, folder / SMALLER)
        original = open_described(arguments["original"])
    if arguments["twin"] and worth_measuring(record):
        report_progress("filling the zeros of the dense twin")
        _write_twin(original, folder / DENSE)
    return record


def _weights(source: Source, original: Original) -> dict[str, Any]:
    from exporter.sources.weights import stored_dtypes

    parameters = list(original.module.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int((p != 0).sum()) for p in parameters),
        "stored": source.parameters,
        "bytes": source.weights_bytes,
        "dtypes": stored_dtypes(source.path, source.weights),
    }


def _measured(module: Any) -> dict[str, Any]:
    from pipelines.compress.dead import identical_layers
    from pipelines.compress.weights import MOST_VALUES, RANK_RULE, measure_matrix, weight_matrices

    facts = [measure_matrix(*matrix) for matrix in weight_matrices(module)]
    inner = [fact for fact in facts if fact.in_layers]
    groups = sum(fact.groups for fact in facts)
    low = [
        {"name": f.name, "rank": f.rank, "full_rank": f.full_rank, "saves": max(0, f.elements - f.factored)}
        for f in facts
        if f.low_rank
    ]
    return {
        "sparsity": {
            "overall": _share(facts),
            "in_layers": _share(inner) if inner else None,
            "elements": sum(fact.elements for fact in facts),
            "zeros": sum(fact.zeros for fact in facts),
            "matrices": [{**fact.to_dict(), "in_layers": fact.in_layers} for fact in facts],
        },
        "two_four": {
            "share": sum(fact.conforming for fact in facts) / groups if groups else None,
            "exact": [fact.name for fact in facts if fact.exactly_two_four],
            "exact_sparsity": _share([fact for fact in facts if fact.exactly_two_four]),
            "matrices": len(facts),
        },
        "low_rank": {"rule": RANK_RULE, "matrices": low},
        "few_values": {
            "most": MOST_VALUES,
            "matrices": [{"name": fact.name, "values": fact.values} for fact in facts if fact.few_values],
        },
        "identical_layers": identical_layers(module),
    }


def _share(facts: Sequence[Any]) -> float:
    elements = sum(fact.elements for fact in facts)
    return sum(fact.zeros for fact in facts) / elements if elements else 0.0


def _structure(original: Original) -> tuple[list[DeadParts], dict[str, Any]]:
    from pipelines.compress.dead import dead_parts

    try:
        dead, reason = dead_parts(original.module), ""
    except RequestError as error:
        dead, reason = [], f"{error.what}: {error.value}"
    return dead, {
        "known": not reason,
        "reason": reason,
        "heads": sum(parts.heads for parts in dead),
        "neurons": sum(parts.neurons for parts in dead),
        "dead_heads": sum(len(parts.dead_heads) for parts in dead),
        "dead_neurons": sum(len(parts.dead_neurons) for parts in dead),
        "removable_heads": sum(len(parts.removable_heads) for parts in dead),
        "removable_neurons": sum(len(parts.removable_neurons) for parts in dead),
        "why_no_heads": next((parts.why_no_heads for parts in dead), ""),
        "layers": [parts.to_dict() for parts in dead],
    }


def _remove(original: Original, dead: Sequence[DeadParts], folder: Path) -> dict[str, Any]:
    """Remove, write, read back what was written, and compare that with what the model computed before."""
    from exporter.original import open_original
    from exporter.sources import resolve_source
    from exporter.structure import save_checkpoint
    from exporter.structure.checkpoint import files_beside
    from pipelines.compress.dead import remove_dead
    from pipelines.compress.sameness import judge_sameness, record_reference

    source, module = original.source, original.module
    before, reference = sum(p.numel() for p in module.parameters()), record_reference(original)
    remove_dead(module, dead)
    save_checkpoint(module, folder, small_files=files_beside(source))
    written = resolve_source(str(folder), trust_remote_code=source.trust_remote_code)
    smaller = open_original(written, original.task)
    return {
        "parameters_before": before,
        "parameters_after": sum(p.numel() for p in smaller.module.parameters()),
        "bytes_before": source.weights_bytes,
        "bytes_after": written.weights_bytes,
        "folder": None,
        "parity": judge_sameness(reference, smaller),
    }


def _write_twin(original: Original, folder: Path) -> None:
    from exporter.structure import save_checkpoint
    from exporter.structure.checkpoint import files_beside
    from pipelines.compress.twin import fill_zeros

    fill_zeros(original.module)
    save_checkpoint(original.module, folder, small_files=files_beside(original.source))
