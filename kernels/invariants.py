"""Invariant products of weights: K x K matrices M = P Qᵀ given by thin factors, their correlations, and sketches of them.

With X the embedding rows of K tokens and W chains of a layer's weights, M = X W Xᵀ does not change when heads, neurons or hidden
dimensions are permuted or mixed. Two checkpoints are compared by the Pearson correlation of their M over all n = K² entries,

    corr = (<A, B> - sA sB / n) / sqrt((|A|² - sA² / n)(|B|² - sB² / n)),      A = P_A Q_Aᵀ,  B = P_B Q_Bᵀ

and needs five sums only. Three exact ways to them:

    factor   sA = (1ᵀP_A)(Q_Aᵀ1),  <A, B> = Σ (P_Aᵀ P_B) ⊙ (Q_Aᵀ Q_B)        2 K (R_A + R_B)² flops, nothing of size K²
    stream   both products tile by tile, sums taken, tile dropped              2 K² (R_A + R_B) flops, nothing of size K²
    direct   both products stored, then summed                                 2 K² (R_A + R_B) flops, 2 K² elements

What is never materialised by the first two: at K = 4096 six channels of two models are 805 MB in float32; the factors of SmolLM2 are 75 MB.
Bound: FLOPs, min over the algorithms of the counts above divided by the machine's GEMM rate; `plan_sums` prints the choice and why.
Zeng et al.: HuRef, NeurIPS 2024, arXiv 2312.04828. TensorSketch: Pham and Pagh, KDD 2013.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from llmcore.kernels import backends
from llmcore.kernels.invariants_plan import ALGORITHMS, SumsPlan, plan_sums, tile_work

# K tokens, R depth of a product (R_A, R_B may differ), b width of a sketch, n = K² entries

__all__ = ["ALGORITHMS", "InvariantSums", "SumsPlan", "invariant_correlation", "invariant_matrix", "invariant_matrix_reference",
           "invariant_sums", "invariant_sums_reference", "measure_rates", "permuted_dots", "plan_sums", "sketch_scores", "stored_sums",
           "tensor_sketch", "tensor_sketch_reference"]

backends.declare("invariants", torch=None, cpp="llmcore::invariants_tile_sums", triton=None)


@dataclasses.dataclass(frozen=True)
class InvariantSums:
    """Sums over the n entries of A and B, float64: ΣA, ΣB, ΣA², ΣB², ΣAB."""

    sum_a: float
    sum_b: float
    dot_aa: float
    dot_bb: float
    dot_ab: float
    n: int

    def correlation(self, normalize: str = "channel") -> float:
        """Pearson correlation ("channel") or plain cosine ("none"); NaN when A or B is constant (zero), where neither exists."""
        if normalize not in ("channel", "none"):
            raise ValueError(f"normalize must be 'channel' or 'none', got {normalize!r}")
        centre = 1.0 / self.n if normalize == "channel" and self.n else 0.0
        square_a = self.dot_aa - centre * self.sum_a**2
        square_b = self.dot_bb - centre * self.sum_b**2
        # Below this share of the uncentred square only rounding of the products is left: the matrix is constant.
        if not (square_a > 1e-10 * self.dot_aa and square_b > 1e-10 * self.dot_bb):
            return math.nan
        return (self.dot_ab - centre * self.sum_a * self.sum_b) / math.sqrt(square_a) / math.sqrt(square_b)


def invariant_matrix_reference(left: torch.Tensor, right: torch.Tensor, *, standardize: bool = False) -> torch.Tensor:
    """(K, K) left rightᵀ; standardised: minus its mean, divided by its standard deviation (n - 1) over all entries."""
    product = left @ right.mT
    return (product - product.mean()) / product.std() if standardize else product


def invariant_sums_reference(left_a: torch.Tensor, right_a: torch.Tensor, left_b: torch.Tensor, right_b: torch.Tensor) -> InvariantSums:
    """The five sums from both stored matrices."""
    a, b = (left_a @ right_a.mT).double(), (left_b @ right_b.mT).double()
    return InvariantSums(*(x.sum().item() for x in (a, b, a * a, b * b, a * b)), n=a.numel())


def tensor_sketch_reference(left: torch.Tensor, right: torch.Tensor, *, width: int, seed: int, center: bool = True,
                            normalize: bool = True) -> torch.Tensor:
    """(b,) entry (i, j) of M, times s(i) s'(j), added into bin (h(i) + h'(j)) mod b. Forms M and a K² index: for reading and testing."""
    (rows, row_signs), (columns, column_signs) = _hashes(left.shape[0], width, seed)
    product = (left @ right.mT).double()
    mean = product.mean() if center else 0.0
    product = (product - mean) * row_signs.double().to(left.device)[:, None] * column_signs.double().to(left.device)[None, :]
    bins = (rows[:, None] + columns[None, :]).remainder(width).to(left.device)
    sketch = torch.zeros(width, dtype=torch.float64, device=left.device).index_add_(0, bins.flatten(), product.flatten())
    return _unit(sketch, normalize, abs(float(mean)) * left.shape[0]).to(left.dtype)


# From the reference to the kernels. Σ_ij A_ij B_ij with A_ij = Σ_r P_ir Q_jr and B_ij = Σ_s U_is V_js is, with the sums exchanged,
# Σ_rs (Σ_i P_ir U_is)(Σ_j Q_jr V_js): again the five sums of a pair of products, of the transposed factors, and of size R_A x R_B. One tile
# kernel with two accumulators therefore serves both algorithms; for |A|² the pair is symmetric and half of the tiles suffices.
# Invariant: after tile t the partial sums of tile t hold its entries and no others; they are added in tile order, in float64.


def _pair_torch(a_left: torch.Tensor, a_right: torch.Tensor, b_left: torch.Tensor, b_right: torch.Tensor, block: int = 512) -> torch.Tensor:
    """(5,) float64 sums over a_left a_rightᵀ and b_left b_rightᵀ, `block` rows at a time: 2 · block · n elements, widened."""
    total = torch.zeros(5, dtype=torch.float64, device=a_left.device)
    for start in range(0, a_left.shape[0], block):
        a = (a_left[start:start + block] @ a_right.mT).double()
        b = (b_left[start:start + block] @ b_right.mT).double()
        total += torch.stack([a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()])
    return total


def _pair(a_left: torch.Tensor, a_right: torch.Tensor, b_left: torch.Tensor, b_right: torch.Tensor, symmetric: bool,
          backend: str) -> torch.Tensor:
    if backend == "cpp":
        return torch.ops.llmcore.invariants_tile_sums(a_left, a_right, b_left, b_right, symmetric)
    if backend == "triton":
        from llmcore.kernels import invariants_triton

        return invariants_triton.tile_sums(a_left, a_right, b_left, b_right)
    return _pair_torch(a_left, a_right, b_left, b_right)


def _operator(name: str, function: Callable) -> Any:
    """Register `function` as an operator for tracing and autograd. Plain calls go to the function itself: the first call of such an
    operator loads the compiler, 150 MB and two seconds that a comparison of two files does not need."""
    return torch.library.custom_op(name, function, mutates_args=())


def _traced(*tensors: torch.Tensor) -> bool:
    """Whether a call has to go through the registered operator: under torch.compile, or when a gradient is wanted."""
    return torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def stored_sums(a: torch.Tensor, b: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """(5,) float64: Σa, Σb, Σa², Σb², Σab over two stored tensors of one shape and dtype, without float64 copies of them."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(f"b must be {tuple(a.shape)} of {a.dtype} on {a.device} like a, got {tuple(b.shape)} of {b.dtype} on {b.device}")
    chosen = _serve(backend, a)
    a, b = _widen(chosen, a.contiguous(), b.contiguous())
    if chosen == "cpp":
        return torch.ops.llmcore.invariants_pair_sums(a, b)
    if chosen == "triton":
        from llmcore.kernels import invariants_triton

        return invariants_triton.stored_sums(a, b)
    block = a.numel() if chosen == "reference" else 1 << 20
    total = torch.zeros(5, dtype=torch.float64, device=a.device)
    for x, y in zip(a.reshape(-1).split(max(1, block)), b.reshape(-1).split(max(1, block)), strict=True):
        x, y = x.double(), y.double()
        total += torch.stack([x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()])
    return total


def _direct(left_a: torch.Tensor, right_a: torch.Tensor, left_b: torch.Tensor, right_b: torch.Tensor, backend: str) -> torch.Tensor:
    return stored_sums(left_a @ right_a.mT, left_b @ right_b.mT, backend=backend)


_MAX_CANCELLATION = 16.0


def _cancellation(gram_sums: torch.Tensor) -> float:
    """|PᵀP| |QᵀQ| / Σ PᵀP ⊙ QᵀQ: how many times larger than M's own the rounding of the Gram matrices weighs in |M|².

    Near 1 for well-conditioned factors. A mixing P -> P C, Q -> Q C⁻ᵀ with a badly conditioned C leaves M alone and squares its condition
    number in here; such factors are summed in float64, which costs twice the time and stays exact.
    """
    return float((gram_sums[2] * gram_sums[3]).sqrt() / gram_sums[4].abs().clamp_min(torch.finfo(torch.float64).tiny))


def _sums(left_a: torch.Tensor, right_a: torch.Tensor, left_b: torch.Tensor, right_b: torch.Tensor, algorithm: str,
             backend: str) -> torch.Tensor:
    """(5,) float64, in the order of InvariantSums."""
    if algorithm == "stream":
        return _pair(left_a, right_a, left_b, right_b, False, backend)
    if algorithm == "direct":
        return _direct(left_a, right_a, left_b, right_b, backend)
    square_a = _pair(left_a.mT, left_a.mT, right_a.mT, right_a.mT, True, backend)
    square_b = _pair(left_b.mT, left_b.mT, right_b.mT, right_b.mT, True, backend)
    if left_a.dtype != torch.float64 and max(_cancellation(square_a), _cancellation(square_b)) > _MAX_CANCELLATION:
        wide = [t.double() for t in (left_a, right_a, left_b, right_b)]
        return _sums(*wide, algorithm, "torch" if backend == "triton" else backend)
    dot_aa, dot_bb = square_a[4], square_b[4]
    dot_ab = _pair(left_a.mT, left_b.mT, right_a.mT, right_b.mT, False, backend)[4]
    sum_a = left_a.double().sum(0) @ right_a.double().sum(0)
    sum_b = left_b.double().sum(0) @ right_b.double().sum(0)
    return torch.stack([sum_a, sum_b, dot_aa, dot_bb, dot_ab])


_sums_op = _operator("llmcore::invariant_sums", _sums)


@_sums_op.register_fake
def _(left_a, right_a, left_b, right_b, algorithm, backend):
    return left_a.new_empty(5, dtype=torch.float64)


def _product(left: torch.Tensor, right: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype,
                backend: str) -> torch.Tensor:
    """(K, K) of out_dtype: (left rightᵀ - mean) · scale, written once. mean, scale: scalars of float64."""
    out = left.new_empty(left.shape[0], right.shape[0], dtype=out_dtype)
    if backend == "triton":
        from llmcore.kernels import invariants_triton

        invariants_triton.product(left, right, mean, scale, out)
        return out
    block = max(1, left.shape[0]) if out_dtype == left.dtype else 512  # a narrower output never has a whole wide copy beside it
    for start in range(0, left.shape[0], block):
        rows = left[start:start + block]
        if backend == "cpp":
            part = torch.ops.llmcore.invariants_product(rows, right, mean.item(), scale.item())
        else:
            part = (rows @ right.mT).sub_(mean.to(left.dtype)).mul_(scale.to(left.dtype))
        if block == left.shape[0]:
            return part
        out[start:start + block] = part
    return out


_product_op = _operator("llmcore::invariant_product", _product)


@_product_op.register_fake
def _(left, right, mean, scale, out_dtype, backend):
    return left.new_empty(left.shape[0], right.shape[0], dtype=out_dtype)


def _product_setup(ctx, inputs, output):
    left, right, mean, scale, _, _ = inputs
    ctx.save_for_backward(left, right, mean, scale)


def _product_backward(ctx, grad):
    # out = (L Rᵀ - m) s:  dL = s G R,  dR = s Gᵀ L,  dm = -s ΣG,  ds = <G, L Rᵀ> - m ΣG, with <G, L Rᵀ> = Σ (G R) ⊙ L.
    left, right, mean, scale = ctx.saved_tensors
    grad = grad.to(left.dtype)
    pulled = grad @ right
    grad_right = (grad.mT @ left) * scale.to(left.dtype) if ctx.needs_input_grad[1] else None
    total = grad.sum(dtype=torch.float64)
    grad_scale = (pulled.double() * left.double()).sum() - mean * total
    return pulled * scale.to(left.dtype), grad_right, -scale * total, grad_scale, None, None


_product_op.register_autograd(_product_backward, setup_context=_product_setup)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 bit patterns: the same bits on every device and version."""
    def shift(x: torch.Tensor, bits: int) -> torch.Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic

    values = (values ^ shift(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ shift(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ shift(values, 31)


@functools.lru_cache(maxsize=16)
def _hashes(num_rows: int, width: int, seed: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Two independent (bins (K,) int64, signs (K,) float32) of the row numbers, pure functions of (row, width, seed)."""
    index = torch.arange(num_rows, dtype=torch.int64)
    golden = -0x61C8864680B583EB
    pairs = []
    for side in range(2):
        base = _mix(torch.tensor([(seed ^ (side + 1) * 0x5851F42D4C957F2D) % 2**64 - 2**63], dtype=torch.int64))
        bits = _mix(base + (index + 1) * golden)
        # The low 32 bits choose the bin, bit 62 the sign.
        pairs.append(((((bits & 0xFFFFFFFF) * width) >> 32), ((bits >> 62) & 1).float() * 2 - 1))
    return pairs[0], pairs[1]


def _count_sketch(rows: torch.Tensor, bins: torch.Tensor, signs: torch.Tensor, width: int, backend: str) -> torch.Tensor:
    """(b, R): row k, times its sign, added into its bin."""
    if backend == "cpp":
        return torch.ops.llmcore.invariants_count_sketch(rows, bins, signs.to(rows.dtype), width)
    if backend == "triton":
        from llmcore.kernels import invariants_triton

        return invariants_triton.count_sketch(rows, bins, signs, width)
    signed = rows * signs.to(rows)[:, None]
    return torch.zeros(width, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, bins.to(rows.device), signed)


def _unit(sketch: torch.Tensor, normalize: bool, mean_norm: torch.Tensor | float) -> torch.Tensor:
    """Scaled to norm 1. What is below 1e-6 of the norm of the subtracted mean is its rounding: a constant matrix has a zero sketch."""
    norm = sketch.norm()
    unit = sketch / norm.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.where(norm > 1e-6 * mean_norm, unit, 0.0) if normalize else sketch


def _sketch(left: torch.Tensor, right: torch.Tensor, width: int, seed: int, center: bool, normalize: bool, backend: str) -> torch.Tensor:
    # The sketch of p qᵀ is the circular convolution of the count sketches of p and q; of a sum over r, the sum of the convolutions.
    (bins, signs), (column_bins, column_signs) = _hashes(left.shape[0], width, seed)
    spectrum = torch.zeros(width // 2 + 1, dtype=torch.complex128, device=left.device)
    for start in range(0, left.shape[1], 256):  # columns at a time: the spectra take 2 · (b/2 + 1) · 256 complex numbers
        p = _count_sketch(left[:, start:start + 256].contiguous(), bins, signs, width, backend)
        q = _count_sketch(right[:, start:start + 256].contiguous(), column_bins, column_signs, width, backend)
        wide = torch.complex64 if left.dtype == torch.float32 else torch.complex128
        spectrum += (torch.fft.rfft(p.mT.contiguous()).to(wide) * torch.fft.rfft(q.mT.contiguous())).sum(0)
    mean = torch.zeros((), dtype=torch.float64, device=left.device)
    if center and left.shape[0]:
        mean = (left.double().sum(0) @ right.double().sum(0)) / left.shape[0] ** 2
        ones = [torch.zeros(width, dtype=torch.float64).index_add_(0, b, s.double()).to(left.device)
                for b, s in ((bins, signs), (column_bins, column_signs))]
        spectrum -= mean * torch.fft.rfft(ones[0]) * torch.fft.rfft(ones[1])
    return _unit(torch.fft.irfft(spectrum, n=width), normalize, mean.abs() * left.shape[0]).to(left.dtype)


_sketch_op = _operator("llmcore::tensor_sketch", _sketch)


@_sketch_op.register_fake
def _(left, right, width, seed, center, normalize, backend):
    return left.new_empty(width)


def _check_pair(left: torch.Tensor, right: torch.Tensor, left_name: str, right_name: str) -> None:
    for tensor, name in ((left, left_name), (right, right_name)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor (K, R), got {type(tensor).__name__}")
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor (K, R), got {tuple(tensor.shape)} of {tensor.dtype}")
    if left.shape != right.shape:
        raise ValueError(f"{right_name} must be {tuple(left.shape)} to match {left_name}, got {tuple(right.shape)}")
    if left.dtype != right.dtype or left.device != right.device:
        raise ValueError(f"{right_name} must have {left_name}'s dtype and device ({left.dtype}, {left.device}), "
                         f"got {right.dtype}, {right.device}")


def _serve(backend: str, tensor: torch.Tensor) -> str:
    refused = {}
    if tensor.dtype == torch.float64:
        refused["triton"] = "its products accumulate in float32; use another backend for float64"
    return backends.choose("invariants", backend, tensor.device, refused)


def _widen(chosen: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Half-precision factors become float32 (exactly) where the backend does not take them as they are: M is never rounded to 16 bits."""
    if chosen == "triton":
        return list(tensors)
    return [tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor for tensor in tensors]


def invariant_matrix(left: torch.Tensor, right: torch.Tensor, *, standardize: bool = False, out_dtype: torch.dtype | None = None,
                     backend: str = "auto") -> torch.Tensor:
    """The matrix M = left rightᵀ, (K, K), standardised over its entries on request; written once. Differentiable in both factors.

    standardize: (M - mean) / std with the n - 1 standard deviation over all n = K² entries. Mean and |M|² come from the factors before the
    product is formed (mean = (1ᵀP)(Qᵀ1) / n, |M|² = Σ PᵀP ⊙ QᵀQ), so M is not read again.

    Args:
        left, right: (K, R), one floating-point dtype and device; half precision is multiplied with float32 accumulation.
        out_dtype: of the result; the factors' by default.

    Raises: ValueError on shapes, dtypes or devices that do not match, and for standardize with a constant matrix.
    Memory: the result, and packed copies of the factors.

    Example:
        left, right = torch.randn(512, 192), torch.randn(512, 192)
        m = invariant_matrix(left, right, standardize=True)
        assert abs(m.mean()) < 1e-5 and abs(m.std() - 1) < 1e-5
    """
    _check_pair(left, right, "left", "right")
    if standardize and left.shape[0] < 2:
        raise ValueError(f"left must have at least 2 rows to standardise the product, got {left.shape[0]}")
    out_dtype = out_dtype or left.dtype
    chosen = _serve(backend, left)
    left, right = _widen(chosen, left, right)
    if chosen == "reference":
        product = invariant_matrix_reference(left, right, standardize=standardize)
        if standardize and not torch.compiler.is_compiling() and not torch.isfinite(product).all():
            raise ValueError("left and right give a constant matrix (or one that is not finite), which cannot be standardised")
        return product.to(out_dtype)
    mean = torch.zeros((), dtype=torch.float64, device=left.device)
    scale = torch.ones((), dtype=torch.float64, device=left.device)
    if standardize:
        n = left.shape[0] * right.shape[0]
        total = left.double().sum(0) @ right.double().sum(0)
        tracked = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
        # Σ PᵀP ⊙ QᵀQ; Gram matrices in float64 where a gradient has to pass, by the tile kernel otherwise.
        if tracked:
            square = ((left.double().mT @ left.double()) * (right.double().mT @ right.double())).sum()
        elif left.shape[1] <= left.shape[0]:
            square = (_symmetric_square_op if _traced(left) else _symmetric_square)(left, right, chosen)
        else:
            square = (_sums_op if _traced(left) else _sums)(left, right, left, right, "stream", chosen)[2]
        mean, variance = total / n, (square - total * total / n) / (n - 1)
        if not torch.compiler.is_compiling() and not bool(variance * (n - 1) > 1e-10 * square):
            raise ValueError("left and right give a constant matrix (or one that is not finite), which cannot be standardised")
        scale = variance.rsqrt()
    return (_product_op if _traced(left, right) else _product)(left, right, mean, scale, out_dtype, chosen)


def _symmetric_square(left: torch.Tensor, right: torch.Tensor, backend: str) -> torch.Tensor:
    """|left rightᵀ|², a float64 scalar, from the Gram matrices of the factors."""
    return _pair(left.mT, left.mT, right.mT, right.mT, True, backend)[4].clone()


_symmetric_square_op = _operator("llmcore::invariant_square", _symmetric_square)


@_symmetric_square_op.register_fake
def _(left, right, backend):
    return left.new_empty((), dtype=torch.float64)


def invariant_sums(left_a: torch.Tensor, right_a: torch.Tensor, left_b: torch.Tensor, right_b: torch.Tensor, *, algorithm: str = "auto",
                   memory_budget: int | None = None, backend: str = "auto") -> InvariantSums:
    """ΣA, ΣB, ΣA², ΣB² and ΣAB of A = left_a right_aᵀ and B = left_b right_bᵀ; only K has to agree between A and B.

    Args:
        left_a, right_a: (K, R_A). left_b, right_b: (K, R_B); one dtype and device for all.
        algorithm: "factor", "stream", "direct" (see the module), or "auto": the cheapest by `plan_sums`.
        memory_budget: bytes beside the factors that "auto" may use.

    Returns: InvariantSums of Python floats. Products in the factors' precision (float32 for half), sums over entries in float64; the
    result does not depend on the number of threads. Memory: as plan_sums(...).peak_bytes.
    Raises: ValueError on shapes, dtypes or devices that do not match.

    Example:
        a, b = torch.randn(256, 64), torch.randn(256, 48)
        sums = invariant_sums(a, a, b, b, algorithm="factor")
        assert abs(sums.dot_ab - ((a @ a.T).double() * (b @ b.T).double()).sum()) < 1e-4 * (sums.dot_aa * sums.dot_bb) ** 0.5
    """
    _check_pair(left_a, right_a, "left_a", "right_a")
    _check_pair(left_b, right_b, "left_b", "right_b")
    if left_a.shape[0] != left_b.shape[0]:
        raise ValueError(f"left_b must have K = {left_a.shape[0]} rows like left_a (the same tokens), got {left_b.shape[0]}")
    if left_a.dtype != left_b.dtype or left_a.device != left_b.device:
        raise ValueError(f"left_b must have left_a's dtype and device ({left_a.dtype}, {left_a.device}), "
                         f"got {left_b.dtype}, {left_b.device}")
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be 'auto' or one of {ALGORITHMS}, got {algorithm!r}")
    chosen = _serve(backend, left_a)
    num_tokens = left_a.shape[0]
    if algorithm == "auto":
        algorithm = plan_sums(num_tokens, left_a.shape[1], left_b.shape[1], memory_budget=memory_budget,
                              itemsize=max(4, left_a.element_size())).algorithm
    sums = _sums(*_widen(chosen, left_a, right_a, left_b, right_b), algorithm, chosen)
    return InvariantSums(*sums.tolist(), n=num_tokens * num_tokens)


def invariant_correlation(left_a: torch.Tensor, right_a: torch.Tensor, left_b: torch.Tensor, right_b: torch.Tensor, *,
                          normalize: str = "channel", algorithm: str = "auto", memory_budget: int | None = None,
                          backend: str = "auto") -> float:
    """Correlation over all K² entries of left_a right_aᵀ and left_b right_bᵀ, in [-1, 1]; NaN when one of them is constant.

    normalize="channel" centres both matrices first (Pearson), "none" is the plain cosine. The other arguments are those of invariant_sums.

    Example:
        left, right = torch.randn(256, 64), torch.randn(256, 64)
        mix = torch.linalg.qr(torch.randn(64, 64))[0]
        assert abs(invariant_correlation(left, right, left @ mix, right @ mix) - 1) < 1e-6      # the mixing cancels
    """
    if normalize not in ("channel", "none"):
        raise ValueError(f"normalize must be 'channel' or 'none', got {normalize!r}")
    sums = invariant_sums(left_a, right_a, left_b, right_b, algorithm=algorithm, memory_budget=memory_budget, backend=backend)
    return sums.correlation(normalize)


def tensor_sketch(left: torch.Tensor, right: torch.Tensor, *, width: int, seed: int, center: bool = True, normalize: bool = True,
                  backend: str = "auto") -> torch.Tensor:
    """(width,) sketch of M = left rightᵀ: the dot product of two sketches estimates the correlation of the matrices.

    Entry (i, j) goes, with a random sign, into bin (h(i) + h'(j)) mod width; computed from hashed rows of the factors and FFTs, O(K R + b R
    log b), without M. center subtracts M's mean first; normalize scales the sketch to norm 1 (a zero sketch stays zero). With both off, the
    dot product of two sketches is an unbiased estimate of <A, B>. The root-mean-square error of an estimated correlation c is about
    (1 - c²) / sqrt(width). Sketches compare only when K, width and seed are equal.

    Args:
        left, right: (K, R), one dtype and device. width: b >= 1. seed: 64-bit integer; hashes are a pure function of (row, width, seed).

    Example:
        left, right = torch.randn(256, 64), torch.randn(256, 64)
        sketch = tensor_sketch(left, right, width=1024, seed=0)
        assert abs(sketch.norm() - 1) < 1e-5
    """
    _check_pair(left, right, "left", "right")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be an integer >= 1, got {width!r}")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be an integer of at most 64 bits, got {seed!r}")
    chosen = _serve(backend, left)
    dtype = left.dtype
    if dtype in (torch.bfloat16, torch.float16):
        left, right = left.float(), right.float()
    if chosen == "reference":
        return tensor_sketch_reference(left, right, width=width, seed=seed, center=center, normalize=normalize).to(dtype)
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    return (_sketch_op if _traced(left) else _sketch)(left, right, width, signed_seed, center, normalize, chosen).to(dtype)


def sketch_scores(sketches: torch.Tensor, query: torch.Tensor, *, channels: int) -> torch.Tensor:
    """(N, channels) dot products of stored sketches (N, channels · width) in float16 with one query (channels · width,) in float32.

    One pass over the stored bytes. Falls back to blocks of torch's own products where the compiled operator is missing.
    """
    if sketches.dim() != 2 or sketches.dtype != torch.float16:
        raise ValueError(f"sketches must be (N, channels * width) of float16, got {tuple(sketches.shape)} of {sketches.dtype}")
    if channels < 1 or query.shape != sketches.shape[1:] or sketches.shape[1] % channels:
        raise ValueError(f"query must be ({sketches.shape[1]},), a multiple of channels = {channels}, got {tuple(query.shape)}")
    query = query.float().contiguous()
    if backends.choose("invariants", "auto", sketches.device) == "cpp":
        return torch.ops.llmcore.invariants_sketch_scores(sketches.contiguous(), query, channels)
    parts = [(block.float().view(len(block), channels, -1) * query.view(channels, -1)).sum(2) for block in sketches.split(1024)]
    return torch.cat(parts) if parts else query.new_empty(0, channels)


def permuted_dots(a: torch.Tensor, b: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """(N,) float64 Σ_ij a[i, j] · b[order[i], order[j]] for each of N orders of the rows and columns of b.

    What the correlation of two matrices over the same K tokens is under relabelled tokens. a, b: (K, K) of one dtype; orders: (N, K) int64.
    The compiled operator makes no permuted copy of b; K² numbers of b should lie in a cache. Elsewhere rows and columns are gathered.
    """
    if a.dim() != 2 or a.shape[0] != a.shape[1] or b.shape != a.shape or b.dtype != a.dtype or b.device != a.device:
        raise ValueError(f"a and b must be (K, K) of one dtype and device, got {tuple(a.shape)} of {a.dtype} on {a.device} and "
                         f"{tuple(b.shape)} of {b.dtype} on {b.device}")
    if orders.dim() != 2 or orders.shape[1] != a.shape[0] or orders.dtype != torch.int64:
        raise ValueError(f"orders must be (N, {a.shape[0]}) of int64, got {tuple(orders.shape)} of {orders.dtype}")
    if orders.numel() and not 0 <= int(orders.min()) <= int(orders.max()) < len(a):
        raise ValueError(f"orders must lie in [0, {len(a)}), got {int(orders.min())} to {int(orders.max())}")
    a, b = _widen("torch", a.contiguous(), b.contiguous())
    if _serve("auto", a) == "cpp":
        return torch.ops.llmcore.invariants_permuted_dots(a, b, orders.contiguous())
    found = [torch.dot(a.view(-1), b.index_select(0, order).index_select(1, order).view(-1)) for order in orders.to(a.device)]
    return torch.stack(found).double() if found else a.new_empty(0, dtype=torch.float64)


def measure_rates(*, repeats: int = 5) -> dict[str, float]:
    """Rates of this machine at the present number of threads, for `plan_sums(rates=...)`; takes about a second.

    Timed are products, deep and shallow ones, of which the plan knows flops, entries and packed elements: the rates solve for the medians.
    The shallow stored product is of a size that the C library never keeps, so that its pages are as fresh as those of a comparison.
    """
    def seconds(step: Callable[[], Any]) -> float:
        step()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    deep, flat, tall, wide = (torch.randn(shape) for shape in ((1536, 512), (1536, 16), (4096, 192), (3072, 16)))
    chosen = backends.choose("invariants", "auto", deep.device)
    chosen = chosen if chosen in ("cpp", "torch") else "torch"
    pairs = (deep, flat, tall.mT)
    work = torch.tensor([tile_work(len(x), len(x), x.shape[1], x.shape[1]) for x in pairs], dtype=torch.float64)
    times = torch.tensor([seconds(lambda x=x: _pair(x, x, x, x, False, chosen)) for x in pairs], dtype=torch.float64)
    flop, entry, element = torch.linalg.solve(work, times).tolist()
    work = torch.tensor([[4.0 * len(x) ** 2 * x.shape[1], len(x) ** 2] for x in (deep, wide)], dtype=torch.float64)
    times = torch.tensor([seconds(lambda x=x: _direct(x, x, x, x, chosen)) for x in (deep, wide)], dtype=torch.float64)
    stored_flop, stored_entry = torch.linalg.solve(work, times).tolist()
    return {"tile_flops": 1 / max(flop, 1e-15), "stored_flops": 1 / max(stored_flop, 1e-15), "tile_entry": max(entry, 0.0),
            "stored_entry": max(stored_entry, 0.0), "pack_element": max(element, 0.0)}


def _register_fakes() -> None:
    """Shapes of the compiled operators, for tracing and opcheck."""
    if backends.extension_error() is not None or not hasattr(torch.ops.llmcore, "invariants_tile_sums"):
        return
    fake = torch.library.register_fake
    fake("llmcore::invariants_tile_sums", lambda a, b, c, d, symmetric: a.new_empty(5, dtype=torch.float64))
    fake("llmcore::invariants_product", lambda left, right, mean, scale: left.new_empty(left.shape[0], right.shape[0]))
    fake("llmcore::invariants_pair_sums", lambda a, b: a.new_empty(5, dtype=torch.float64))
    fake("llmcore::invariants_count_sketch", lambda rows, bins, signs, width: rows.new_empty(width, rows.shape[1]))
    fake("llmcore::invariants_permuted_dots", lambda a, b, orders: a.new_empty(orders.shape[0], dtype=torch.float64))
    fake("llmcore::invariants_sketch_scores", lambda s, query, channels: query.new_empty(s.shape[0], channels))


_register_fakes()
