"""KL divergence over the whole vocabulary between two heads, without either's logits.

KL(p || q) = Σ_v p_v (z_v - z'_v) - lse + lse'. The weighted sum is carried online like the other statistics, so p == q gives exactly 0.
"""

from __future__ import annotations

import torch
from llmcore.kernels.linear_logprob_core import Head
from llmcore.kernels.linear_logprob_inputs import _head
from llmcore.kernels.linear_logprob_ops import _no_second_derivative
from torch import Tensor


@torch.library.custom_op("llmcore::linear_kl", mutates_args=())
def _kl_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scored: Tensor,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    index = scored.reshape(-1).nonzero()[:, 0]
    outs = [torch.zeros(scored.numel(), dtype=torch.float64, device=hidden.device) for _ in range(3)]
    dtype = torch.float32
    for begin, end, tiles in _kl_blocks(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, index, shift, logit_scale, softcap, temperature
    ):
        state = None
        for _start, _w, _h, p_logits, q_logits in tiles:
            dtype = p_logits.dtype
            z, other, gap = p_logits.double(), q_logits.double(), (p_logits - q_logits).double()
            m, n = z.amax(dim=1), other.amax(dim=1)
            e = (z - m[:, None]).exp()
            piece = (m, e.sum(dim=1), (e * gap).sum(dim=1), n, (other - n[:, None]).exp().sum(dim=1))
            if state is not None:
                m, n = torch.maximum(m, state[0]), torch.maximum(n, state[3])
                a, b, c, d = (state[0] - m).exp(), (piece[0] - m).exp(), (state[3] - n).exp(), (piece[3] - n).exp()
                piece = (m, a * state[1] + b * piece[1], a * state[2] + b * piece[2], n, c * state[4] + d * piece[4])
            state = piece
        assert state is not None
        m, s, weighted, n, r = state
        lse, ref_lse = m + s.log(), n + r.log()
        for into, value in zip(outs, (weighted / s - lse + ref_lse, lse, ref_lse), strict=True):
            into[index[begin:end]] = value[: end - begin]
    if not len(index):
        dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    kl, lse, ref_lse = outs
    return kl.to(dtype).view(scored.shape), lse.view(scored.shape), ref_lse.view(scored.shape)


def _kl_blocks(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, index, shift, logit_scale, softcap, temperature):
    """Row blocks, each with an iterator over vocabulary chunks of (start, weight chunk, hidden block, logits, reference logits)."""
    from llmcore.kernels import linear_logprob_torch as chunked

    dummy = torch.zeros(scored.shape, dtype=torch.int64, device=scored.device)
    head, _ = _head(hidden, weight, bias, dummy, index, shift, 0, logit_scale, softcap, temperature)
    ref_head, _ = _head(ref_hidden, ref_weight, ref_bias, dummy, index, shift, 0, logit_scale, softcap, temperature)
    block = chunked._row_block(hidden.device)

    def tiles(h, ref_h):
        for start in range(0, len(weight), chunked.CHUNK):
            w, ref_w = (x.weight[start : start + chunked.CHUNK].to(x.stat_dtype) for x in (head, ref_head))
            yield start, w, h, chunked._tile_logits(head, h, w, start), chunked._tile_logits(ref_head, ref_h, ref_w, start)

    for begin in range(0, len(index), block):
        end = min(begin + block, len(index))
        yield begin, end, tiles(chunked._gather(head, begin, end, block), chunked._gather(ref_head, begin, end, block))


@_kl_op.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, *options):
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    return tuple(scored.new_empty(scored.shape, dtype=of) for of in (dtype, torch.float64, torch.float64))


@torch.library.custom_op("llmcore::linear_kl_grad", mutates_args=())
def _kl_grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    scored: Tensor,
    kl: Tensor,
    lse: Tensor,
    ref_lse: Tensor,
    upstream: Tensor,
    shift: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from llmcore.kernels.linear_logprob_torch import logit_chain

    index = (scored & (upstream != 0)).reshape(-1).nonzero()[:, 0]
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    none = hidden.new_empty(0)
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else none
    grad_weight = torch.zeros(weight.shape, dtype=dtype, device=hidden.device) if need_weight else none.clone()
    grad_bias = torch.zeros(len(weight), dtype=dtype, device=hidden.device) if need_bias else none.clone()
    options = Head(hidden, index, weight, bias, index, 0, logit_scale, softcap, temperature)
    for begin, end, tiles in _kl_blocks(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scored, index, shift, logit_scale, softcap, temperature
    ):
        part = index[begin:end]
        taken = [x.reshape(-1)[part][:, None].to(dtype) for x in (lse, ref_lse, kl, upstream)]
        rows = torch.zeros(end - begin, hidden.shape[-1], dtype=dtype, device=hidden.device)
        for start, w, h, p_logits, q_logits in tiles:
            z, other = p_logits[: end - begin], q_logits[: end - begin]
            log_p = z - taken[0]
            da = taken[3] * log_p.exp() * (log_p - (other - taken[1]) - taken[2]) * logit_chain(options, z)
            rows += da @ w
            if need_weight:
                grad_weight[start : start + len(w)].addmm_(da.T, h[: end - begin])
            if need_bias:
                grad_bias[start : start + len(w)] += da.sum(dim=0)
        if need_hidden:
            grad_hidden.view(-1, hidden.shape[-1]).index_copy_(0, part - shift, rows.to(hidden.dtype))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias if bias is None else grad_bias.to(bias.dtype)


@_kl_grad_op.register_fake
def _(hidden, weight, bias, *others):
    need_hidden, need_weight, need_bias = others[-3:]
    return (
        torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else hidden.new_empty(0),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else weight.new_empty(0),
        torch.empty_like(bias) if need_bias else (hidden if bias is None else bias).new_empty(0),
    )


def _kl_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _kl_backward(ctx, upstream, *_others):
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = (None,) * 3
    if upstream is not None:
        made = _kl_grad_op(*saved, upstream, *ctx.options, *needs)
        grads = tuple(g if needed else None for g, needed in zip(made, needs, strict=True))
    return (*grads, *[None] * 8)


_kl_op.register_autograd(_kl_backward, setup_context=_kl_setup)
_kl_grad_op.register_autograd(_no_second_derivative)
