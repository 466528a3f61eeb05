"""The step ``distil``: a smaller student learns to do what its teacher does."""

from __future__ import annotations

import copy
from typing import Any

from exporter.errors import RequestError
from exporter.structure import STRUCTURE, keep_layers, layers_of
from pipelines.compress.sections import Distil
from pipelines.compress.steps.desk import Desk, learn, open_desk

_FIXED = {"vocab_size", "id2label", "label2id", "num_labels", "model_type", "architectures", STRUCTURE}


def distil(arguments: dict[str, Any]) -> dict[str, Any]:
    """Make the student and train it.

    Args:
        arguments: See `pipelines.compress.steps.desk.Desk`, whose ``source`` is what the student is made of; ``step``.

    Returns:
        ``student`` (how it was made), ``training``, ``size``.
    """
    desk, settings = open_desk(arguments), Distil(**arguments["step"])
    student, how = make_student(desk, settings)
    trained = learn(desk, student, settings, settings.loss)
    return {"student": how, "training": trained, "size": desk.save(student)}


def make_student(desk: Desk, settings: Distil) -> tuple[Any, dict[str, Any]]:
    """The student before training, and how it was made.

    Raises:
        RequestError: The model has no such layers, or its configuration no such fields.
    """
    if settings.layers is not None:
        model = desk.model
        count = len(layers_of(model))
        kept = spread(settings.layers, count) if isinstance(settings.layers, int) else list(settings.layers)
        keep_layers(model, kept)
        return model, {"made": f"layers {', '.join(map(str, kept))} of {count}", "layers": kept}
    if settings.config:
        return _of_configuration(desk, settings.config), {
            "made": "new, from a configuration",
            "config": settings.config,
        }
    return desk.model, {"made": "a checkpoint" if settings.student else "the model itself"}


def spread(wanted: int, count: int) -> list[int]:
    """`wanted` of `count` layers, evenly apart, from the first to the last.

    >>> spread(3, 6), spread(4, 12), spread(1, 6)
    ([0, 2, 5], [0, 4, 7, 11], [0])

    Raises:
        RequestError: There are not so many.
    """
    if not 1 <= wanted <= count:
        raise RequestError("the model has not so many layers", wanted, f"It has {count}")
    if wanted == 1:
        return [0]
    return [int(i * (count - 1) / (wanted - 1) + 0.5 - 1e-9) for i in range(wanted)]


def _of_configuration(desk: Desk, changed: dict[str, Any]) -> Any:
    """A new model like the teacher, but for some fields of its configuration.

    Of one that only has fewer layers, those keep the teacher's weights.
    """
    import torch

    from exporter.original.huggingface import quiet_transformers

    teacher = desk.model
    config = copy.deepcopy(teacher.config)
    if unknown := [name for name in changed if not hasattr(config, name)]:
        raise RequestError("the model's configuration has no such field", ", ".join(unknown), "See its config.json")
    if refused := sorted(_FIXED & set(changed)):
        remedy = "Leave it as the teacher has it: tokens and classes of the two must be the same"
        raise RequestError("the student's configuration cannot change this", ", ".join(refused), remedy)
    for name, value in changed.items():
        setattr(config, name, value)
    if hasattr(config, STRUCTURE):  # of a teacher that was pruned; a new student is built as its own fields say
        delattr(config, STRUCTURE)
    torch.manual_seed(desk.seed)
    try:
        with quiet_transformers():
            student = type(teacher)(config)
    except (ValueError, TypeError) as error:
        raise RequestError(
            "the student's configuration is none", f"{changed}: {error}"[:300], "Mend distil.config"
        ) from error
    own = student.state_dict()
    fitting = {name: t for name, t in teacher.state_dict().items() if name in own and own[name].shape == t.shape}
    if set(changed) <= {"num_hidden_layers", "n_layers"}:
        student.load_state_dict(fitting, strict=False)
    return student.requires_grad_(True)
