"""A resolved source as plain data, and the digest that identifies it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from exporter.digests import file_digest

SourceKind = Literal["huggingface", "package", "factory", "pt2", "onnx"]
KINDS: tuple[str, ...] = get_args(SourceKind)


LONGEST_NAME = 200
"""Characters of a bundle's name: file systems take 255 bytes, and logs and half-written bundles add to it."""


def bundle_name(text: str) -> str:
    """`text` as a name for bundles: letters, digits, ``.``, ``_`` and ``-``, beginning with a letter or digit."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:LONGEST_NAME] or "model"


@dataclass(frozen=True)
class Source:
    """Where the model comes from, looked at and found sound.

    Attributes:
        kind: One of `KINDS`.
        spec: What the user wrote.
        path: The model's folder (``huggingface``, ``package``) or file (``pt2``, ``onnx``); ``None`` for a factory.
        name: A short name for bundles.
        digest: ``"sha256:…"`` over weights, configuration, tokenizer and code reference; the same in every folder.
        licence: The licence that the model card or the package declares, if any.
        weights_bytes: Size of the weights as they lie on disk (in memory, for a factory).
        parameters: Number of weight elements, or ``None`` where only opening the model would tell.
        files: The small files that belong to the model, relative to `files_folder`, never weights: configuration,
            tokenizer, pre-processing, model card, licence.
        weights: The weight files, relative to `path`.
        trust_remote_code: Whether the folder's own Python code may run.
        pickled: The weights are a checkpoint that ``torch.load(weights_only=True)`` accepts, not safetensors.
        beside: The folder of the configuration and tokenizer that lie beside an ONNX file, if any do.
    """

    kind: SourceKind
    spec: str
    path: Path | None
    name: str
    digest: str
    licence: str | None = None
    weights_bytes: int = 0
    parameters: int | None = None
    files: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    trust_remote_code: bool = False
    pickled: bool = False
    beside: Path | None = None

    @property
    def is_folder(self) -> bool:
        """Whether the source is a Hugging Face model folder, wherever it was found."""
        return self.kind in ("huggingface", "package")

    @property
    def files_folder(self) -> Path | None:
        """Where `files` lie."""
        return self.path if self.is_folder else self.beside

    def json(self, name: str) -> Any:
        """The content of one of the source's JSON files, or ``None`` where the source has none of that name."""
        folder = self.files_folder
        if folder is None or not (folder / name).is_file():
            return None
        return json.loads((folder / name).read_text(encoding="utf-8"))

    def to_dict(self) -> dict[str, Any]:
        """The source as JSON-able data, so that another process need not resolve it again."""
        data = asdict(self)
        return {
            **data,
            **{key: None if data[key] is None else str(data[key]) for key in ("path", "beside")},
            "files": list(self.files),
            "weights": list(self.weights),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Source:
        return cls(
            **{
                **data,
                **{key: None if data.get(key) is None else Path(data[key]) for key in ("path", "beside")},
                "files": tuple(data.get("files", ())),
                "weights": tuple(data.get("weights", ())),
            }
        )


def digest_files(root: Path, names: Iterable[str]) -> str:
    """Digest of files by relative name and content: where the folder lies and the files' dates don't matter."""
    return digest_parts((name, file_digest(root / name)) for name in sorted(set(names)))


def digest_parts(parts: Iterable[tuple[str, str]]) -> str:
    """Digest of (name, content digest) pairs in the order given."""
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{name}\0{content}\n".encode())
    return f"sha256:{digest.hexdigest()}"
