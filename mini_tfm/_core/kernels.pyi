from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from mini_tfm import reference
from mini_tfm.reference import Block, BlockGrad

Real = NDArray[Any]  # float32 or float64; all of one dtype in one call
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
ActivationKind = Literal["relu", "gelu", "gelu_tanh", "silu"]

PackedDtype = Literal["float32", "float64", "bfloat16", "int8"]

class PackedWeight(reference.PackedWeight): ...

class Config(TypedDict):
    isa: str
    isas: list[str]
    isas_built: list[str]
    emulated: list[str]
    openmp: bool
    num_threads: int
    compiler: str | None

def gemm(
    a: Real,
    b: Real,
    *,
    trans_a: bool = False,
    trans_b: bool = False,
    out: Real | None = None,
    accumulate: bool = False,
    bias: Real | None = None,
    bfloat16: bool = False,
) -> Real: ...
def pack(
    weight: Real, *, dtype: PackedDtype = "float32", transposed: bool = False, gate: Real | None = None, group: int | None = None
) -> PackedWeight: ...
def packed_linear(
    x: Real,
    weight: reference.PackedWeight,
    bias: Real | None = None,
    *,
    gate_bias: Real | None = None,
    activation: ActivationKind | None = None,
    residual: Real | None = None,
    out: Real | None = None,
) -> Real: ...
def linear_top_k(x: Real, weight: reference.PackedWeight, k: int, bias: Real | None = None, *, lse: bool = False) -> tuple[Any, ...]: ...
def softmax(x: Real, *, out: Real | None = None) -> Real: ...
def softmax_backward(y: Real, dy: Real, *, out: Real | None = None) -> Real: ...
def log_softmax(x: Real, *, out: Real | None = None) -> Real: ...
def layer_norm(x: Real, weight: Real, bias: Real | None, eps: float, *, out: Real | None = None) -> tuple[Real, Real, Real]: ...
def layer_norm_backward(dy: Real, x: Real, weight: Real, mean: Real, rstd: Real, *, out: Real | None = None) -> tuple[Real, Real, Real]: ...
def rms_norm(x: Real, weight: Real, eps: float, *, out: Real | None = None) -> tuple[Real, Real]: ...
def rms_norm_backward(dy: Real, x: Real, weight: Real, rstd: Real, *, out: Real | None = None) -> tuple[Real, Real]: ...
def activation(x: Real, kind: ActivationKind, *, out: Real | None = None) -> Real: ...
def activation_backward(x: Real, dy: Real, kind: ActivationKind, *, out: Real | None = None) -> Real: ...
def dropout(x: Real, p: float, seed: int) -> Real: ...
def embedding(table: Real, ids: Integers) -> Real: ...
def embedding_backward(ids: Integers, dout: Real, dtable: Real) -> Real: ...
def sinusoidal_positions(n: int, d_model: int, dtype: Any = np.float32) -> Real: ...
def rotary(x: Real, positions: Integers, base: float = 10000.0, inverse: bool = False) -> Real: ...
def cross_entropy(logits: Real, targets: Integers, ignore_index: int = -100, label_smoothing: float = 0.0) -> tuple[Real, Real]: ...
def cross_entropy_backward(
    logits: Real, targets: Integers, lse: Real, dlosses: Real, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Real: ...
def linear_cross_entropy(
    x: Real,
    weight: Real,
    targets: Integers,
    *,
    bias: Real | None = None,
    transposed: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
    bfloat16: bool = False,
) -> tuple[Real, Real]: ...
def linear_cross_entropy_backward(
    x: Real,
    weight: Real,
    targets: Integers,
    lse: Real,
    dlosses: Real,
    dweight: Real | None = None,
    *,
    bias: Real | None = None,
    transposed: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk: int = 1024,
    bfloat16: bool = False,
) -> tuple[Real, Real | None, Real | None]: ...
def adamw(
    param: Real,
    grad: Real,
    m: Real,
    v: Real,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None: ...
def sum_of_squares(x: Real) -> float: ...
def search(
    queries: Real,
    bank: NDArray[Any],
    k: int,
    valid: Mask | None = None,
    *,
    scales: Real | None = None,
    codes: NDArray[np.uint8] | None = None,
) -> tuple[Real, Integers]: ...
def attention(q: Real, blocks: Sequence[Block], scale: float, *, dropout: float = 0.0, seed: int = 0) -> tuple[Real, Real]: ...
def attention_backward(
    dout: Real,
    out: Real,
    lse: Real,
    q: Real,
    blocks: Sequence[Block],
    scale: float,
    needs: Sequence[bool] | None = None,
    *,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[Real, list[BlockGrad]]: ...
def attention_mass(q: Real, block: Block, lse: Real, scale: float, asking: Mask) -> Real: ...
def _attention_at_once(q: Any, k: Any, v: Any, bias: Any, causal: Any, window: Any, lengths: Any, scale: Any) -> Real | None: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def show_config() -> Config: ...
def _set_default_threads(n: int) -> None: ...
def _after_fork() -> None: ...
def _choose_isa(name: str | None) -> bool: ...
