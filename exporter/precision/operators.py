"""Groups of ONNX operators that precision rules speak of."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVEMENT = _names(
    "Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape ScatterElements ScatterND "
    "Slice SpaceToDepth Split Squeeze Tile Transpose Trilu Unsqueeze Where"
)
"""Operators that move or select values and compute nothing."""

ELEMENTWISE = _names("Abs Add Clip Div Max Min Mul Neg Pow Reciprocal Relu Sqrt Sub Sum")
"""Element-by-element arithmetic, through which a range or a statistic travels on."""

CONTRACTIONS = _names("Attention Conv ConvTranspose DeformConv Einsum Gemm GRU LSTM MatMul MatMulNBits RNN")
"""Operators whose work grows faster than their data: half precision pays here, whatever surrounds them."""

NORMALIZATIONS = _names(
    "GroupNormalization InstanceNormalization LayerNormalization LpNormalization LRN MeanVarianceNormalization "
    "RMSNormalization SimplifiedLayerNormalization"
)
"""Operators that divide by a norm or a standard deviation."""

SOFTMAXES = _names("LogSoftmax Softmax")

SUMS = _names(
    "AveragePool CumSum DFT GlobalAveragePool GlobalLpPool LpPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
    "ReduceMean ReduceProd ReduceSum ReduceSumSquare STFT"
)
"""Operators that add up or multiply many elements."""

SQUARING_SUMS = _names("GlobalLpPool LpPool ReduceL2 ReduceLogSumExp ReduceProd ReduceSumSquare")
"""Sums whose summands have a larger range than the input."""

STEEP = _names("Acos Acosh Asin Asinh Atan Atanh Cos Cosh Det Exp Log Pow Reciprocal Sin Sinh Softplus Tan")
"""Functions that magnify the rounding error of their input, or whose result leaves its range."""

COORDINATES = _names("AffineGrid GridSample MaxRoiPool NonMaxSuppression RoiAlign RotaryEmbedding")
"""Operators that take positions as floats."""

BOUNDED = _names("Cos Erf HardSigmoid Sigmoid Sin Softmax Softsign Tanh")
"""Functions whose results are small, however large their inputs."""
