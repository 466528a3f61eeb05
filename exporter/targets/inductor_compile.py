"""Compiling a `torch.export` program: ``python -P inductor_compile.py PROGRAM LISTING DEVICE SHAPES TUNED``."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOST_THREADS = 8
"""Processes that compile a GPU's kernels."""


def compile_program(
    program: Path,
    device: str = "cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    tuned_for: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """Compile a program with frozen weights, in memory of about twice their size.

    Args:
        program: The ``.pt2`` file of the program.
        device: ``"cpu"`` or ``"cuda"``; the program may have been traced on either.
        shapes: By input, the only shape to compile for; ``None``: all that the program takes.
        tuned_for: By input, the shape to choose kernels at, where all are compiled for; ``None``: that of the program's
            own example, which is small.

    Returns:
        The files that AOTInductor made, for `torch._inductor.package.package_aoti`.
    """
    import torch
    import torch.ao.quantization.fx._decomposed  # defines the operators of quantized programs

    loaded = torch.export.load(str(program))
    if loaded.example_inputs is None:
        raise ValueError(f"{program} carries no example inputs")
    if device != "cpu":
        from torch.export.passes import move_to_device_pass

        loaded = move_to_device_pass(loaded, f"{device}:0")  # with its number, as tensors there have it
    args, kwargs = loaded.example_inputs
    module = loaded.module(check_guards=False)
    if shapes is not None:
        kwargs, module = _traced_at(module, args, kwargs, shapes, None)
    elif tuned_for is not None:
        try:
            kwargs, module = _traced_at(module, args, kwargs, tuned_for, free_dimensions(loaded))
        except Exception as error:  # of tracing; the program as it is compiles too
            print(f"kernels are chosen at the example's shapes, since tracing at {dict(tuned_for)} fails: {error}")
    del loaded
    options: dict[str, Any] = {
        "aot_inductor.package": True,
        # Precompiled headers take as long to make as they save, and no other compilation finds them: each time 300 MB
        # would stay behind in the folder of temporary files.
        "aot_inductor.precompile_headers": False,
        "freezing": True,
        "compile_threads": 1,
    }
    if device != "cpu":
        options["compile_threads"] = min(MOST_THREADS, len(os.sched_getaffinity(0)))  # kernels are compiled one by one
        _time_kernels_alone()
    else:
        # With one graph alone, what that graph does not read nothing reads.
        alone = not any(isinstance(part, torch.fx.GraphModule) for part in module.modules() if part is not module)

        def tidied(graph: torch.fx.Graph) -> None:  # a function: copies of the options share it, and not all weights
            _merge_equal(graph)
            if alone:
                _drop_unread(graph, module)

        options["post_grad_custom_post_pass"] = tidied
    with torch.no_grad():
        files = torch._inductor.aot_compile(module, args, kwargs, options=options)
    return [str(file) for file in files]


def _traced_at(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Sequence[int]],
    free: dict[str, dict[int, Any] | None] | None,
) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Trace again with an example of other shapes; the example and what was traced."""
    import torch

    filled = {name: _filled(tensor, shapes[name]) for name, tensor in kwargs.items()}
    with torch.no_grad():
        traced = torch.export.export(module, args, filled, dynamic_shapes=free, strict=False)
    return filled, traced.module(check_guards=False)


def free_dimensions(program: torch.export.ExportedProgram) -> dict[str, dict[int, Any] | None]:
    """By input, the `torch.export.Dim` of each dimension that a program leaves free: one for all that are equal."""
    from torch.export import Dim

    given = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    dims: dict[str, Any] = {}
    found: dict[str, dict[int, Any] | None] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in given:
            continue
        found[node.name] = None
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                continue
            name, allowed = str(size.node.expr), program.range_constraints[size.node.expr]
            if name not in dims:
                dims[name] = Dim(name, min=int(allowed.lower), max=int(allowed.upper))
            found[node.name] = {**(found[node.name] or {}), axis: dims[name]}
    return found


def _time_kernels_alone() -> None:
    """Let one compilation at a time compare kernels by the clock: beside others it would choose by chance.

    Of those of this user on this machine. Where torch has changed, nothing happens.
    """
    from torch._inductor.runtime import triton_heuristics

    tuner: Any = getattr(triton_heuristics, "CachingAutotuner", None)
    compare = getattr(tuner, "benchmark_all_configs", None)
    if compare is None:
        return
    try:
        lock = (Path(tempfile.gettempdir()) / f"planish-kernels-{os.getuid()}.lock").open("a")
    except OSError:  # somebody else's, or nowhere to write: then by chance
        return

    def alone(*given: Any, **named: Any) -> Any:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return compare(*given, **named)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)

    tuner.benchmark_all_configs = alone


def _filled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example repeated, and cut, to a shape."""
    times = [-(-wanted // there) for wanted, there in zip(shape, tensor.shape, strict=True)]
    return tensor.repeat(times)[tuple(slice(0, wanted) for wanted in shape)].contiguous()


def _merge_equal(graph: torch.fx.Graph) -> None:
    """Read weights that are equal, byte by byte, from one place: layers that share theirs have one packed set too."""
    first: dict[Any, torch.fx.Node] = {}
    for node in list(graph.find_nodes(op="get_attr")):
        tensor = _constant(graph, node)
        if tensor is None:
            continue
        layout = (str(tensor.device), tensor.dtype, tuple(tensor.shape), tensor.layout)
        strides = () if tensor.is_mkldnn else tensor.stride()
        kept = first.setdefault((*layout, strides, hashlib.sha256(_bytes(tensor)).digest()), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _constant(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.Tensor | None:
    """The tensor that a node reads from the graph's module; ``None`` where it reads another thing."""
    import torch
    from torch._subclasses import FakeTensor

    value: Any = graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else None


def _bytes(tensor: torch.Tensor) -> memoryview:
    """What a tensor holds; of one that oneDNN has packed, in oneDNN's own layout."""
    import torch

    if tensor.is_mkldnn:
        begin, size = int(torch.ops.mkldnn.data_ptr(tensor)), int(torch.ops.mkldnn._nbytes(tensor))
        return memoryview((ctypes.c_uint8 * size).from_address(begin))
    held = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(held.view(torch.uint8).numpy() if held.numel() else b"")


def _drop_unread(graph: torch.fx.Graph, module: torch.nn.Module) -> None:
    """Let go of the weights that the frozen graph does not read, having packed copies of its own."""
    import torch
    from torch._subclasses import FakeTensor

    read = set()
    for node in graph.find_nodes(op="get_attr"):
        value = _constant(graph, node)
        if value is not None and not value.is_mkldnn:
            read.add(value.untyped_storage().data_ptr())
    for owner in (graph.owning_module, module):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if isinstance(tensor, FakeTensor) or tensor.is_mkldnn:
                continue
            if tensor.untyped_storage().data_ptr() not in read:
                tensor.data = torch.empty(0, dtype=tensor.dtype)


if __name__ == "__main__":
    made = compile_program(Path(sys.argv[1]), sys.argv[3], json.loads(sys.argv[4]), json.loads(sys.argv[5]))
    Path(sys.argv[2]).write_text(json.dumps(made), encoding="utf-8")
