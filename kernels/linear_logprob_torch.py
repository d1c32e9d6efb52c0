"""Chunked PyTorch implementation of the fused linear log-probability (contract in linear_logprob_core.py): any device, bounded memory.

Row blocks are padded to a fixed number of rows, so that every GEMM has the same shape whatever else is in the batch: vendor GEMMs choose
their algorithm, and with it the order of their sums, by shape. A row's result then does not depend on its neighbours.
"""

from __future__ import annotations

import torch
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, VOCAB_BLOCK, Gradients, Head, Statistics
from torch import Tensor

CHUNK = 4 * VOCAB_BLOCK  # vocabulary columns of one GEMM


def _row_block(device: torch.device) -> int:
    return 64 if device.type == "cpu" else 512


def scratch_bytes(num_rows: int, hidden_size: int, vocab_size: int, half: bool) -> int:
    """Upper bound of the temporaries: weight chunk and its gradient, five logit tiles, float32 hidden gradient, per-row sums."""
    tile = 512 * CHUNK * 4
    return 2 * CHUNK * hidden_size * 4 + 5 * tile + num_rows * (hidden_size * 4 + 64)


def _tile_logits(head: Head, hidden_block: Tensor, weight_chunk: Tensor, start: int) -> Tensor:
    """Final logits of a padded row block against columns [start, start + len(weight_chunk))."""
    z = hidden_block @ weight_chunk.T
    if head.bias is not None:
        z += head.bias[start : start + weight_chunk.shape[0]].to(z.dtype)
    if head.logit_scale != 1.0:
        z *= head.logit_scale
    if head.softcap:
        z = (z / head.softcap).tanh_().mul_(head.softcap)
    if head.temperature != 1.0:
        z /= head.temperature
    return z


def logit_chain(head: Head, z: Tensor) -> Tensor | float:
    """da/dz with a = h·w + b: logit_scale / temperature · (1 - tanh²), the tanh read back from the capped logit."""
    factor = head.logit_scale / head.temperature
    if not head.softcap:
        return factor
    return factor * (1 - (z * (head.temperature / head.softcap)).square())


def _gather(head: Head, begin: int, end: int, block: int) -> Tensor:
    """Rows [begin, end) of the scored rows in the accumulation dtype, padded with zeros to `block` rows."""
    taken = head.hidden.index_select(0, head.rows[begin:end]).to(head.stat_dtype)
    return taken if end - begin == block else torch.nn.functional.pad(taken, (0, 0, 0, block - (end - begin)))


def forward(head: Head, want: int, *, resident_rows: int = 0, direction: bool = False, tiles: bool = False) -> Statistics:
    """Online statistics over vocabulary chunks; see the contract."""
    num_rows, vocab_size, device, dtype = len(head.rows), len(head.weight), head.hidden.device, head.stat_dtype
    num_tiles = -(-vocab_size // VOCAB_BLOCK)

    def column(value: float = 0.0) -> Tensor:
        return torch.full((num_rows,), value, dtype=torch.float64, device=device)

    row_max, sum_exp, target = column(-torch.inf), column(), column()
    shifted = column() if want & ENTROPY else None
    sum_sq = column() if want & SUM_SQ else None
    sum_z = column() if want & MEAN else None
    argmax = torch.zeros(num_rows, dtype=torch.int64, device=device) if want & ARGMAX else None
    resident = (
        torch.empty(resident_rows, vocab_size, dtype=torch.bfloat16 if head.half else dtype, device=device) if resident_rows else None
    )
    offsets = torch.empty(resident_rows, num_tiles, dtype=torch.float32, device=device) if resident_rows and head.half else None
    kept = torch.zeros(num_rows, head.weight.shape[1], dtype=dtype, device=device) if direction else None
    tile_lse = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device) if tiles else None

    block = _row_block(device)
    for start in range(0, vocab_size, CHUNK):
        weight_chunk = head.weight[start : start + CHUNK].to(dtype)
        columns = len(weight_chunk)
        for begin in range(0, num_rows, block):
            end = min(begin + block, num_rows)
            span = slice(begin, end)
            z = _tile_logits(head, _gather(head, begin, end, block), weight_chunk, start)[: end - begin]
            local = head.labels[span] - (head.vocab_start + start)
            owned = (local >= 0) & (local < columns)
            picked = z.gather(1, local.clamp(0, columns - 1)[:, None])[:, 0]
            target[span] = torch.where(owned, picked.double(), target[span])

            tile_max, tile_arg = z.max(dim=1)
            old = row_max[span]
            new = torch.maximum(old, tile_max.double())
            if argmax is not None:
                # torch.max may return any of several equal columns: the first one is wanted.
                first = torch.where(z == tile_max[:, None], torch.arange(columns, device=device), columns).amin(dim=1)
                first = torch.where(first < columns, first, tile_arg)  # a NaN maximum equals nothing
                argmax[span] = torch.where(tile_max.double() > old, first + (head.vocab_start + start), argmax[span])
            # Every later use of exp(old - new) multiplies a sum that is zero while old is -inf.
            rescale = torch.where(sum_exp[span] > 0, (old - new).exp(), 0.0)
            delta = z - new[:, None].to(dtype)
            e = delta.exp()
            if shifted is not None:
                moved = torch.where(rescale > 0, old - new, 0.0)
                shifted[span] = rescale * (shifted[span] + moved * sum_exp[span]) + (e * delta).sum(dim=1, dtype=torch.float64)
            sum_exp[span] = rescale * sum_exp[span] + e.sum(dim=1, dtype=torch.float64)
            if sum_sq is not None:
                sum_sq[span] = rescale.square() * sum_sq[span] + e.square().sum(dim=1, dtype=torch.float64)
            if sum_z is not None:
                sum_z[span] += z.sum(dim=1, dtype=torch.float64)
            if kept is not None:
                chain = logit_chain(head, z)
                kept[span] = kept[span] * rescale[:, None].to(dtype) + (e * chain) @ weight_chunk
            row_max[span] = new

            upto = min(end, resident_rows)
            for tile in range(start // VOCAB_BLOCK, -(-(start + columns) // VOCAB_BLOCK)):
                inside = slice(tile * VOCAB_BLOCK - start, min((tile + 1) * VOCAB_BLOCK, vocab_size) - start)
                if tile_lse is not None:
                    tile_lse[span, tile] = z[:, inside].logsumexp(dim=1).float()
                if resident is not None and begin < upto:
                    part = z[: upto - begin, inside]
                    globally = slice(start + inside.start, start + inside.stop)
                    if offsets is not None:
                        offset = part.amax(dim=1)
                        offsets[begin:upto, tile] = offset
                        resident[begin:upto, globally] = (part - offset[:, None]).exp().to(torch.bfloat16)
                    else:
                        resident[begin:upto, globally] = part

    def out(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    return Statistics(
        row_max.to(dtype),
        sum_exp.to(dtype),
        target.to(dtype),
        out(shifted),
        out(sum_sq),
        out(sum_z),
        argmax,
        resident,
        offsets,
        kept,
        tile_lse,
    )


def backward(
    head: Head,
    lse: Tensor,
    target: Tensor,
    target_coef: Tensor,
    prob_coef: Tensor,
    slope: Tensor | None,
    *,
    resident: Tensor | None = None,
    offsets: Tensor | None = None,
    slots: Tensor | None = None,
    keep: Tensor | None = None,
    need_hidden: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    grad_weight_out: Tensor | None = None,
) -> Gradients:
    """Gradients by recomputation, or from the resident rows: row i reads resident[slots[i]] when slots[i] >= 0 (such rows come first).

    keep (M, ceil(V / VOCAB_BLOCK)) bool: blocks a row may not skip; a row takes part in the GEMMs of a block only where it is True.
    """
    num_rows, (vocab_size, hidden_size), device, dtype = len(head.rows), head.weight.shape, head.hidden.device, head.stat_dtype
    grad_hidden = torch.zeros(num_rows, hidden_size, dtype=dtype, device=device) if need_hidden else None
    grad_weight = (
        torch.empty(head.weight.shape, dtype=head.weight.dtype, device=device) if need_weight and grad_weight_out is None else None
    )
    grad_bias = torch.zeros(vocab_size, dtype=dtype, device=device) if need_bias else None
    num_resident = int((slots >= 0).sum()) if resident is not None and slots is not None else 0
    block, chunk = _row_block(device), CHUNK if keep is None else VOCAB_BLOCK

    for start in range(0, vocab_size, chunk):
        weight_chunk = head.weight[start : start + chunk].to(dtype)
        columns = len(weight_chunk)
        grad_chunk = torch.zeros(columns, hidden_size, dtype=dtype, device=device) if need_weight else None
        members = torch.arange(num_rows, device=device) if keep is None else keep[:, start // VOCAB_BLOCK].nonzero()[:, 0]
        stored = num_resident if keep is None else int((members < num_resident).sum())
        # Blocks never mix stored and recomputed rows.
        blocks = [(i, min(i + block, stored)) for i in range(0, stored, block)] + [
            (i, min(i + block, len(members))) for i in range(stored, len(members), block)
        ]
        for begin, end in blocks:
            index = members[begin:end]
            hidden_block = head.hidden.index_select(0, head.rows[index]).to(dtype)
            row_lse = lse[index, None].to(dtype)
            if begin < stored:
                assert resident is not None
                assert slots is not None
                saved = resident[slots[index], start : start + columns]
                if offsets is not None:
                    offset = offsets[slots[index], start // VOCAB_BLOCK : -(-(start + columns) // VOCAB_BLOCK)]
                    offset = offset.repeat_interleave(VOCAB_BLOCK, dim=1)[:, :columns]
                    p = saved.float() * (offset - row_lse).exp()
                    z = torch.where(saved > 0, saved.float().log() + offset, row_lse) if slope is not None or head.softcap else p
                else:
                    z = saved
                    p = (z - row_lse).exp()
            else:
                padded = torch.nn.functional.pad(hidden_block, (0, 0, 0, block - len(index)))
                z = _tile_logits(head, padded, weight_chunk, start)[: len(index)]
                p = (z - row_lse).exp()
            inner = prob_coef[index, None].to(dtype) + (0.0 if slope is None else slope[index, None].to(dtype) * z)
            dz = -p * inner
            # The target entry comes from the exact target logit: 1 - p cancels, a rounded p would not do.
            local = head.labels[index] - (head.vocab_start + start)
            owned = (local >= 0) & (local < columns)
            row_target = target[index].to(dtype)
            exact = target_coef[index].to(dtype) - (row_target - row_lse[:, 0]).exp() * (
                prob_coef[index].to(dtype) + (0.0 if slope is None else slope[index].to(dtype) * row_target)
            )
            at = local.clamp(0, columns - 1)[:, None]
            dz.scatter_(1, at, torch.where(owned[:, None], exact[:, None], dz.gather(1, at)))
            da = dz * logit_chain(head, z)
            if grad_hidden is not None:
                grad_hidden.index_add_(0, index, da @ weight_chunk)
            if grad_chunk is not None:
                grad_chunk.addmm_(da.T, hidden_block)
            if grad_bias is not None:
                grad_bias[start : start + columns] += da.sum(dim=0)
        if grad_chunk is not None:
            into = (grad_weight_out if grad_weight_out is not None else grad_weight)[start : start + columns]
            into.copy_(into.to(dtype) + grad_chunk if grad_weight_out is not None else grad_chunk)
    return Gradients(grad_hidden, grad_weight, None if grad_bias is None or head.bias is None else grad_bias.to(head.bias.dtype))
