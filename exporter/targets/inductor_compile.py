"""Compiling a `torch.export` program: ``python -P inductor_compile.py PROGRAM LISTING DEVICE SHAPES``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOST_THREADS = 8
"""Processes that compile a GPU's kernels."""


def compile_program(program: Path, device: str = "cpu", shapes: Mapping[str, Sequence[int]] | None = None) -> list[str]:
    """Compile a program with frozen weights, in memory of about twice their size.

    Args:
        program: The ``.pt2`` file of the program.
        device: ``"cpu"`` or ``"cuda"``; the program may have been traced on either.
        shapes: By input, the only shape to compile for; ``None``: all that the program takes.

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
    del loaded
    if shapes is not None:
        kwargs = {name: _filled(tensor, shapes[name]) for name, tensor in kwargs.items()}
        with torch.no_grad():
            module = torch.export.export(module, args, kwargs, strict=False).module(check_guards=False)
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
    elif not any(isinstance(part, torch.fx.GraphModule) for part in module.modules() if part is not module):
        # With one graph alone, what that graph does not read nothing reads. (A function, which copies of the options
        # share: a `functools.partial` would be copied with all weights.)
        options["post_grad_custom_post_pass"] = lambda graph: _drop_unread(graph, module)
    with torch.no_grad():
        files = torch._inductor.aot_compile(module, args, kwargs, options=options)
    return [str(file) for file in files]


def _filled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The example repeated, and cut, to a shape."""
    times = [-(-wanted // there) for wanted, there in zip(shape, tensor.shape, strict=True)]
    return tensor.repeat(times)[tuple(slice(0, wanted) for wanted in shape)].contiguous()


def _drop_unread(graph: torch.fx.Graph, module: torch.nn.Module) -> None:
    """Let go of the weights that the frozen graph does not read, having packed copies of its own."""
    import torch
    from torch._subclasses import FakeTensor

    frozen = graph.owning_module
    read = set()
    for node in graph.find_nodes(op="get_attr"):
        value: Any = frozen
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, torch.Tensor) and not value.is_mkldnn:
            read.add(value.untyped_storage().data_ptr())
    for owner in (frozen, module):
        for tensor in (*owner.parameters(), *owner.buffers()):
            if isinstance(tensor, FakeTensor) or tensor.is_mkldnn:
                continue
            if tensor.untyped_storage().data_ptr() not in read:
                tensor.data = torch.empty(0, dtype=tensor.dtype)


if __name__ == "__main__":
    made = compile_program(Path(sys.argv[1]), sys.argv[3], json.loads(sys.argv[4]))
    Path(sys.argv[2]).write_text(json.dumps(made), encoding="utf-8")
