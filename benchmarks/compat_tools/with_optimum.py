"""Load a bundle with optimum-onnx: ``python with_optimum.py BUNDLE REQUEST ANSWER``.

Runs in an environment of its own.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

CLASSES = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "fill-mask": "ORTModelForMaskedLM",
}


def main() -> None:
    bundle, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    folder, _, name = request["file"].rpartition("/")
    # As a stranger would, and as the documentation advises for a folder with several ONNX files.
    ways: list[dict[str, str]] = [{}] if request["dtype"] == "fp32" else []
    ways.append({"subfolder": folder, "file_name": name})
    answer = {
        "versions": {
            name: version(name) for name in ("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch")
        },
        "checks": [check(bundle, request, way) for way in ways],
    }
    Path(sys.argv[3]).write_text(json.dumps(answer), encoding="utf-8")


def check(bundle: Path, request: dict[str, Any], way: dict[str, str]) -> dict[str, Any]:
    """Load the model, run the texts, and give back everything; a failure is part of the answer."""
    import optimum.onnxruntime
    from transformers import AutoTokenizer

    name = CLASSES[request["task"]]
    arguments = "".join(f", {key}={value!r}" for key, value in way.items())
    loaded = f"{name}.from_pretrained(bundle{arguments})"
    try:
        tokenizer = AutoTokenizer.from_pretrained(bundle)
        model = getattr(optimum.onnxruntime, name).from_pretrained(bundle, **way)
        texts = [request["texts"]] if request["pairs"] is None else [request["texts"], request["pairs"]]
        inputs = tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")
        outputs = {key: value for key, value in model(**inputs).items() if key in request["outputs"]}
    except Exception as error:
        return {"loaded": loaded, "error": f"{type(error).__name__}: {error}"}
    file = Path(model.path).resolve().relative_to(bundle.resolve()).as_posix()
    arrays = {"input_ids": inputs["input_ids"], **outputs}
    return {"loaded": loaded, "file": file, "arrays": {key: plain(value) for key, value in arrays.items()}}


def plain(tensor: Any) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "data": tensor.flatten().tolist()}


if __name__ == "__main__":
    main()
