"""Invariant terms of a layer as thin factors, read block by block.

With X (K, D) the raw embedding rows of the tokens, H query heads on G key/value heads (g(h) = h // (H / G)), for each layer

    M_qk = Σ_h X Wq_hᵀ Wk_g(h) Xᵀ      M_vo = Σ_h X Wv_g(h)ᵀ Wo_hᵀ Xᵀ      M_ff = X (Wgate ⊙ Wup)ᵀ Wdownᵀ Xᵀ           (paper, section 3)

The sum over the heads of a group is taken on the weights first, Wq~_g = Σ_{h in g} Wq_h, so the products have depth R = G·d instead of H·d.
The hardened terms put the gains of the norms where the model puts them, columns of Wq, Wk, Wv by γ1 and of Wup by γ2 (rows of Wo, Wdown by
the gains behind the sub-layers, where there are any), and take Wup alone: they are also unchanged by rotations of the hidden space and by
moving factors between norms and weights. A gain on columns of W is a gain on X: (W·γ) Xᵀ = W (X·γ)ᵀ, and both variants share every read.

Memory: one block of rows, the factors, and (K, F) for the feed-forward chain; no layer is ever held whole unless the D x D form is cheaper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from llmcore.methods.huref.layouts import LARGEST_BLOCK, Layer, Layout, Matrix, Reader, finite, read_blocks

# K tokens, D hidden size, F feed-forward width, R depth of a factor

CHANNELS = {"paper": ("qk", "vo", "ff"), "hardened": ("qk*", "vo*", "up*")}


@dataclasses.dataclass
class Factors:
    """One channel M = left rightᵀ. name: "qk", "vo", "ff" or the hardened "qk*", "vo*", "up*"."""

    name: str
    left: torch.Tensor
    right: torch.Tensor


def check_terms(terms: str | Sequence[str]) -> tuple[str, ...]:
    chosen = (terms,) if isinstance(terms, str) else tuple(terms)
    if not chosen or any(t not in CHANNELS for t in chosen):
        raise ValueError(f"terms must be 'paper', 'hardened' or both, got {terms!r}")
    return tuple(t for t in CHANNELS if t in chosen)


def check_ids(ids: Sequence[int], layout: Layout, reader: Reader) -> None:
    if len(ids) < 2:
        raise ValueError(f"tokens must have at least 2 ids, got {len(ids)}")
    if max(ids) >= layout.vocab_size or min(ids) < 0:
        raise ValueError(f"tokens must lie in [0, {layout.vocab_size}) for {reader.path}, got {min(ids)} to {max(ids)}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"tokens must be distinct, {len(ids) - len(set(ids))} of {len(ids)} are repeated")


def embedding_rows(reader: Reader, layout: Layout, ids: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """X (K, D)."""
    check_ids(ids, layout, reader)
    return finite(reader.rows(layout.embedding, list(ids), dtype=dtype), reader, layout.embedding)


def _gain(reader: Reader, name: str | None, layout: Layout, dtype: torch.dtype) -> torch.Tensor | None:
    if name is None:
        return None
    gain = finite(reader.read(name, dtype=dtype), reader, name)
    # GGUF files store gemma's gains with the one already added.
    offset = layout.norm_offset if getattr(reader, "format", "safetensors") == "safetensors" else 0.0
    return gain + offset


def _collapse(weights: torch.Tensor, layout: Layout, gqa: str, heads_axis: int) -> torch.Tensor:
    """Sum the heads that meet the same key/value head. weights: heads · d along heads_axis."""
    groups, repeat, dim = layout.num_kv_heads, layout.num_heads // layout.num_kv_heads, layout.head_dim
    order = (groups, repeat, dim) if gqa == "interleave" else (repeat, groups, dim)
    summed = (1 if gqa == "interleave" else 0) + heads_axis
    shape = (*order, weights.shape[1]) if heads_axis == 0 else (weights.shape[0], *order)
    collapsed = weights.reshape(shape).sum(summed)
    return collapsed.reshape(-1, weights.shape[1]) if heads_axis == 0 else collapsed.reshape(weights.shape[0], -1)


def _attention(
    reader: Reader,
    layout: Layout,
    layer: Layer,
    wanted: tuple[str, ...],
    hidden: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    gqa: str,
    dtype: torch.dtype,
    block_bytes: int,
) -> Iterator[Factors]:
    """qk and vo of each wanted variant. hidden, after: X with the gains before and behind the sub-layer."""
    depth = layout.num_kv_heads * layout.head_dim
    dim, repeat = layout.head_dim, layout.num_heads // layout.num_kv_heads
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for side, matrix in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
        sides[side] = {t: x.new_zeros(len(x), depth) for t, x in hidden.items()}
        # Blocks of whole groups, so that the heads of a group are summed as they are read (tile: a head adds to the group it meets).
        multiple = dim * (repeat if side == "q" and gqa == "interleave" else 1)
        for start, stop, rows in matrix.blocks(reader, dtype, block_bytes, multiple=multiple):
            if side != "q" or repeat == 1:
                columns = torch.arange(start, stop)
            elif gqa == "interleave":
                rows = rows.view(-1, repeat, dim, rows.shape[1]).sum(1).view(-1, rows.shape[1])
                columns = torch.arange(start // repeat, start // repeat + len(rows))
            else:
                columns = torch.arange(start, stop) % depth
            for t, x in hidden.items():
                sides[side][t].index_add_(1, columns, x @ rows.mT)
    for t in wanted:
        yield Factors(CHANNELS[t][0], sides["q"][t], sides["k"][t])
    right = {t: x.new_zeros(len(x), depth) for t, x in after.items()}
    for start, stop, rows in layer.output.blocks(reader, dtype, block_bytes):
        collapsed = _collapse(rows, layout, gqa, 1)
        for t, x in after.items():
            right[t].addmm_(x[:, start:stop], collapsed)
    for t in wanted:
        yield Factors(CHANNELS[t][1], sides["v"][t], right[t])


def _feed_forward(
    reader: Reader,
    layer: Layer,
    wanted: tuple[str, ...],
    hidden: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    ff: str,
    dtype: torch.dtype,
    block_bytes: int,
) -> Iterator[Factors]:
    """ff (paper) and up* (hardened): left = X Wᵀ Wdownᵀ (K, D), right = X. Experts are summed."""
    left = {t: torch.zeros_like(x) for t, x in hidden.items()}
    for expert in layer.experts:
        _expert(reader, expert, wanted, hidden, left, ff, dtype, block_bytes)
    for t in wanted:
        yield Factors(CHANNELS[t][2], left[t], after[t])


def _expert(
    reader: Reader,
    expert: tuple[Matrix | None, Matrix, Matrix],
    wanted: tuple[str, ...],
    hidden: dict[str, torch.Tensor],
    left: dict[str, torch.Tensor],
    ff: str,
    dtype: torch.dtype,
    block_bytes: int,
) -> None:
    """left += X Wᵀ Wdownᵀ of one expert, W = Wgate ⊙ Wup (paper) or Wup (hardened); its blocks are gone when this returns."""
    gate, up, down = expert
    width = up.out_size
    square = square_form_is_cheaper(len(next(iter(hidden.values()))), up.in_size, width, dtype.itemsize)
    inner = {t: x.new_empty(len(x), width) for t, x in hidden.items()} if not square else {}
    whole = down.read(reader, 0, down.out_size, dtype) if square else None
    squares = {t: x.new_zeros(down.out_size, up.in_size) for t, x in hidden.items()} if square else {}
    pair = [up, gate] if gate is not None and ff != "up" and "paper" in wanted else [up]
    for start, stop, (rows, *gates) in read_blocks(pair, reader, dtype, block_bytes):
        paper = rows
        if gates:
            paper = gates[0] if ff == "gate" else gates[0].mul_(rows)
        for t, x in hidden.items():
            block = paper if t == "paper" else rows
            if square:
                assert whole is not None
                squares[t].addmm_(whole[:, start:stop], block)  # (Wdown W)ᵀ, grown over F
            else:
                inner[t][:, start:stop] = x @ block.mT
    if square:
        assert whole is not None
        finite(whole, reader, down.name)
        for t, x in hidden.items():
            left[t].addmm_(x, squares[t].mT)
        return
    for start, stop, rows in down.blocks(reader, dtype, block_bytes):
        for t in hidden:
            left[t][:, start:stop] += inner[t] @ rows.mT


def square_form_is_cheaper(num_tokens: int, hidden: int, width: int, itemsize: int) -> bool:
    """2 D²F + 2 K D² flops of Wdown W first against the 4 K D F of X first, while Wdown may be held whole (64 MB)."""
    return hidden * hidden * (width + num_tokens) < 2 * num_tokens * hidden * width and hidden * width * itemsize <= 64 << 20


def layer_factors(
    reader: Reader,
    layout: Layout,
    index: int,
    embeddings: torch.Tensor,
    *,
    terms: tuple[str, ...] = ("paper",),
    gqa: str = "interleave",
    ff: str = "gate_times_up",
    block_bytes: int = LARGEST_BLOCK,
) -> Iterator[Factors]:
    """The channels of one layer, one after the other: (qk, vo, ff) of each variant of `terms`, every tensor read once.

    Args:
        embeddings: X (K, D); its dtype is that of the arithmetic. gqa: "interleave" as models compute it, "tile" as the published code.
        ff: "gate_times_up" (paper), "up" or "gate"; it does not touch the hardened term. block_bytes: largest block of rows.
    """
    if gqa not in ("interleave", "tile"):
        raise ValueError(f"gqa must be 'interleave' or 'tile', got {gqa!r}")
    if ff not in ("gate_times_up", "up", "gate"):
        raise ValueError(f"ff must be 'gate_times_up', 'up' or 'gate', got {ff!r}")
    layer, dtype = layout.layer(index), embeddings.dtype

    def scaled(norm: str | None) -> dict[str, torch.Tensor]:
        views = {}
        for t in terms:
            gain = _gain(reader, norm, layout, dtype) if t == "hardened" else None
            views[t] = embeddings if gain is None else embeddings * gain
        return views

    attention_in, attention_out = scaled(layer.norm_attention), scaled(layer.norm_after_attention)
    yield from _attention(reader, layout, layer, terms, attention_in, attention_out, gqa, dtype, block_bytes)
    del attention_in, attention_out
    mlp_in, mlp_out = scaled(layer.norm_mlp), scaled(layer.norm_after_mlp)
    for factors in _feed_forward(reader, layer, terms, mlp_in, mlp_out, ff, dtype, block_bytes):
        if layout.compat == "published" and layout.model_type == "gpt2" and factors.name == "ff":
            factors = Factors("ff", factors.right, factors.left)  # stored (in, out) and used as (out, in): M_ff comes out transposed
        yield factors


def row_sums(factors: Factors) -> torch.Tensor:
    """(K,) float64 sums of the rows of M, from matrix-vector products alone."""
    return factors.left.double() @ factors.right.double().sum(0)


def used_bytes(reader: Reader, layout: Layout, layers: Sequence[int], num_tokens: int) -> int:
    """Stored bytes that the terms of these layers need: the matrices and K rows of the embedding."""
    rows = reader.nbytes(layout.embedding) * num_tokens // max(layout.vocab_size, 1)
    return rows + sum(m.nbytes(reader) for i in layers for m in layout.layer(i).matrices())
