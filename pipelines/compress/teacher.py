"""Teachers: whether a student can learn from one, and its answers to every row, kept on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporter.errors import RequestError
from exporter.preprocess import read_labels
from exporter.sources import Source

ANSWERS = "answers.npy"
_BATCH = 64
_COMPARED = 64


def refuse_unlike(teacher: Source, student: Source, encoders: tuple[Any, Any], texts: Sequence[str]) -> None:
    """Refuse a teacher whose answers mean something else than the student's.

    Args:
        teacher: The teacher.
        student: The student.
        encoders: Of the two.
        texts: A few, to compare the tokens of.

    Raises:
        RequestError: They have other classes, other orders of the same ones (tells the mapping that would mend it), or
            cut texts into other tokens.
    """
    theirs, mine = (read_labels(s.files_folder) if s.files_folder else {} for s in (teacher, student))
    if theirs and mine and theirs != mine:
        order = [name for _, name in sorted(theirs.items())]
        if sorted(theirs.values()) == sorted(mine.values()):
            mapping = {name: index for index, name in theirs.items()}
            remedy = (
                f"Give the student the teacher's order, label2id: {mapping}, or compress.labels: [{', '.join(order)}]"
            )
            raise RequestError(
                "teacher and student have their classes in different orders", _told(theirs, mine), remedy
            )
        remedy = f"Train a teacher with the student's classes, or give the student these: [{', '.join(order)}]"
        raise RequestError("teacher and student have different classes", _told(theirs, mine), remedy)
    if encoders[1].tokenizer.get_vocab().keys() < encoders[0].tokenizer.get_vocab().keys():
        return  # a vocabulary that was cut, whose rarer words may be in smaller pieces
    for text in texts[:_COMPARED]:
        cuts = [[e.tokenizer.id_to_token(int(i)) for i in e.encode([text])["input_ids"][0]] for e in encoders]
        if cuts[0] != cuts[1]:
            shared = len(set(cuts[0]) & set(cuts[1]))
            shown = " and ".join(" ".join(map(str, cut))[:60] for cut in cuts)
            told = f"{text[:40]!r}: {shown}, of which {shared} tokens are the same"
            remedy = (
                "Make the student from the teacher (distil.layers, distil.config), or give it the teacher's tokenizer"
            )
            raise RequestError("teacher and student have different tokenizers", told, remedy)


def _told(theirs: Mapping[int, str], mine: Mapping[int, str]) -> str:
    return f"teacher {', '.join(theirs[k] for k in sorted(theirs))}; student {', '.join(mine[k] for k in sorted(mine))}"


def _said(outputs: Any) -> Any:
    import torch

    return (
        torch.stack([outputs.start_logits, outputs.end_logits], dim=-1) if "start_logits" in outputs else outputs.logits
    )


def answers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Stage: what a teacher says of every row: logits, or sentence embeddings, float32, as ``answers.npy``. Of tokens,
    and of questions (start and end logits by token), from a row's first token on and filled with zeros.

    Args:
        arguments: As those of a step (`pipelines.compress.steps.desk`), with the teacher as ``source``; ``folder``.

    Returns:
        ``rows``, ``width`` and the mean certainty of the answers.
    """
    import torch

    from pipelines.compress.examples import collator
    from pipelines.compress.steps.desk import open_desk
    from pipelines.processes import report_progress

    desk = open_desk(arguments)
    examples = desk.examples(arguments.get("max_length"), labelled=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, pool = desk.model.to(device).eval().requires_grad_(False), desk.pool(device)
    collate = collator(desk.pad, desk.pad_side)
    order = sorted(range(len(examples)), key=lambda i: examples.lengths[i])
    found: Any = None
    longest = max(examples.lengths)
    for start in range(0, len(order), _BATCH):
        if start % (_BATCH * 16) == 0:
            report_progress(f"asking the teacher: {start} of {len(order)} rows")
        chosen = order[start : start + _BATCH]
        batch = collate([examples[i] for i in chosen])
        inputs = {name: batch[name].to(device) for name in examples.inputs}
        with torch.no_grad():
            outputs = model(**inputs)
            said = _said(outputs) if pool is None else pool(outputs.last_hidden_state, inputs["attention_mask"])
        values = said.float().cpu().numpy()
        if found is None:
            shape = values.shape[1:] if values.ndim == 2 else (longest, values.shape[-1])
            found = np.zeros((len(order), *shape), np.float32)
        if values.ndim == 3:  # of tokens: from the first on, without padding
            for row, given, mask in zip(chosen, values, batch["attention_mask"].numpy(), strict=True):
                found[row, : mask.sum()] = given[mask == 1]
        else:
            found[chosen] = values
    np.save(Path(arguments["folder"]) / ANSWERS, found)
    record: dict[str, Any] = {"rows": len(order), "width": int(found.shape[-1])}
    if pool is None and found.ndim == 2:
        shares = np.exp(found - found.max(axis=-1, keepdims=True))
        record["mean_certainty"] = float((shares / shares.sum(axis=-1, keepdims=True)).max(axis=-1).mean())
    return record
