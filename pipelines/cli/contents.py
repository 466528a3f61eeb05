"""What is inside a bundle, an ONNX model, a model folder or a program, as plain data.

Nothing of what is inside runs, except a factory, which is how such a source is looked at.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import RequestError

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.sources import Source
    from pipelines.bundle import Bundle

_CONFIG_KEYS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "image_size", "num_labels",
)  # fmt: skip


def describe_bundle(folder: Path) -> dict[str, Any]:
    """A bundle, from its manifest and its report. Digests are not checked; missing files and wrong sizes are named.

    Raises:
        RequestError: It is no bundle, or its manifest is broken.
    """
    from pipelines.bundle import read_bundle

    bundle = read_bundle(folder)
    manifest = bundle.manifest
    files = {name: _file(bundle, name) for name in manifest.files}
    plain = manifest.model_dump(mode="json")
    report = _json_file(bundle.path / "report.json")
    variants = []
    for variant in plain["variants"]:
        own = [files.get(name) or _file(bundle, name) for name in variant["files"]]
        variants.append({**variant, "files": own, "bytes": sum(file["bytes"] for file in own)})
    return {
        "kind": "bundle",
        "path": str(folder),
        **{key: plain[key] for key in ("name", "task", "created", "planish_version", "source")},
        "verdict": _verdict(bundle, report),
        "selected": plain["selected"],
        "compression": plain["compression"],
        "latency": {"points": bundle.points, "baseline": _baseline(report)},
        "variants": variants,
        "input_contract": plain["input_contract"],
        "environment": plain["environment"],
        "files": len(files),
        "bytes": sum(file["bytes"] for file in files.values()),
        "problems": [f"{file['path']}: {file['state']}" for file in files.values() if file["state"] != "present"],
    }


def describe_onnx(path: Path) -> dict[str, Any]:
    """An ONNX model, read without its external weights.

    ``parameters`` and ``weight_bytes`` are over all initializers; a tensor that several names share counts once.

    Raises:
        RequestError: It is missing, truncated or damaged, or its external data is.
    """
    import onnx_ir as ir

    from exporter.onnx_files import load_model, weight_bytes

    model = load_model(path)
    tensors = {
        id(value.const_value): value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    }
    weights: dict[str, dict[str, int]] = {}
    for tensor in tensors.values():
        entry = weights.setdefault(dtype_name(tensor.dtype), {"tensors": 0, "elements": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["elements"] += tensor.size
        entry["bytes"] += tensor.nbytes
    external = sorted({Path(t.path) for t in tensors.values() if isinstance(t, ir.ExternalTensor)})
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for graph in model.graphs()
        for node in graph
    )
    initializers = set(model.graph.initializers)
    return {
        "kind": "onnx",
        "path": str(path),
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in sorted(model.opset_imports.items())},
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "inputs": [_value(value) for value in model.graph.inputs if value.name not in initializers],
        "outputs": [_value(value) for value in model.graph.outputs],
        "axes": _axes([*model.graph.inputs, *model.graph.outputs]),
        "nodes": sum(operators.values()),
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "functions": len(model.functions),
        "parameters": sum(entry["elements"] for entry in weights.values()),
        "weight_bytes": weight_bytes(model),
        "weights": dict(sorted(weights.items(), key=lambda item: -item[1]["bytes"])),
        "external_data": [{"path": str(file), "bytes": file.stat().st_size} for file in external],
    }


def describe_source(source: Source) -> dict[str, Any]:
    """A model folder or a factory: task, architecture, size, files, digest and licence."""
    from exporter.sources.weights import stored_dtypes
    from exporter.tasks import infer_task

    config = source.json("config.json") or {}
    try:
        task, why = infer_task(source).name, ""
    except RequestError as error:
        task, why = None, str(error)
    return {
        "kind": "model",
        "source": source.kind,
        "spec": source.spec,
        "path": None if source.path is None else str(source.path),
        "name": source.name,
        "task": task,
        "task_reason": why,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures") or [],
        "config": {key: config[key] for key in _CONFIG_KEYS if config.get(key) is not None},
        "parameters": source.parameters,
        "weights_bytes": source.weights_bytes,
        "weights_dtypes": stored_dtypes(source.path, source.weights),
        "pickled": source.pickled,
        "files": _source_files(source),
        "digest": source.digest,
        "licence": source.licence,
    }


def describe_program(path: Path) -> dict[str, Any]:
    """A ``.pt2`` file. It is code, so only the names in its archive are read.

    Raises:
        RequestError: It is missing or no archive.
    """
    from exporter.digests import file_digest

    if not path.is_file():
        raise RequestError("there is no such file", path, "Check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise RequestError("the .pt2 file is truncated or no program archive", path, "Export it again") from error
    compiled = any("/aotinductor/" in name for name in names)
    return {
        "kind": "program",
        "path": str(path),
        "contents": "AOTInductor package (native code)" if compiled else "torch.export program",
        "is_code": True,
        "bytes": path.stat().st_size,
        "entries": len(names),
        "digest": f"sha256:{file_digest(path)}",
        "fingerprint": _json_file(path.parent / "fingerprint.json") if compiled else None,
    }


def dtype_name(dtype: ir.DataType) -> str:
    """NumPy's name of an ONNX element type where it has one (``float32``), else ONNX's in lower case."""
    try:
        name = str(dtype.numpy().name)
    except TypeError:
        return str(dtype.name).lower()
    return str(dtype.name).lower() if name == "object" else name


def _value(value: ir.Value) -> dict[str, Any]:
    dtype = None if value.dtype is None else dtype_name(value.dtype)
    return {"name": value.name, "dtype": dtype, "shape": _shape(value)}


def _shape(value: ir.Value) -> list[int | str | None] | None:
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _axes(values: list[ir.Value]) -> dict[str, list[str]]:
    """Named dynamic axes and where they occur, as ``input_ids[0]``."""
    axes: dict[str, list[str]] = {}
    for value in values:
        for index, dim in enumerate(_shape(value) or []):
            if isinstance(dim, str):
                axes.setdefault(dim, []).append(f"{value.name}[{index}]")
    return axes


def _file(bundle: Bundle, name: str) -> dict[str, Any]:
    from pipelines.manifest import is_safe_name

    entry = bundle.manifest.files.get(name)
    if entry is None:
        return {"path": name, "bytes": 0, "state": "not listed in the manifest"}
    path = bundle.path / name
    if not is_safe_name(name):
        state = "no name of a file inside the bundle"
    elif not path.is_file():
        state = "missing"
    elif path.stat().st_size != entry.bytes:
        state = f"{path.stat().st_size} bytes instead of {entry.bytes}"
    else:
        state = "present"
    return {"path": name, "bytes": entry.bytes, "state": state}


def _verdict(bundle: Bundle, report: Any) -> dict[str, Any]:
    """The verdict of the run as its report gives it, or what the manifest's selection says."""
    from pipelines.report.compression import CompressionView

    verdict = report.get("verdict") if isinstance(report, dict) else None
    if isinstance(verdict, dict) and isinstance(verdict.get("sentence"), str):
        return {"ok": verdict.get("ok") is True, "sentence": verdict["sentence"]}
    chosen, compression = bundle.manifest.selected.get("overall"), bundle.manifest.compression
    if compression is not None:
        told = CompressionView(compression, (), chosen)
        return {"ok": chosen is not None and not told.failed, "sentence": told.sentence()}
    sentence = "No variant passed its gates" if chosen is None else f"{chosen} was selected"
    return {"ok": chosen is not None, "sentence": sentence}


def _baseline(report: Any) -> str | None:
    """What speed-ups are over, as its report says."""
    from pipelines.report.formats import dig

    baseline = dig(report, "latency", "baseline")
    return baseline if isinstance(baseline, str) else None


def _source_files(source: Source) -> list[dict[str, Any]]:
    root = source.path
    if root is None:
        return []
    names = (*source.weights, *source.files)
    return [{"path": name, "bytes": (root / name).stat().st_size, "weights": name in source.weights} for name in names]


def _json_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
