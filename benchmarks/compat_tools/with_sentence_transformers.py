"""Load a bundle with sentence-transformers' ONNX back end.

``python with_sentence_transformers.py BUNDLE REQUEST ANSWER`` runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("sentence-transformers", "optimum-onnx", "transformers", "onnxruntime", "torch")


def main() -> None:
    bundle, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    ways: list[dict[str, str]] = [{}] if request["dtype"] == "fp32" else []
    ways.append({"file_name": request["file"]})
    answer = {
        "versions": {name: version(name) for name in PACKAGES},
        "checks": [check(bundle, request, way) for way in ways],
    }
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")


def check(bundle: str, request: dict[str, Any], way: dict[str, str]) -> dict[str, Any]:
    """Load the model, embed the texts, and give back everything; a failure is part of the answer."""
    from sentence_transformers import SentenceTransformer

    arguments = f", model_kwargs={way}" if way else ""
    loaded = f'SentenceTransformer(bundle, backend="onnx"{arguments})'
    try:
        model = SentenceTransformer(bundle, backend="onnx", model_kwargs={**way, "provider": "CPUExecutionProvider"})
        embeddings = model.encode(request["texts"], batch_size=len(request["texts"]))
        session = model[0].auto_model
    except Exception as error:
        return {"loaded": loaded, "error": f"{type(error).__name__}: {error}"}
    file = Path(session.path).resolve().relative_to(Path(bundle).resolve()).as_posix()
    arrays = {"sentence_embedding": {"shape": list(embeddings.shape), "data": embeddings.flatten().tolist()}}
    return {"loaded": loaded, "file": file, "arrays": arrays}


if __name__ == "__main__":
    main()
