"""The models that `baselines.py` times: our own exports, and what other exporters make of the same original.

Each function is a job: it runs in a process of its own, takes one JSON dict and returns JSON-able data.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import Artifact, InputContract, Signature, Variant
from exporter.errors import RequestError
from pipelines.opening import open_variant, opening
from pipelines.processes import report_progress

if TYPE_CHECKING:
    from exporter.original import Original

TEXT_POINTS = ("1x16", "1x32", "1x128", "8x128")
OTHER_POINTS = ("1", "8")
TARGETS = ("onnxruntime-cpu", "openvino-cpu", "inductor-cpu")
ORT = Variant("onnxruntime-cpu", "fp32")


def reference(arguments: dict[str, Any]) -> dict[str, Any]:
    """Write the inputs of every operating point, and what the original makes of them.

    Args:
        arguments: ``original``, ``points`` (labels, or ``None`` for those that suit the model), ``seed``, ``folder``.

    Returns:
        By point, the paths of ``inputs`` and ``outputs`` (``.npz``).
    """
    from exporter.original import open_described
    from pipelines.recipe_sections import parse_point

    folder = Path(arguments["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    original = open_described(arguments["original"])
    named = {axis.name for axis in original.signature.axes}
    labels = arguments["points"] or (TEXT_POINTS if "sequence" in named else OTHER_POINTS)
    found: dict[str, Any] = {}
    for label in labels:
        batch, length = parse_point(label)
        rng = np.random.default_rng(arguments["seed"])
        inputs = make_inputs(original.signature, original.contract, {"batch": batch, "sequence": length}, rng)
        paths = {kind: folder / f"{label}-{kind}.npz" for kind in ("inputs", "outputs")}
        for kind, arrays in (("inputs", inputs), ("outputs", original.run(inputs))):
            np.savez(paths[kind], allow_pickle=False, **arrays)
        found[label] = {kind: str(path) for kind, path in paths.items()}
    return found


def make_inputs(
    signature: Signature, contract: InputContract, sizes: dict[str, int | None], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Random inputs of the given axis sizes: ids over their whole range, nothing masked, normal numbers elsewhere.

    Raises:
        RequestError: The model has a dynamic axis whose size was not given.
    """
    inputs: dict[str, np.ndarray] = {}
    for spec in signature.inputs:
        known = [sizes.get(dim) if isinstance(dim, str) else dim for dim in spec.shape]
        shape = tuple(size for size in known if size is not None)
        if len(shape) < len(known):
            raise RequestError("an operating point names no size for an axis", f"{spec.name}: {spec.shape}")
        if spec.name == contract.mask:
            inputs[spec.name] = np.ones(shape, spec.dtype)
        elif np.issubdtype(np.dtype(spec.dtype), np.integer):
            low, high = contract.id_ranges.get(spec.name, (0, 1))
            inputs[spec.name] = rng.integers(low, high, size=shape, endpoint=True).astype(spec.dtype)
            if spec.name == "token_type_ids":  # one text, as in most requests
                inputs[spec.name][:] = 0
        else:
            inputs[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    return inputs


def ours(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Export as Planish does, FP32 only: the portable graph, the fused one, and what each target builds of them.

    Args:
        arguments: ``original``, ``samples`` (paths of ``.npz`` inputs on which the passes are checked), ``folder``.
    """
    from exporter.onnx_export import export_onnx
    from exporter.original import open_described
    from exporter.passes import optimize
    from exporter.targets import get_target
    from exporter.torch_export import export_program

    folder = Path(arguments["folder"])
    original = open_described(arguments["original"])
    samples = [_load(path) for path in arguments["samples"]]
    report_progress("exporting to ONNX")
    raw = export_onnx(original, folder / "raw")
    made: dict[str, Artifact] = {}
    for ingredient, fuse in (("onnx-fp32", False), ("onnx-fp32-fused", True)):
        report_progress(f"graph passes: {ingredient}")
        path = folder / ingredient / "model.onnx"
        optimize(raw.path, path, contract=original.contract, samples=samples, fuse=fuse)
        made[ingredient] = Artifact(path, "onnx", original.signature, original.contract)
    report_progress("exporting to torch.export")
    made["pt2-fp32"] = export_program(original, folder / "program")
    found = []
    for name in TARGETS:
        target = get_target(name)
        for variant in target.variants(("fp32",)):
            if not target.availability(variant).available:
                continue
            report_progress(f"building {variant.id}")
            out = folder / variant.id
            out.mkdir()
            found.append(_built(target, variant, made[target.ingredient(variant)], out))
    return found


def torch_onnx(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `torch.onnx.export` gives with its own defaults, dynamic axes apart.

    Args:
        arguments: ``original``, ``name``, ``folder``.
    """
    import torch

    from exporter.onnx_export import dynamic_shapes
    from exporter.original import open_described

    original = open_described(arguments["original"])
    path = _fresh(arguments["folder"])
    with torch.no_grad():
        program = torch.onnx.export(
            original.module,
            kwargs=dict(original.example),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(original.signature),
            input_names=[spec.name for spec in original.signature.inputs],
            output_names=[spec.name for spec in original.signature.outputs],
        )
    program.save(str(path), external_data=True)
    return _opened(arguments["name"], original, path)


def transformers_onnx(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `transformers.exporters` gives with its own fusions for ONNX Runtime's CPU provider.

    Args:
        arguments: ``original``, ``name``, ``folder``.

    Raises:
        RequestError: The original is none of transformers' models.
    """
    from transformers import PreTrainedModel
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from exporter.onnx_export import dynamic_shapes
    from exporter.original import open_described

    original = open_described(arguments["original"])
    if not isinstance(original.module, PreTrainedModel):
        raise RequestError("transformers.exporters takes transformers' own models only", arguments["original"]["task"])
    path = _fresh(arguments["folder"])
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=dynamic_shapes(original.signature),
        ort_fusions="cpu",
    )
    exported = OnnxExporter().export(original.module, dict(original.example), config=config)
    exported.save_pretrained(str(path.parent))
    return _opened(arguments["name"], original, path)


def onnxruntime_dynamic(arguments: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime's own dynamic quantization makes of an FP32 graph, with its defaults.

    Args:
        arguments: ``artifact``, ``name``, ``folder``.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    artifact = Artifact.from_dict(arguments["artifact"])
    path = _fresh(arguments["folder"])
    # Embeddings stay FP32, as in ours and in optimum's form; it wants a type for what has none recorded: float.
    quantize_dynamic(
        artifact.path,
        path,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": 1},
    )
    made = Artifact(path, "onnx", artifact.signature, artifact.contract)
    variant = Variant("onnxruntime-cpu", "int8", "dynamic")
    return {"name": arguments["name"], "opening": opening(variant, made), "files": [str(path)]}


def error_of(arguments: dict[str, Any]) -> dict[str, float]:
    """How far a session is from the original: by point, the largest RMS relative error of any output.

    Args:
        arguments: ``opening`` (see `pipelines.opening.open_variant`), ``threads``, ``points`` (as `reference` gave).
    """
    from pipelines.verification.parity import compare

    session = open_variant(arguments["opening"], threads=arguments["threads"])
    found = {}
    for label, paths in arguments["points"].items():
        errors = compare(_load(paths["outputs"]), session.run(_load(paths["inputs"])))
        found[label] = max(error.rms_relative for error in errors.values())
    return found


def _built(target: Any, variant: Variant, artifact: Artifact, folder: Path) -> dict[str, Any]:
    from exporter.digests import file_digest

    files = target.build(artifact, variant, folder) or [artifact.path]
    opened = Artifact(files[0], artifact.format, artifact.signature, artifact.contract)
    trusted = frozenset() if target.portable else frozenset({file_digest(files[0])})  # built here, a moment ago
    return {"name": variant.id, "opening": opening(variant, opened, trusted), "files": [str(path) for path in files]}


def _opened(name: str, original: Original, path: Path) -> dict[str, Any]:
    import onnx

    artifact = Artifact(path, "onnx", original.signature, original.contract)
    opsets = {
        entry.domain or "ai.onnx": entry.version for entry in onnx.load(path, load_external_data=False).opset_import
    }
    files = [str(path), *(str(file) for file in sorted(path.parent.glob(f"{path.name}?*")))]
    return {"name": name, "opening": opening(ORT, artifact), "files": files, "opsets": opsets}


def _fresh(folder: str) -> Path:
    Path(folder).mkdir(parents=True)
    return Path(folder) / "model.onnx"


def _load(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
