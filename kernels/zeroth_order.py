"""Zeroth-order gradients with regenerated directions: perturbed embeddings, and the norm of the finite-difference gradient.

For a query b with embeddings E (T, D), a mask of the rows that move, and P directions u_j in R^D,

    E_j = E + mu * mask * u_j                  one common shift of all masked rows (j = 1…P)
    v_j = F(E_j) - F(E)                        measured by the caller
    g   = 1/(P mu) * sum_j v_j u_j             its norm is 1/(P mu) * sqrt(v' G v) with G = U U'

Directions are a pure function of (seed, j, element): Philox4x32-10 and Box-Muller, the same on every backend, so nothing is stored
that can be drawn again. What is never materialised: the (B, P, T, D) broadcast of the shifts, per-token directions, N-fold copies; for
one query of 100 tokens at D = 4096 and P = 10 the shifts alone would be 16 MB in float32, the directions are 160 KB.

Bound: memory. perturb_embeddings reads B·T·D and writes B·P·T·D elements, (1 + P)·B·T·D·itemsize bytes; the norm of per-query
directions is one regenerating pass of B·P·D normals, that of shared directions O(P²) a query from one cached P×P Gram matrix.
Hu, Chen, Ho: Gradient Cuff (NeurIPS 2024), arXiv 2403.00867, sections 2 and 3. Philox: Salmon et al., SC 2011.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from llmcore.kernels import backends

# B queries, P directions a query, T tokens, D embedding size, S seeds (B, or 1 shared by all queries)

Seeds = torch.Tensor | int | Sequence[int]
KINDS = ("gaussian", "sphere", "antithetic", "orthogonal")
DIRECTION_STREAM = 0x47434431  # fourth counter word: which use of the generator draws
QUERY_STREAM = 0x47435131
SAMPLE_STREAM = 0x47435331
_MASK = 0xFFFFFFFF

backends.declare("zeroth_order", torch=None, cpp="llmcore::zeroth_order_perturb", triton=None, cuda="llmcore::zeroth_order_perturb")


@dataclasses.dataclass(frozen=True)
class ZerothOrderGradient:
    """norm: (B,) float64, the norm of the averaged finite-difference gradient. gradient: (B, D) float64, or None when not asked for."""

    norm: torch.Tensor
    gradient: torch.Tensor | None


def philox(seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor | int) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four 32-bit words (held in int64) for a 64-bit key and four 32-bit counter words. Arguments broadcast.

    Args:
        seed: int64, its 64 bits are the key (low word first). c0…c3: int64 counter words, taken modulo 2³².
    """
    words = [torch.as_tensor(word, device=seed.device, dtype=torch.int64) & _MASK for word in (c0, c1, c2, c3)]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The int64 product wraps modulo 2⁶⁴, which keeps both halves of the unsigned 32 x 32 bit product.
        even, odd = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [((odd >> 32) & _MASK) ^ words[1] ^ k0, odd & _MASK, ((even >> 32) & _MASK) ^ words[3] ^ k1, even & _MASK]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return tuple(torch.broadcast_tensors(*words))


def query_seeds(seed: int, query_ids: torch.Tensor) -> torch.Tensor:
    """Seeds (int64 bit patterns) of the queries' own directions: x₁·2³² + x₀ of Philox at counter (id low, id high, 0, stream)."""
    key = _seed_tensor(seed, query_ids.device)
    x0, x1, _, _ = philox(key, query_ids & _MASK, (query_ids >> 32) & _MASK, torch.zeros_like(query_ids), QUERY_STREAM)
    return (x1 << 32) | x0


def sample_uniforms(seed: int, *, steps: torch.Tensor, rows: torch.Tensor, samples: torch.Tensor, query_ids: torch.Tensor) -> torch.Tensor:
    """Uniforms in (0, 1), float64, for token `step` of sample `sample` of row `row` (0 = unperturbed) of a query. Arguments broadcast.

    u = ((x₀·2²⁰ + ⌊x₁/2¹²⌋) + ½)·2⁻⁵² at counter (step, row·2¹⁶ + sample, id low, stream): a draw depends on these indices alone.
    The caller keeps samples below 65536.
    """
    key = _seed_tensor(seed, steps.device)
    x0, x1, _, _ = philox(key, steps, rows * 65536 + samples, query_ids, SAMPLE_STREAM)
    # The integer has 52 bits and the half is the 53rd: the sum is exact in float64.
    return (((x0 << 20) | (x1 >> 12)).double() + 0.5) * 2.0**-52


def _gaussian_rows(seeds: torch.Tensor, num_directions: int, dim: int) -> torch.Tensor:
    """(S, P, D) float64: rows j = 0…P-1 of N(0, I), elements 4b…4b+3 from counter (b, j, 0, stream)."""
    blocks = torch.arange((dim + 3) // 4, device=seeds.device)
    rows = torch.arange(num_directions, device=seeds.device)
    words = philox(seeds[:, None, None], blocks[None, None, :], rows[None, :, None], torch.zeros_like(blocks), DIRECTION_STREAM)
    u0, u1, u2, u3 = ((word.double() + 0.5) * 2.0**-32 for word in words)
    radius, angle = (-2 * u0.log()).sqrt(), 2 * math.pi * u1
    radius2, angle2 = (-2 * u2.log()).sqrt(), 2 * math.pi * u3
    values = torch.stack([radius * angle.cos(), radius * angle.sin(), radius2 * angle2.cos(), radius2 * angle2.sin()], -1)
    return values.flatten(-2)[..., :dim]


def directions_reference(seeds: torch.Tensor, num_directions: int, dim: int, *, kind: str = "gaussian",
                         dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(S, P, D) directions, formed in float64 and rounded once. See `directions`."""
    if kind == "antithetic":
        half = _gaussian_rows(seeds, num_directions // 2, dim)
        return torch.cat([half, -half], 1).to(dtype)
    rows = _gaussian_rows(seeds, num_directions, dim)
    if kind == "sphere":
        rows = rows * (math.sqrt(dim) / rows.norm(dim=-1, keepdim=True))
    if kind == "orthogonal":
        # The factorisation with a positive diagonal of R is unique and makes Q Haar-distributed.
        q, r = torch.linalg.qr(rows.mT)
        rows = (q * torch.sign(r.diagonal(dim1=-2, dim2=-1))[..., None, :]).mT * math.sqrt(dim)
    return rows.to(dtype)


def perturb_embeddings_reference(embeddings: torch.Tensor, token_mask: torch.Tensor, table: torch.Tensor, smoothing: float) -> torch.Tensor:
    """(B, P, T, D) by broadcasting: E + mu·mask·u, formed in at least float32, rounded once. table: (S, P, D)."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    shifted = embeddings.to(wide)[:, None] + smoothing * table.to(wide)[:, :, None, :]
    return torch.where(token_mask[:, None, :, None], shifted, embeddings.to(wide)[:, None]).to(embeddings.dtype)


def zeroth_order_gradient_reference(perturbed_losses: torch.Tensor, base_losses: torch.Tensor, table: torch.Tensor,
                                    smoothing: float) -> torch.Tensor:
    """(B, D) float64: 1/(P mu) · sum_j (perturbed_losses_j - base_losses) u_j. table: (S, P, D)."""
    difference = perturbed_losses.double() - base_losses.double()[:, None]
    return (difference[:, :, None] * table.double()).sum(1) / (perturbed_losses.shape[1] * smoothing)


def _perturb_torch(embeddings: torch.Tensor, token_mask: torch.Tensor, table: torch.Tensor, smoothing: float, out: torch.Tensor) -> None:
    """Peak temporary: 2·B·T·D elements of float32 (one direction), whatever P is."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    source, mask = embeddings.to(wide), token_mask[:, :, None]
    for j in range(table.shape[1]):
        shifted = source + (smoothing * table[:, j].to(wide))[:, None, :]
        out[:, j].copy_(torch.where(mask, shifted, source))


def _combine_torch(table: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """(B, D) float64: sum_j coefficients_bj · u_bj, one direction at a time."""
    total = torch.zeros(coefficients.shape[0], table.shape[-1], dtype=torch.float64, device=table.device)
    for j in range(table.shape[1]):
        total.addcmul_(coefficients[:, j, None], table[:, j].double())
    return total


def _table(seeds: torch.Tensor, num_directions: int, dim: int, kind: str, dtype: torch.dtype, backend: str) -> torch.Tensor:
    if kind == "orthogonal" or backend in ("reference", "torch"):
        return directions_reference(seeds, num_directions, dim, kind=kind, dtype=dtype)
    if backend == "triton":
        from llmcore.kernels import zeroth_order_triton

        return zeroth_order_triton.directions(seeds, num_directions, dim, kind).to(dtype)
    rows = torch.ops.llmcore.zeroth_order_directions(seeds, num_directions, dim, KINDS.index(kind), dtype == torch.float64)
    return rows.to(dtype)


@functools.lru_cache(maxsize=4)
def _shared_table(seed: int, num_directions: int, dim: int, kind: str, backend: str) -> torch.Tensor:
    """The CPU directions of one shared seed, kept between calls: every query of a guard adds the same rows. Never handed to a caller."""
    return _table(_seed_tensor(seed), num_directions, dim, kind, torch.float32, backend)


def _perturb_into(embeddings: torch.Tensor, token_mask: torch.Tensor, seeds: torch.Tensor, num_directions: int, smoothing: float, kind: str,
                  out: torch.Tensor, backend: str) -> None:
    if out.numel() == 0:
        return
    if backend == "triton":
        from llmcore.kernels import zeroth_order_triton

        stored = kind in ("orthogonal", "sphere")  # a row's elements depend on one another
        table = _table(seeds, num_directions, embeddings.shape[2], kind, torch.float32, backend) if stored else None
        zeroth_order_triton.perturb(embeddings, token_mask, seeds, table, smoothing, kind, out)
        return
    if seeds.numel() == 1 and seeds.device.type == "cpu" and num_directions * embeddings.shape[2] <= 2**20:
        table = _shared_table(int(seeds), num_directions, embeddings.shape[2], kind, backend)
    else:
        table = _table(seeds, num_directions, embeddings.shape[2], kind, torch.float32, backend)
    if backend == "reference":
        out.copy_(perturb_embeddings_reference(embeddings, token_mask, table, smoothing))
    elif backend == "torch":
        _perturb_torch(embeddings, token_mask, table, smoothing, out)
    else:
        torch.ops.llmcore.zeroth_order_perturb(embeddings, token_mask.contiguous(), table.contiguous(), smoothing, out)


@torch.library.custom_op("llmcore::perturb_embeddings", mutates_args=())
def _perturb_op(embeddings: torch.Tensor, token_mask: torch.Tensor, seeds: torch.Tensor, num_directions: int, smoothing: float, kind: str,
                backend: str) -> torch.Tensor:
    out = embeddings.new_empty(embeddings.shape[0], num_directions, *embeddings.shape[1:])
    _perturb_into(embeddings, token_mask, seeds, num_directions, smoothing, kind, out, backend)
    return out


@_perturb_op.register_fake
def _(embeddings, token_mask, seeds, num_directions, smoothing, kind, backend):
    return embeddings.new_empty(embeddings.shape[0], num_directions, *embeddings.shape[1:])


_perturb_op.register_autograd(lambda ctx, grad: (grad.sum(1), None, None, None, None, None, None))  # E_j = E + constant


@torch.library.custom_op("llmcore::zeroth_order_combine_rows", mutates_args=())
def _combine_op(seeds: torch.Tensor, coefficients: torch.Tensor, dim: int, kind: str, want_gradient: bool,
                backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) squared norm and (B, D) value of sum_j coefficients_bj · u_bj with (B,) seeds; the value is (B, 0) when it is not wanted."""
    num_directions = coefficients.shape[1]
    if kind in ("gaussian", "antithetic") and backend in ("cpp", "cuda"):
        return torch.ops.llmcore.zeroth_order_combine(seeds, coefficients, dim, KINDS.index(kind), want_gradient)
    if kind in ("gaussian", "antithetic") and backend == "triton":
        from llmcore.kernels import zeroth_order_triton

        return zeroth_order_triton.combine(seeds, coefficients, dim, kind, want_gradient)
    # Drawn in blocks of queries: at most 8 MiB of rows, or one query's, exist at a time.
    square = coefficients.new_empty(coefficients.shape[0])
    gradient = coefficients.new_empty(coefficients.shape[0], dim if want_gradient else 0)
    block = max(1, 2**21 // (num_directions * dim))
    for start in range(0, coefficients.shape[0], block):
        part = slice(start, start + block)
        total = _combine_torch(_table(seeds[part], num_directions, dim, kind, torch.float32, backend), coefficients[part])
        square[part] = total.square().sum(1)
        if want_gradient:
            gradient[part] = total
    return square, gradient


@_combine_op.register_fake
def _(seeds, coefficients, dim, kind, want_gradient, backend):
    return coefficients.new_empty(coefficients.shape[0]), coefficients.new_empty(coefficients.shape[0], dim if want_gradient else 0)


def _seed_tensor(seeds: Seeds, device: torch.device | None = None) -> torch.Tensor:
    """(S,) int64 bit patterns of 64-bit seeds."""
    if isinstance(seeds, torch.Tensor):
        if seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool or seeds.dim() > 1:
            raise ValueError(f"seeds must be an integer or a (B,) integer tensor, got {tuple(seeds.shape)} of {seeds.dtype}")
        bits = seeds.view(torch.int64) if seeds.dtype == torch.uint64 else seeds.to(torch.int64)
        return bits.reshape(-1).to(device or seeds.device)
    values = [seeds] if isinstance(seeds, int) else list(seeds)
    if not all(isinstance(value, int) and -(2**63) <= value < 2**64 for value in values):
        raise ValueError(f"seeds must be integers of at most 64 bits, got {values!r}")
    return torch.tensor([value - 2**64 if value >= 2**63 else value for value in values], dtype=torch.int64, device=device)


def _check_directions(num_directions: int, dim: int, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if num_directions < 0 or dim < 1:
        raise ValueError(f"num_directions must be >= 0 and dim >= 1, got {num_directions} and {dim}")
    if kind == "antithetic" and num_directions % 2:
        raise ValueError(f"num_directions must be even for kind='antithetic' (rows come with their negatives), got {num_directions}")
    if kind == "orthogonal" and num_directions > dim:
        raise ValueError(f"num_directions must be at most dim for kind='orthogonal', got {num_directions} > {dim}")


def _check_smoothing(smoothing: float) -> None:
    if not (math.isfinite(smoothing) and smoothing > 0):
        raise ValueError(f"smoothing must be a finite number > 0, got {smoothing!r}")


def directions(seeds: Seeds, num_directions: int, dim: int, *, kind: str = "gaussian",
               dtype: torch.dtype = torch.float32, device: torch.device | str | None = None, backend: str = "auto") -> torch.Tensor:
    """Random directions as a pure function of (seed, row, element): the same numbers on every backend.

    u[s, j, 4b…4b+3] comes from Philox4x32-10 with key seeds[s] at counter (b, j, 0, 0x47434431) through two Box-Muller pairs.

    Args:
        seeds: (S,) int64 bit patterns of 64-bit seeds, or Python integers. num_directions: P >= 0. dim: D >= 1.
        kind: "gaussian" N(0, I), not normalised; "sphere" the same rows scaled to norm √D; "antithetic" (even P) rows P/2 + j = -row j;
            "orthogonal" (P <= D) the Q of the D × P Gaussian matrix with positive diagonal of R, times √D.
        dtype: result type. CPU backends form float64 and round once; GPU backends form float32 (within 2e-6 typically, 3e-4 where the
            Box-Muller uniform is next to 1).
        device: where to draw, the seeds' device when they are a tensor, else CPU.

    Returns: (S, P, D) of `dtype`.
    Raises: ValueError: a kind, size or seed out of range.
    Example:
        u = directions(13, 10, 576)          # (1, 10, 576) float32
        g = u[0] @ u[0].T / 576              # close to the identity
    """
    _check_directions(num_directions, dim, kind)
    seeds = _seed_tensor(seeds, None if device is None else torch.device(device))
    if num_directions == 0 or seeds.numel() == 0:
        return torch.empty(seeds.numel(), num_directions, dim, dtype=dtype, device=seeds.device)
    return _table(seeds, num_directions, dim, kind, dtype, backends.choose("zeroth_order", backend, seeds.device))


def perturb_embeddings(embeddings: torch.Tensor, token_mask: torch.Tensor, *, seeds: Seeds, num_directions: int, smoothing: float,
                       kind: str = "gaussian", out: torch.Tensor | None = None, backend: str = "auto") -> torch.Tensor:
    """P shifted copies of every query's embeddings: out[b, j] = embeddings[b] + smoothing · token_mask[b] · u_bj.

    The sum is formed in float32 (float64 for float64 embeddings) from float32 directions and rounded once; rows outside the mask are
    copied bit for bit.

    Args:
        embeddings: (B, T, D) floating point, unit inner stride. token_mask: (B, T) bool (or integer), true where the row moves.
        seeds: B seeds, or one shared by all queries. num_directions: P. smoothing: mu > 0. kind: see `directions`.
        out: (B, P, T, D) of the embeddings' dtype and device with unit inner stride, written in place and returned: pass the rows of
            the model's own `inputs_embeds` buffer. It must not overlap `embeddings`.

    Returns: (B, P, T, D). Differentiable in `embeddings` when `out` is None.
    Raises: ValueError: shapes, sizes, a mask with an empty query (checked for CPU tensors), smoothing <= 0. TypeError: dtypes.
    Memory: beyond the output S·P·D·4 bytes (directions) on CPU, where those of one shared seed stay cached; nothing on GPU for Gaussian
        and antithetic kinds.
    Example:
        embeddings = torch.randn(1, 7, 64); mask = torch.arange(7)[None] >= 3
        batch = torch.empty(1, 1 + 10, 7, 64); batch[:, 0] = embeddings
        perturb_embeddings(embeddings, mask, seeds=13, num_directions=10, smoothing=0.02, out=batch[:, 1:])
    """
    if embeddings.dim() != 3:
        raise ValueError(f"embeddings must be (B, T, D), got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings must be floating point, got {embeddings.dtype}")
    batch, length, dim = embeddings.shape
    if token_mask.shape != (batch, length):
        raise ValueError(f"token_mask must be (B, T) = ({batch}, {length}) to match embeddings, got {tuple(token_mask.shape)}")
    if token_mask.is_floating_point() or token_mask.is_complex():
        raise TypeError(f"token_mask must be bool (or integer, nonzero = moves), got {token_mask.dtype}")
    token_mask = token_mask if token_mask.dtype == torch.bool else token_mask != 0
    if token_mask.device != embeddings.device:
        raise ValueError(f"token_mask must be on {embeddings.device} like embeddings, got {token_mask.device}")
    _check_directions(num_directions, dim, kind)
    _check_smoothing(smoothing)
    seeds = _seed_tensor(seeds, embeddings.device)
    if seeds.numel() not in (1, batch):
        raise ValueError(f"seeds must hold one seed or one per query ({batch}), got {seeds.numel()}")
    if token_mask.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(token_mask.any(1).all()):
        raise ValueError("token_mask must select at least one row of every query: nothing to perturb in an empty text")
    if embeddings.stride(2) != 1:
        embeddings = embeddings.contiguous()
    chosen = backends.choose("zeroth_order", backend, embeddings.device, _refused(embeddings.dtype))
    if out is None:
        return _perturb_op(embeddings, token_mask, seeds, num_directions, float(smoothing), kind, chosen)
    if out.shape != (batch, num_directions, length, dim) or out.dtype != embeddings.dtype or out.device != embeddings.device:
        raise ValueError(f"out must be {(batch, num_directions, length, dim)} of {embeddings.dtype} on {embeddings.device}, "
                         f"got {tuple(out.shape)} of {out.dtype} on {out.device}")
    if out.numel() and dim > 1 and out.stride(3) != 1:
        raise ValueError(f"out must have unit inner stride, got strides {out.stride()}")
    if torch.is_grad_enabled() and (embeddings.requires_grad or out.requires_grad):
        raise ValueError("out cannot be combined with embeddings that require a gradient; leave out=None or use torch.no_grad()")
    _perturb_into(embeddings, token_mask, seeds, num_directions, float(smoothing), kind, out, chosen)
    return out


def _refused(dtype: torch.dtype) -> dict[str, str]:
    """Backends that cannot serve a dtype."""
    served = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return {} if dtype in served else {name: f"it has no kernel for {dtype}" for name in ("cpp", "cuda", "triton")}


@functools.lru_cache(maxsize=16)
def _shared_gram(seed: int, num_directions: int, dim: int, kind: str, device: torch.device, backend: str) -> torch.Tensor:
    rows = _table(_seed_tensor(seed, device), num_directions, dim, kind, torch.float32, backend)[0].double()
    return rows @ rows.T


def direction_gram(seeds: Seeds, num_directions: int, dim: int, *, kind: str = "gaussian",
                   device: torch.device | str | None = None, backend: str = "auto") -> torch.Tensor:
    """(S, P, P) float64 Gram matrices U Uᵀ of the float32 directions that `perturb_embeddings` adds; one shared integer seed is cached."""
    _check_directions(num_directions, dim, kind)
    if isinstance(seeds, int):
        target = torch.device(device or "cpu")
        return _shared_gram(seeds, num_directions, dim, kind, target, backends.choose("zeroth_order", backend, target))[None].clone()
    seeds = _seed_tensor(seeds, None if device is None else torch.device(device))
    rows = directions(seeds, num_directions, dim, kind=kind, backend=backend).double()
    return rows @ rows.mT


def zeroth_order_gradient(perturbed_losses: torch.Tensor, base_losses: torch.Tensor, *, smoothing: float,
                          seeds: Seeds | None = None, directions: torch.Tensor | None = None, dim: int | None = None,
                          kind: str = "gaussian", return_gradient: bool = False, backend: str = "auto") -> ZerothOrderGradient:
    """Norm (and value) of the averaged finite-difference gradient g = 1/(P·smoothing) · Σ_j (perturbed_j - base) u_j.

    Everything is accumulated in float64 from the float32 rows that were added. With shared directions the norm goes through the
    P × P Gram matrix: O(P²) a query. With a seed per query one pass regenerates the directions; (B, P, D) is not stored.

    Args:
        perturbed_losses: (B, P). base_losses: (B,), the loss at the unperturbed point. Floating or integer: integers subtract exactly, so
            counts over N samples can be passed as they are and the result divided by N.
        smoothing: mu > 0, as given to `perturb_embeddings`.
        seeds, dim: the seeds given to `perturb_embeddings` (one shared, or B) and the embedding size; or
        directions: (P, D) shared or (B, P, D), instead of seeds.
        return_gradient: also return (B, D).

    Returns: ZerothOrderGradient(norm (B,) float64, gradient (B, D) float64 or None).
    Raises: ValueError: neither or both of seeds and directions, P = 0, shapes that do not match.
    Example:
        u = llmcore.kernels.zeroth_order.directions(13, 10, 64)[0]
        slope = torch.randn(64); base = torch.zeros(1)
        zeroth_order_gradient(0.02 * (u @ slope)[None], base, smoothing=0.02, seeds=13, dim=64).norm
    """
    if perturbed_losses.dim() != 2 or base_losses.shape != perturbed_losses.shape[:1]:
        raise ValueError(f"perturbed_losses must be (B, P) and base_losses (B,), got {tuple(perturbed_losses.shape)} and "
                         f"{tuple(base_losses.shape)}")
    batch, num_directions = perturbed_losses.shape
    if num_directions == 0:
        raise ValueError("perturbed_losses must hold at least one direction: the gradient of none is undefined")
    if (seeds is None) == (directions is None):
        raise ValueError("exactly one of seeds and directions must be given")
    _check_smoothing(smoothing)
    scale = 1.0 / (num_directions * smoothing)
    # Integers subtract exactly; floating losses are widened before the subtraction.
    difference = (perturbed_losses.double() - base_losses.double()[:, None]).detach()
    device = difference.device
    chosen = backends.choose("zeroth_order", backend, device)
    if directions is not None:
        table = directions[None] if directions.dim() == 2 else directions
        if table.dim() != 3 or table.shape[1] != num_directions or table.shape[0] not in (1, batch):
            raise ValueError(f"directions must be ({num_directions}, D) or ({batch}, {num_directions}, D), got {tuple(directions.shape)}")
        if dim not in (None, table.shape[2]):
            raise ValueError(f"dim must be {table.shape[2]} like directions, got {dim}")
        if table.shape[0] == 1 and not return_gradient:
            rows = table[0].double()
            return ZerothOrderGradient(_quadratic_norm(difference, rows @ rows.T) * scale, None)
        gradient = _combine_torch(table, difference) * scale
        return ZerothOrderGradient(gradient.norm(dim=1), gradient if return_gradient else None)
    if dim is None:
        raise ValueError("dim must be given with seeds: it is the embedding size that the directions were drawn for")
    _check_directions(num_directions, dim, kind)
    key = _seed_tensor(seeds, device)  # type: ignore[arg-type]
    if key.numel() not in (1, batch):
        raise ValueError(f"seeds must hold one seed or one per query ({batch}), got {key.numel()}")
    if batch == 0:
        empty = difference.new_empty(0)
        return ZerothOrderGradient(empty, difference.new_empty(0, dim) if return_gradient else None)
    if key.numel() == 1:
        gram = (_shared_gram(seeds, num_directions, dim, kind, device, chosen) if isinstance(seeds, int)
                else direction_gram(key, num_directions, dim, kind=kind, backend=chosen)[0])
        norm = _quadratic_norm(difference, gram) * scale
        if not return_gradient:
            return ZerothOrderGradient(norm, None)
        rows = _table(key, num_directions, dim, kind, torch.float32, chosen)[0].double()
        return ZerothOrderGradient(norm, (difference @ rows) * scale)
    square, gradient = _combine_op(key, difference.contiguous(), dim, kind, return_gradient, chosen)
    return ZerothOrderGradient(square.sqrt() * scale, gradient * scale if return_gradient else None)


def _quadratic_norm(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """sqrt(v' G v) for every row of `difference`; rounding below zero (v in the null space of G) counts as zero."""
    return ((difference @ gram) * difference).sum(1).clamp_min(0).sqrt()
