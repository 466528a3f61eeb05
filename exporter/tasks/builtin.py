"""The tasks that Planish knows, as data."""

from __future__ import annotations

from exporter.tasks.registry import Task, register_task

FEATURE_EXTRACTION = register_task(
    Task(
        name="feature-extraction",
        auto_class="AutoModel",
        architecture_suffixes=("Model",),
        modality="text",
        metric="spearman",
        outputs=("last_hidden_state", "sentence_embedding"),
        roles=("text",),
        label_roles=("text_pair", "score"),
        synonyms=("embedding", "embeddings", "sentence-embedding", "sentence-embeddings"),
    )
)
TEXT_CLASSIFICATION = register_task(
    Task(
        name="text-classification",
        auto_class="AutoModelForSequenceClassification",
        architecture_suffixes=("ForSequenceClassification",),
        modality="text",
        metric="accuracy",
        outputs=("logits",),
        logits=("logits",),
        roles=("text",),
        label_roles=("label",),
        synonyms=("sentiment-analysis",),
    )
)
TOKEN_CLASSIFICATION = register_task(
    Task(
        name="token-classification",
        auto_class="AutoModelForTokenClassification",
        architecture_suffixes=("ForTokenClassification",),
        modality="text",
        metric="token-accuracy",
        outputs=("logits",),
        logits=("logits",),
        roles=("tokens",),
        label_roles=("tags",),
        synonyms=("ner", "named-entity-recognition", "pos-tagging"),
    )
)
QUESTION_ANSWERING = register_task(
    Task(
        name="question-answering",
        auto_class="AutoModelForQuestionAnswering",
        architecture_suffixes=("ForQuestionAnswering",),
        modality="text",
        metric="span-f1",
        outputs=("start_logits", "end_logits"),
        logits=("start_logits", "end_logits"),
        roles=("question", "context"),
        label_roles=("answers",),
        synonyms=("qa", "extractive-question-answering"),
        truncation="only_second",
    )
)
FILL_MASK = register_task(
    Task(
        name="fill-mask",
        auto_class="AutoModelForMaskedLM",
        architecture_suffixes=("ForMaskedLM",),
        modality="text",
        metric="masked-token-accuracy",
        outputs=("logits",),
        logits=("logits",),
        roles=("text",),
        synonyms=("mlm", "masked-language-modeling"),
    )
)
IMAGE_CLASSIFICATION = register_task(
    Task(
        name="image-classification",
        auto_class="AutoModelForImageClassification",
        architecture_suffixes=("ForImageClassification", "ForImageClassificationWithTeacher"),
        modality="image",
        metric="top-1",
        outputs=("logits",),
        logits=("logits",),
        roles=("image",),
        label_roles=("label",),
    )
)
CUSTOM = register_task(
    Task(
        name="custom",
        auto_class=None,
        architecture_suffixes=(),
        modality="tensor",
        metric=None,
        outputs=(),
    )
)
