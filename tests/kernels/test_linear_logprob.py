"""Fused linear log-probability: values, gradients, invariances, options, errors, for every backend that serves CPU tensors."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from llmcore.kernels import backends
from llmcore.kernels import linear_logprob_ops as module
from llmcore.kernels.linear_logprob import fused_linear_cross_entropy, fused_linear_logprob, linear_logprob_reference
from llmcore.kernels.linear_logprob_inputs import _head
from llmcore.kernels.preference import fused_preference_loss

from llmcore.losses import Hinge

# (N, V, D): single row, vocabulary no power of two, one less / one more than the blocks of 512 columns, 96 and 64 rows
SHAPES = [(1, 1003, 40), (7, 11, 3), (65, 511, 17), (97, 513, 64), (130, 1537, 33)]
BACKENDS = ["torch", "cpp"]
VALUES = ("logp", "lse", "entropy", "target_logit", "mean_logit", "log_sum_sq")


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = backends.unavailable("linear_logprob", request.param, "cpu")
    if reason:
        pytest.skip(reason)
    return request.param


def _inputs(n, v, d, dtype=torch.float32, seed=0, scale=1.0, bias=False):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    weight = (torch.randn(v, d, generator=g, dtype=torch.float64) * scale / math.sqrt(d)).to(dtype)
    labels = torch.randint(v, (n,), generator=g)
    labels[-1] = v - 1
    if n > 4:
        labels[::3] = -100
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype) if bias else None
    return hidden, weight, labels, b


def _run(function, hidden, weight, labels, bias=None, *, upstream_seed=1, outputs=("logp",), **options):
    """(result, gradients of a random combination of the differentiable outputs)."""
    leaves = [hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()]
    if bias is not None:
        leaves.append(bias.detach().clone().requires_grad_())
    out = function(leaves[0], leaves[1], labels, bias=leaves[2] if bias is not None else None, outputs=outputs, **options)
    g = torch.Generator().manual_seed(upstream_seed)
    total = 0.0
    for name in ("logp", "lse", "entropy", "target_logit"):
        if name in outputs:
            total = total + (getattr(out, name) * torch.randn(labels.shape, generator=g, dtype=torch.float64)).sum()
    return out, torch.autograd.grad(total, leaves)


OPTIONS = {
    "plain": {},
    "scale and temperature": {"logit_scale": 0.7, "temperature": 1.3},
    "softcap": {"softcap": 3.0},
    "everything": {"logit_scale": 1.7, "softcap": 4.0, "temperature": 0.8},
    "no scale": {"logit_scale": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("mode", ["recompute", "resident"])
def test_float64_matches_reference_in_every_option(backend, mode, options):
    for (n, v, d), bias in itertools.product(SHAPES, (False, True)):
        hidden, weight, labels, b = _inputs(n, v, d, torch.float64, bias=bias, scale=3.0)
        wanted = (*VALUES, "is_top1")
        truth, expected = _run(linear_logprob_reference, hidden, weight, labels, b, outputs=wanted, **options)
        ours, grads = _run(fused_linear_logprob, hidden, weight, labels, b, outputs=wanted, mode=mode, backend=backend, **options)
        for name in VALUES:
            torch.testing.assert_close(
                getattr(ours, name), getattr(truth, name), rtol=1e-12, atol=1e-12, msg=lambda m, at=(n, v, d, name): f"{at}: {m}"
            )
        assert torch.equal(ours.is_top1, truth.is_top1)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["recompute", "resident"])
def test_error_against_float64_on_the_same_inputs(backend, error_rule, mode, dtype):
    for n, v, d in SHAPES:
        hidden, weight, labels, b = _inputs(n, v, d, dtype, bias=True, scale=2.0)
        wanted = VALUES
        truth, expected = _run(linear_logprob_reference, hidden.double(), weight.double(), labels, b.double(), outputs=wanted)
        baseline, baseline_grads = _run(linear_logprob_reference, hidden, weight, labels, b, outputs=wanted)
        ours, grads = _run(fused_linear_logprob, hidden, weight, labels, b, outputs=wanted, mode=mode, backend=backend)
        for name in VALUES:
            error_rule(name, getattr(ours, name), getattr(truth, name), getattr(baseline, name), atol=2e-6)
        assert (ours.logp.double() - truth.logp).abs().max() <= (2e-6 if dtype == torch.float32 else 5e-5)
        limit = 5e-7 if dtype == torch.float32 else 4e-3
        for got, want, base in zip(grads, expected, baseline_grads, strict=True):
            error = (got.double() - want).norm() / want.norm()
            assert error <= max(limit, 2 * (base.double() - want).norm() / want.norm()), (n, v, d, float(error))


@pytest.fixture(scope="module")
def prose(smollm2):
    """(hidden states, head, labels) in bfloat16 of 512 tokens of prose under SmolLM2, and their float64 log-probabilities."""
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text()
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids[:, :513]
    model = smollm2.model
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids[:, :-1]).last_hidden_state[0].bfloat16()
    weight, labels = model.get_output_embeddings().weight.detach().bfloat16(), ids[0, 1:]
    wide = weight.double()
    truth = torch.cat(
        [
            linear_logprob_reference(rows.double(), wide, part).logp
            for rows, part in zip(hidden.split(64), labels.split(64), strict=True)
        ]
    )
    return hidden, weight, labels, truth


def test_real_512_token_completion_in_bfloat16_is_within_a_hundredth_of_a_nat(backend, prose):
    hidden, weight, labels, truth = prose
    assert len(labels) == 512
    ours = fused_linear_logprob(hidden, weight, labels, backend=backend).logp
    assert ours.dtype == torch.float32
    assert abs(float(ours.double().sum() - truth.sum())) <= 0.01
    assert (ours.double() - truth).abs().max() <= 5e-5
    rounded = (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0].double()
    assert (rounded - truth).abs().max() > 5e-3  # what rounding the logits to bfloat16 would have cost a token


def test_gradcheck_of_the_reference_and_of_each_backend(backend):
    hidden, weight, labels, b = _inputs(5, 23, 7, torch.float64, bias=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, b)]
    for chosen, options in itertools.product(("reference", backend), ({}, {"softcap": 2.0, "temperature": 0.9, "logit_scale": 1.3})):

        def scalar(h, w, c, chosen=chosen, options=options):
            out = fused_linear_logprob(h, w, labels, bias=c, backend=chosen, outputs=("logp", "lse", "entropy"), **options)
            return out.logp, out.lse, out.entropy

        assert torch.autograd.gradcheck(scalar, leaves)


def test_kl_full_against_second_head(backend):
    hidden, weight, labels, b = _inputs(9, 700, 12, torch.float64, bias=True, scale=2.0)
    ref = tuple(x.double() for x in (hidden + 0.3, weight * 0.9, b * 0.5))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, b)]
    ours, truth = (
        fused_linear_logprob(leaves[0], leaves[1], labels, bias=leaves[2], ref=ref, outputs=("logp", "kl_full"), softcap=6.0, backend=name)
        for name in (backend, "reference")
    )
    torch.testing.assert_close(ours.kl_full, truth.kl_full, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for got, want in zip(*(torch.autograd.grad((x.kl_full * upstream).sum(), leaves) for x in (ours, truth)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    same = fused_linear_logprob(hidden, weight, labels, bias=b, ref=(hidden, weight, b), outputs=("kl_full",), backend=backend)
    assert same.logp is None
    assert torch.equal(same.kl_full, torch.zeros(9, dtype=torch.float64))
    with pytest.raises(ValueError, match="ref"):
        fused_linear_logprob(hidden, weight, labels, outputs=("kl_full",), backend=backend)


# ---- invariances: a row's bits do not depend on its neighbours -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_of_one_equals_batch_of_64_and_of_700_bitwise(backend, dtype):
    hidden, weight, _, _ = _inputs(700, 1100, 129, dtype)
    labels = torch.arange(700) % 1100
    whole = fused_linear_logprob(hidden, weight, labels, backend=backend, outputs=("logp", "entropy"))
    batch = fused_linear_logprob(hidden[:64], weight, labels[:64], backend=backend, outputs=("logp", "entropy"))
    assert torch.equal(batch.logp, whole.logp[:64])
    assert torch.equal(batch.entropy, whole.entropy[:64])
    for i in (0, 1, 5, 6, 63, 64, 95, 96, 511, 512, 699):
        alone = fused_linear_logprob(hidden[i : i + 1], weight, labels[i : i + 1], backend=backend, outputs=("logp", "entropy"))
        assert torch.equal(alone.logp[0], whole.logp[i])
        assert torch.equal(alone.entropy[0], whole.entropy[i])


def test_permuting_adding_ignored_rows_mode_budget_and_threads_change_no_bit_of_logp(backend):
    hidden, weight, labels, _ = _inputs(150, 1100, 40)
    first, grads = _run(fused_linear_logprob, hidden, weight, labels, backend=backend, mode="recompute")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(5))
    assert torch.equal(fused_linear_logprob(hidden[order], weight, labels[order], backend=backend).logp, first.logp[order])
    more = torch.cat([torch.full((40, 40), 7.0), hidden]), torch.cat([torch.full((40,), -100), labels])
    assert torch.equal(fused_linear_logprob(more[0], weight, more[1], backend=backend).logp[40:], first.logp)
    threads = torch.get_num_threads()
    for options in ({"mode": "resident"}, {"mode": "resident", "memory_budget": 1 << 20}, {"mode": "auto", "memory_budget": 0}):
        try:
            torch.set_num_threads(2)
            other, other_grads = _run(fused_linear_logprob, hidden, weight, labels, backend=backend, **options)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(other.logp, first.logp)
        for got, want in zip(other_grads, grads, strict=True):
            assert (got - want).norm() <= 1e-6 * want.norm()


def test_policy_equal_to_reference_gives_exactly_ln2(backend):
    hidden, weight, labels, _ = _inputs(96, 1003, 40)
    policy = fused_linear_logprob(hidden.requires_grad_(), weight, labels, backend=backend).logp.view(4, 24)
    cached = torch.stack(
        [
            fused_linear_logprob(hidden.detach()[i * 24 : (i + 1) * 24], weight, labels[i * 24 : (i + 1) * 24], backend=backend).logp
            for i in range(4)
        ]
    )
    margin = (policy - cached).sum(dim=1)
    loss = -torch.nn.functional.logsigmoid(margin[:2] - margin[2:]).mean()
    assert torch.equal(margin, torch.zeros(4))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_large_logits_stay_finite(backend):
    hidden, weight, labels, _ = _inputs(33, 1003, 40)
    for factor in (1e4, 1e6):
        ours, grads = _run(fused_linear_logprob, hidden * factor, weight, labels, backend=backend, outputs=("logp", "entropy"))
        truth = linear_logprob_reference((hidden * factor).double(), weight.double(), labels)
        assert all(torch.isfinite(x).all() for x in (ours.logp, ours.entropy, *grads))
        torch.testing.assert_close(ours.logp.double(), truth.logp, rtol=2e-6, atol=2e-6 * factor)


def test_is_top1_first_maximum_wins(backend):
    weight = torch.zeros(1030, 4)
    weight[[3, 700, 1029]] = 1.0
    labels = torch.tensor([3, 700, 1029, 5])
    out = fused_linear_logprob(torch.ones(4, 4), weight, labels, outputs=("is_top1",), backend=backend)
    assert out.is_top1.tolist() == [True, False, False, False]


def test_nan_propagates(backend):
    hidden, weight, labels, _ = _inputs(6, 600, 8)
    weight[550, 2] = math.nan
    logp = fused_linear_logprob(hidden, weight, labels, backend=backend).logp
    assert logp[labels != -100].isnan().all()
    assert torch.equal(logp[labels == -100], torch.zeros(2))


# ---- what is computed, and what is not -------------------------------------------------------------------------------


def test_gemm_units_are_those_of_the_table(backend):
    hidden, weight, labels, _ = _inputs(60, 600, 16)

    def units(need_hidden=True, need_weight=True, **options):
        h, w = hidden.clone().requires_grad_(need_hidden), weight.clone().requires_grad_(need_weight)
        out = fused_linear_logprob(h, w, labels, backend=backend, **options)
        if need_hidden or need_weight:
            out.logp.sum().backward()
        return out.stats.gemm_units, out.stats.mode

    assert units(False, False) == (1, "score")
    assert units(mode="recompute") == (4, "recompute")
    assert units(mode="resident") == (3, "resident")
    assert units(need_weight=False, mode="recompute") == (2, "recompute")
    assert units(need_weight=False)[0] == 2
    assert units(need_hidden=False, mode="recompute")[0] == 3
    assert units(need_hidden=False, mode="resident")[0] == 2
    half = module._implementation(backend).scratch_bytes(40, 16, 600, False) + 20 * 600 * 4
    assert units(mode="resident", memory_budget=half) == (3.5, "mixed")


def test_frozen_head_and_frozen_hidden_allocate_no_gradient_of_theirs(backend, monkeypatch):
    hidden, weight, labels, _ = _inputs(20, 600, 16)
    asked = []
    real = module._implementation(backend).backward
    monkeypatch.setattr(
        module._implementation(backend), "backward", lambda *a, **k: asked.append((k["need_hidden"], k["need_weight"])) or real(*a, **k)
    )
    h = hidden.clone().requires_grad_()
    fused_linear_logprob(h, weight, labels, backend=backend).logp.sum().backward()
    assert asked == []  # the frozen head's direction was accumulated by the forward
    expected = torch.autograd.grad(linear_logprob_reference(h, weight, labels).logp.sum(), h)[0]
    torch.testing.assert_close(h.grad, expected, rtol=1e-5, atol=1e-6)
    out = fused_linear_logprob(h, weight, labels, backend=backend, outputs=("logp", "entropy"))
    out.entropy.sum().backward()
    w = weight.clone().requires_grad_()
    fused_linear_logprob(hidden, w, labels, backend=backend).logp.sum().backward()
    assert asked == [(True, False), (False, True)]


def test_rows_with_zero_gradient_are_skipped_in_backward(backend):
    hidden, weight, labels, _ = _inputs(50, 600, 16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    out = fused_linear_logprob(h, w, labels, backend=backend, mode="recompute")
    scored = (labels != -100).nonzero()[:, 0]
    (out.logp[scored[:3]].sum()).backward()
    assert out.stats.rows_backward == 3
    assert out.stats.gemm_units == pytest.approx(1 + 3 * 3 / len(scored))
    expected = torch.autograd.grad(linear_logprob_reference(h, w, labels).logp[scored[:3]].sum(), (h, w))
    torch.testing.assert_close(h.grad, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w.grad, expected[1], rtol=1e-5, atol=1e-6)
    inactive = fused_linear_logprob(h, w, labels, backend=backend, mode="recompute")
    (torch.relu(-1.0 + 0.0 * inactive.logp.sum()) + 0.0 * inactive.logp.sum()).backward()
    assert inactive.stats.rows_backward == 0
    assert inactive.stats.gemm_units == 1


def test_prompt_rows_are_never_projected(backend):
    hidden, weight, labels, _ = _inputs(64, 600, 16)
    labels = labels.abs() % 600
    labels[:32] = -100
    hidden[:32] = math.nan  # would poison everything if it entered a product
    ours, (grad_hidden, grad_weight) = _run(fused_linear_logprob, hidden, weight, labels, backend=backend)
    assert ours.stats.rows_scored == 32
    assert torch.isfinite(grad_weight).all()
    assert torch.equal(grad_hidden[:32], torch.zeros(32, 16))
    assert torch.equal(ours.logp[:32], torch.zeros(32))


def test_gradient_over_1024_chunks_equals_one_chunk(backend):
    hidden, weight, labels, _ = _inputs(3072, 520, 12, torch.bfloat16)
    _, whole = _run(fused_linear_logprob, hidden, weight, labels, backend=backend, mode="recompute")
    total = torch.zeros(520, 12)
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = weight.clone().requires_grad_()
    once = torch.zeros(520, 12)
    logp = fused_linear_logprob(hidden, leaf, labels, backend=backend, mode="recompute", accumulate_into=once).logp
    (logp * upstream).sum().backward()
    for i in range(0, 3072, 3):
        part = slice(i, i + 3)
        logp = fused_linear_logprob(hidden[part], leaf, labels[part], backend=backend, mode="recompute", accumulate_into=total).logp
        (logp * upstream[part]).sum().backward()
    assert leaf.grad is None
    truth = _run(linear_logprob_reference, hidden.double(), weight.double(), labels)[1][1]
    assert (total - once).norm() <= 1e-6 * once.norm()
    # The compiled kernel may round da to bfloat16 before its products, once per element whatever the chunk; the torch backend does not.
    assert (total.double() - truth).norm() <= (4e-3 if backend == "cpp" else 1e-6) * truth.norm()
    assert (whole[1].double() - truth).norm() <= 4e-3 * truth.norm()


def test_accumulate_into_adds_and_never_overwrites(backend):
    hidden, weight, labels, _ = _inputs(20, 600, 16)
    leaf = weight.clone().requires_grad_()
    expected = torch.autograd.grad(linear_logprob_reference(hidden, leaf, labels).logp.sum(), leaf)[0]
    buffer = torch.ones(600, 16)
    fused_linear_logprob(hidden, leaf, labels, backend=backend, accumulate_into=buffer).logp.sum().backward()
    torch.testing.assert_close(buffer, expected + 1, rtol=1e-5, atol=1e-6)
    half = weight.bfloat16().requires_grad_()
    small = torch.ones(600, 16, dtype=torch.bfloat16)
    fused_linear_logprob(hidden.bfloat16(), half, labels, backend=backend, accumulate_into=small).logp.sum().backward()
    assert (small.float() - (expected + 1)).abs().max() < 0.02
    tied = weight.clone().requires_grad_()  # tied embedding: both uses add up in .grad
    (fused_linear_logprob(hidden, tied, labels, backend=backend).logp.sum() + tied[labels.clamp(min=0)].sum()).backward()
    counts = torch.zeros(600).index_add_(0, labels.clamp(min=0), torch.ones(20))
    torch.testing.assert_close(tied.grad, expected + counts[:, None], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="accumulate_into"):
        fused_linear_logprob(hidden, weight, labels, accumulate_into=buffer)


def test_gradient_filter_bounds_the_dropped_mass_and_is_off_by_default():
    hidden, weight, labels, _ = _inputs(40, 6000, 32, scale=9.0)
    _, exact = _run(fused_linear_logprob, hidden, weight, labels, backend="torch")
    out, grads = _run(fused_linear_logprob, hidden, weight, labels, grad_filter=1e-3)
    assert out.stats.backend == "torch"
    assert out.stats.kept_tile_fraction < 0.9
    assert 0 < out.stats.dropped_mass <= 1e-3
    for got, want in zip(grads, exact, strict=True):
        assert 0 < (got - want).norm() <= 5e-3 * want.norm()
    flat = _run(fused_linear_logprob, hidden, weight * 0, labels, grad_filter=1e-3)[0]
    assert flat.stats.kept_tile_fraction == 1.0  # near-uniform rows have nothing negligible
    if backends.unavailable("linear_logprob", "cpp", "cpu") is None:
        with pytest.raises(RuntimeError, match="grad_filter"):
            fused_linear_logprob(hidden, weight, labels, grad_filter=1e-3, backend="cpp")


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_shift_and_packed_sequences_equal_slicing(backend):
    hidden, weight, labels, _ = _inputs(3 * 9, 600, 16)
    hidden, labels = hidden.view(3, 9, 16), labels.view(3, 9)
    ours, grads = _run(fused_linear_logprob, hidden, weight, labels, shift=1, backend=backend)
    truth = linear_logprob_reference(hidden[:, :-1].reshape(-1, 16), weight, labels[:, 1:].reshape(-1)).logp.view(3, 8)
    torch.testing.assert_close(ours.logp[:, 1:], truth, rtol=1e-5, atol=2e-6)
    assert torch.equal(ours.logp[:, 0], torch.zeros(3))
    _, expected = _run(linear_logprob_reference, hidden, weight, labels, shift=1)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    flat, flat_labels = hidden.reshape(-1, 16), labels.reshape(-1)
    cu = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
    assert torch.equal(fused_linear_logprob(flat, weight, flat_labels, shift=1, cu_seqlens=cu, backend=backend).logp.view(3, 9), ours.logp)
    uneven = torch.tensor([0, 1, 1, 20, 27], dtype=torch.int32)
    packed = fused_linear_logprob(flat, weight, flat_labels, shift=1, cu_seqlens=uneven, backend=backend).logp
    assert packed[0] == packed[1] == packed[20] == 0
    assert torch.equal(packed[2:9], ours.logp[0, 2:])


def test_non_contiguous_hidden_int32_labels_and_a_float32_master_weight(backend):
    hidden, weight, labels, _ = _inputs(4 * 7, 600, 16)
    wide, labels = hidden.view(4, 7, 16), labels.view(4, 7)
    sliced, aligned = wide[:, :-1], labels[:, 1:]
    a, grads = _run(fused_linear_logprob, wide, weight, labels, shift=1, backend=backend)
    leaf = wide.clone().requires_grad_()
    b = fused_linear_logprob(leaf[:, :-1], weight, aligned.int(), backend=backend)
    assert torch.equal(b.logp, a.logp[:, 1:])
    g = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, 1:]
    (b.logp * g).sum().backward()
    torch.testing.assert_close(leaf.grad, grads[0], rtol=1e-4, atol=1e-6)
    transposed = fused_linear_logprob(sliced.transpose(0, 1), weight, aligned.T, backend=backend).logp
    assert torch.equal(transposed.T, b.logp)
    columns = weight.T.contiguous().T  # unit stride along the vocabulary
    assert torch.equal(fused_linear_logprob(sliced, columns, aligned, backend=backend).logp, b.logp)
    mixed = fused_linear_logprob(sliced.bfloat16(), weight, aligned, backend=backend).logp
    truth = linear_logprob_reference(sliced.bfloat16().double(), weight.double(), aligned).logp
    assert (mixed.double() - truth).abs().max() < 5e-6


def test_no_scored_row_gives_zeros_connected_to_the_graph(backend):
    hidden, weight, _, b = _inputs(6, 600, 16, bias=True)
    for labels, shift in ((torch.full((6,), -100), 0), (torch.full((6,), 3), 9)):
        out, grads = _run(fused_linear_logprob, hidden, weight, labels, b, backend=backend, shift=shift, outputs=("logp", "entropy"))
        assert out.logp.requires_grad
        assert torch.equal(out.logp, torch.zeros(6))
        assert all(torch.equal(x, torch.zeros_like(x)) for x in grads)
        assert float(fused_linear_cross_entropy(hidden, weight, labels, shift=shift, backend=backend)) == 0
    empty = fused_linear_logprob(hidden[:0].requires_grad_(), weight, torch.zeros(0, dtype=torch.int64), backend=backend)
    empty.logp.sum().backward()
    assert empty.logp.shape == (0,)


def test_ignore_index_that_is_a_valid_token(backend):
    hidden, weight, _, _ = _inputs(4, 600, 16)
    labels = torch.tensor([0, 5, 0, 7])
    by_value = fused_linear_logprob(hidden, weight, labels, ignore_index=0, backend=backend)
    assert by_value.stats.rows_scored == 2
    mask = torch.tensor([True, True, False, True])
    by_mask = fused_linear_logprob(hidden, weight, labels, ignore_index=0, label_mask=mask, backend=backend)
    assert by_mask.stats.rows_scored == 3
    assert by_mask.logp[0] != 0
    assert by_mask.logp[2] == 0


def test_more_than_65535_rows_and_small_offsets(backend):
    rows = 70_001
    hidden, weight, _, _ = _inputs(rows, 7, 3)
    labels = torch.arange(rows) % 7
    ours, grads = _run(fused_linear_logprob, hidden, weight, labels, backend=backend)
    _, expected = _run(linear_logprob_reference, hidden, weight, labels)
    assert torch.equal(ours.logp[-1:], fused_linear_logprob(hidden[-1:], weight, labels[-1:], backend=backend).logp)
    torch.testing.assert_close(grads[0], expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grads[1], expected[1], rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_more_than_two_to_the_31_logits_kept():
    hidden, weight, labels, _ = _inputs(16400, 131072, 8, torch.bfloat16)
    _, grads = _run(fused_linear_logprob, hidden, weight, labels, mode="resident")
    assert all(torch.isfinite(g).all() for g in grads)


def test_bias_counts_once_when_hidden_is_longer_than_any_split(backend):
    hidden, weight, labels, b = _inputs(10, 600, 4 * 256 + 1, bias=True)
    ours = fused_linear_logprob(hidden, weight, labels, bias=b, backend=backend).logp
    truth = linear_logprob_reference(hidden.double(), weight.double(), labels, bias=b.double()).logp
    assert (ours.double() - truth).abs().max() < 4e-6
    assert (ours <= 0).all()


def test_softcap_gradient_past_the_last_column(backend):
    hidden, weight, labels, _ = _inputs(9, 513, 16, torch.float64, scale=20.0)  # one column in the last block
    labels[1] = 512
    for mode in ("recompute", "resident"):
        _, grads = _run(fused_linear_logprob, hidden, weight, labels, softcap=1.5, mode=mode, backend=backend)
        _, expected = _run(linear_logprob_reference, hidden, weight, labels, softcap=1.5)
        for got, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_float16_gradients_of_a_mean_over_many_rows_do_not_underflow(backend):
    hidden, weight, _, _ = _inputs(65_536, 16, 4, torch.float16)
    labels = torch.arange(65_536) % 16
    leaf = weight.requires_grad_()
    fused_linear_cross_entropy(hidden, leaf, labels, backend=backend).backward()
    truth = weight.detach().double().requires_grad_()
    linear_logprob_reference(hidden.double(), truth, labels).logp.mean().neg().backward()
    assert (leaf.grad.double() - truth.grad).norm() <= 4e-3 * truth.grad.norm()


# ---- autograd and compiler contract ----------------------------------------------------------------------------------


def test_second_backward_over_a_retained_graph_is_the_same(backend):
    hidden, weight, labels, _ = _inputs(20, 600, 16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for mode in ("recompute", "resident"):
        loss = fused_linear_logprob(*leaves, labels, backend=backend, mode=mode).logp.square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(backends.unavailable("linear_logprob", "cpp", "cpu") is not None, reason="the compiled backend is not built")
def test_logits_kept_in_the_gradients_memory_give_the_bits_of_recomputed_ones():
    for n, v, d in ((700, 1100, 600), (90, 1100, 40)):  # more kept rows than a wave; more rows than the gradient's memory holds
        hidden, weight, labels, _ = _inputs(n, v, d)
        labels[:3] = 7  # rows past the first lose theirs
        upstream = torch.randn(n, generator=torch.Generator().manual_seed(2))
        upstream[torch.arange(n) % 5 == 0] = 0  # rows without a gradient leave gaps among the kept ones
        leaves = hidden.requires_grad_(), weight.requires_grad_()

        def gradients(logp, wanted, upstream=upstream, **options):
            return torch.autograd.grad(logp, wanted, upstream, **options)

        exact = gradients(fused_linear_logprob(*leaves, labels, backend="cpp", mode="recompute").logp, leaves)
        row = 4 * v
        for budget in (None, module._implementation("cpp").scratch_bytes(n, d, v, False) + n // 3 * row):
            kept = fused_linear_logprob(*leaves, labels, backend="cpp", mode="resident", memory_budget=budget)
            assert kept.stats.mode == ("resident" if budget is None else "mixed")
            only_hidden = gradients(kept.logp, leaves[:1], retain_graph=True)  # reads the logits and leaves them there
            assert torch.equal(only_hidden[0], exact[0])
            for options in ({"create_graph": True}, {"retain_graph": True}, {}):  # the last time they are gone
                assert all(torch.equal(a, b) for a, b in zip(gradients(kept.logp, leaves, **options), exact, strict=True))


def test_released_logits_are_recomputed_when_a_gradient_comes_after_all(backend):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, labels, _ = _inputs(40, 600, 16, dtype)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        exact = torch.autograd.grad(fused_linear_logprob(*leaves, labels, backend=backend, mode="recompute").logp.sum(), leaves)
        kept = fused_linear_logprob(*leaves, labels, backend=backend, mode="resident")
        kept.release()
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(kept.logp.sum(), leaves), exact, strict=True))
        assert kept.stats.gemm_units == 4


def test_second_derivative_is_refused_with_the_way_out(backend):
    hidden, weight, labels, _ = _inputs(6, 50, 4, torch.float64)
    h = hidden.requires_grad_()
    grad = torch.autograd.grad(fused_linear_logprob(h, weight, labels, backend=backend).logp.sum(), h, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()
    grad = torch.autograd.grad(fused_linear_logprob(h, weight, labels, backend="reference").logp.sum(), h, create_graph=True)[0]
    grad.sum().backward()


def test_activation_checkpointing(backend):
    hidden, weight, labels, _ = _inputs(20, 600, 16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    plain = torch.autograd.grad(fused_linear_logprob(*leaves, labels, backend=backend).logp.sum(), leaves)
    loss = torch.utils.checkpoint.checkpoint(
        lambda h, w: fused_linear_logprob(h, w, labels, backend=backend).logp.sum(), *leaves, use_reentrant=False
    )
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, leaves), plain, strict=True))


def test_opcheck(backend):
    hidden, weight, labels, b = _inputs(9, 600, 16, bias=True)
    rows = int((labels != -100).sum())
    leaves = [x.requires_grad_() for x in (hidden, weight, b)]
    for capacity, in_gradient in ((0, 0), (rows, 0), (rows, rows if backend == "cpp" else 0)):
        args = (*leaves, labels, None, None, None, -100, 0, 1.0, 0.0, 1.0, 15, capacity, in_gradient, False, 0.0, 0, 600, "", backend, 0)
        # What is kept in the gradient's memory is never traced: fused_linear_logprob asks for it outside compiled regions alone.
        traced = () if in_gradient else ("test_autograd_registration", "test_aot_dispatch_dynamic")
        torch.library.opcheck(module._op, args, test_utils=("test_schema", "test_faketensor", *traced))
    args = (*args[:13], 0, *args[14:])
    saved = [x.detach() for x in module._op(*args)]
    upstream = torch.randn(9, generator=torch.Generator().manual_seed(0))
    backward = (
        None,
        None,
        *(x.detach() for x in leaves),
        labels,
        None,
        None,
        saved[1],
        saved[2],
        upstream,
        upstream,
        None,
        *saved[7:11],
        -100,
        0,
        1.0,
        0.0,
        1.0,
        0.0,
        0,
        0,
        "",
        backend,
        0,
        True,
        True,
        True,
    )
    torch.library.opcheck(module._grad_op, backward, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_compile_fullgraph_without_recompilation_for_new_lengths(backend):
    weight = _inputs(1, 600, 16)[1].requires_grad_()

    def loss(hidden, labels):
        out = fused_linear_logprob(hidden, weight, labels, shift=1, outputs=("logp", "entropy"), backend=backend)
        return (2 * out.logp + out.entropy).sum() + fused_linear_cross_entropy(hidden, weight, labels, backend=backend)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    seen = []
    for length in (7, 9, 12, 31):
        hidden = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length)).requires_grad_()
        labels = torch.randint(600, (3, length), generator=torch.Generator().manual_seed(length))
        labels[0, :3] = -100
        ours, expected = compiled(hidden, labels), loss(hidden, labels)
        torch.testing.assert_close(ours, expected)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b)
        seen.append(counter.frame_count)
    assert seen[1:] == [seen[1]] * 3  # the second length makes it dynamic, none after compiles again


@pytest.mark.slow
def test_inductor_compiles_one_graph_for_every_length(backend):
    """The default compiler; lengths as a trainer brings them: the first one static, the second makes the size symbolic, no third graph."""
    weight = _inputs(1, 600, 16)[1].requires_grad_()

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = torch.nn.Linear(16, 16)

        def forward(self, states, labels):
            out = fused_linear_logprob(self.trunk(states).relu(), weight, labels, shift=1, outputs=("logp", "entropy"), backend=backend)
            return (2 * out.logp + out.entropy).sum() / labels.numel()

    torch.manual_seed(0)
    scorer = Scorer()
    torch._dynamo.reset()
    compiled = torch.compile(scorer, fullgraph=True)
    for length in (7, 9, 12, 31, 64):
        states = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length))
        labels = torch.randint(600, (3, length), generator=torch.Generator().manual_seed(length))
        labels[0, :3] = -100
        leaves = (weight, *scorer.parameters())
        with torch._dynamo.config.patch(error_on_recompile=length > 9):
            ours = torch.autograd.grad(compiled(states, labels), leaves)
        for got, want in zip(ours, torch.autograd.grad(scorer(states, labels), leaves), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_label_out_of_range_raises(backend):
    hidden, weight, labels, _ = _inputs(6, 600, 8)
    for wrong in (600, -1, 10**9):
        labels[1] = wrong
        for name in (backend, "reference"):
            with pytest.raises(ValueError, match="labels"):
                fused_linear_logprob(hidden, weight, labels, backend=name)


class _DTensorLike(torch.Tensor):
    placements = ()
    device_mesh = None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, "labels"),
        ({"labels": torch.zeros(6)}, TypeError, "labels"),
        ({"weight": torch.zeros(600, 9)}, ValueError, "hidden_size"),
        ({"weight": torch.zeros(600, 8, dtype=torch.float64)}, TypeError, "float64"),
        ({"weight": torch.nn.Linear(8, 600)}, TypeError, "merge adapters"),
        ({"weight": torch.zeros(600, 8).as_subclass(_DTensorLike)}, TypeError, "DTensor"),
        ({"hidden_states": torch.zeros(6, 8, dtype=torch.int64)}, TypeError, "hidden_states"),
        ({"bias": torch.zeros(5)}, ValueError, "bias"),
        ({"label_mask": torch.ones(6)}, ValueError, "label_mask"),
        ({"shift": -1}, ValueError, "shift"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "cu_seqlens"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"logit_scale": math.inf}, ValueError, "logit_scale"),
        ({"outputs": ("logits",)}, ValueError, "outputs"),
        ({"mode": "fast"}, ValueError, "mode"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"grad_filter": 2.0}, ValueError, "grad_filter"),
        ({"vocab_range": (0, 5)}, ValueError, "vocab_range"),
        ({"backend": "fastest"}, ValueError, "backend"),
        ({"label_smoothing": 0.1}, TypeError, "label_smoothing"),
    ],
)
def test_errors_name_the_argument(change, error, match):
    arguments = {"hidden_states": torch.zeros(6, 8), "weight": torch.zeros(600, 8), "labels": torch.zeros(6, dtype=torch.int64), **change}
    positional = [arguments.pop(name) for name in ("hidden_states", "weight", "labels")]
    with pytest.raises(error, match=match):
        fused_linear_logprob(*positional, **arguments)


def test_cross_entropy_reductions(backend):
    hidden, weight, labels, b = _inputs(12, 600, 16, bias=True)
    h = hidden.requires_grad_()
    expected = torch.nn.functional.cross_entropy(h @ weight.T + b, labels, reduction="none")
    for reduction in ("none", "sum", "mean"):
        ours = fused_linear_cross_entropy(h, weight, labels, bias=b, reduction=reduction, backend=backend)
        want = {"none": expected, "sum": expected.sum(), "mean": expected.sum() / (labels != -100).sum()}[reduction]
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=2e-6)
    with pytest.raises(ValueError, match="reduction"):
        fused_linear_cross_entropy(h, weight, labels, reduction="avg")


# ---- vocabulary-parallel ---------------------------------------------------------------------------------------------


def test_two_vocabulary_ranges_in_one_process_equal_one(backend):
    hidden, weight, labels, b = _inputs(20, 1003, 16, torch.float64, bias=True)
    wanted = ("logp", "lse", "target_logit")
    truth, expected = _run(linear_logprob_reference, hidden, weight, labels, b)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = [
        fused_linear_logprob(h, w[a:z], labels, bias=b[a:z], vocab_range=(a, z), outputs=wanted, backend=backend)
        for a, z in ((0, 700), (700, 1003))
    ]
    logp = parts[0].target_logit + parts[1].target_logit - torch.logaddexp(parts[0].lse, parts[1].lse)
    logp = torch.where(labels != -100, logp, 0.0)
    torch.testing.assert_close(logp, truth.logp, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for got, want in zip(torch.autograd.grad((logp * upstream).sum(), (h, w)), expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


WORKER = """
    import sys, torch, torch.distributed as dist
    rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from llmcore.kernels.linear_logprob import fused_linear_logprob, linear_logprob_reference, OUTPUTS
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((21, 16), (1003, 16), (1003,)))
    labels = torch.randint(1003, (21,), generator=g)
    labels[::4] = -100
    wanted = tuple(name for name in OUTPUTS if name != "kl_full")
    cut = (0, 700) if rank == 0 else (700, 1003)
    for frozen in (False, True):
        outputs = tuple(n for n in wanted if not (frozen and n == "entropy"))
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        local = weight[cut[0]:cut[1]].clone().requires_grad_(not frozen)
        ours = fused_linear_logprob(h, local, labels, bias=bias[cut[0]:cut[1]], outputs=outputs, process_group=dist.group.WORLD,
                                    softcap=5.0, backend=backend)
        h2 = hidden.clone().requires_grad_()
        truth = linear_logprob_reference(h2, w, labels, bias=bias, outputs=outputs, softcap=5.0)
        for name in outputs:
            torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-11, atol=1e-12)
        loss = lambda o: (o.logp * 2).sum() + (0 if frozen else o.entropy.square().sum())
        loss(ours).backward()
        loss(truth).backward()
        torch.testing.assert_close(h.grad, h2.grad, rtol=1e-10, atol=1e-12)
        if not frozen:
            torch.testing.assert_close(local.grad, w.grad[cut[0]:cut[1]], rtol=1e-10, atol=1e-12)
    labels[1] = 1003
    try:
        fused_linear_logprob(hidden, weight[cut[0]:cut[1]], labels, process_group=dist.group.WORLD, backend=backend)
    except ValueError as error:
        assert "labels" in str(error)
        print("done")
    dist.destroy_process_group()
"""


def test_two_real_processes_equal_one(backend, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), backend],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        out, error = worker.communicate(timeout=120)
        assert worker.returncode == 0, error
        assert "done" in out


# ---- memory and time -------------------------------------------------------------------------------------------------

MEMORY = """
    import json, os, re, sys, torch
    from pathlib import Path
    from llmcore.kernels.linear_logprob import fused_linear_logprob
    def field(name):
        return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    def warm(h, w):
        fused_linear_logprob(h.requires_grad_(), w, torch.zeros(1, dtype=torch.long)).logp.sum().backward()
    def measure(rows, vocab, dtype, mode, budget, frozen, size=64):
        dtype, g = getattr(torch, dtype), torch.Generator().manual_seed(0)
        h = torch.randn(rows, size, generator=g).to(dtype).requires_grad_()
        w = torch.randn(vocab, size, generator=g).to(dtype).requires_grad_(not frozen)
        y = torch.randint(vocab, (rows,), generator=g)
        warm(h.detach()[:1], w.detach()[:600])
        Path("/proc/self/clear_refs").write_text("5")
        before = field("VmRSS")
        out = fused_linear_logprob(h, w, y, mode=mode, memory_budget=budget)
        grads = torch.autograd.grad(out.logp.sum(), (h,) if frozen else (h, w))
        taken = field("VmHWM") - before - sum(x.numel() * x.element_size() for x in grads)
        print(json.dumps([taken, out.stats.scratch_bytes, out.stats.mode]), flush=True)
    warm(torch.ones(1, 64), torch.ones(600, 64))  # imports what a first call imports
    for case in json.loads(sys.argv[1]):  # one thread: a fork is a fresh process
        if (child := os.fork()) == 0:
            measure(*case)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


def _scratch(*cases):
    """[peak beside the gradients, bytes stated, mode taken] of each (rows, vocab, dtype, mode, budget, frozen head, hidden size = 64)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), json.dumps(cases)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's peak resident set")
@pytest.mark.skipif(backends.unavailable("linear_logprob", "cpp", "cpu") is not None, reason="the compiled backend is not built")
def test_peak_memory_in_a_fresh_process():
    mib = 1 << 20
    slack = 3 * mib  # the interpreter's own allocations and page rounding
    small, large, kept, held, plain, in_gradient, frozen, wide, half = _scratch(
        (512, 8192, "bfloat16", "recompute", None, False),
        (1024, 32768, "bfloat16", "recompute", None, False),  # 8 times the logits
        (1024, 32768, "bfloat16", "resident", None, False),
        (1024, 32768, "bfloat16", "resident", 24 * mib, False),  # less than the rows would take
        (64, 65536, "float32", "recompute", None, False),
        (64, 65536, "float32", "resident", None, False),  # 16 MiB of logits, in the gradient's 16 MiB
        (512, 65536, "float32", "recompute", None, True),
        (2048, 4096, "float32", "auto", None, True, 896),
        (2048, 4096, "bfloat16", "auto", None, True, 896),
    )
    assert [case[2] for case in (large, kept, held, in_gradient)] == ["recompute", "resident", "mixed", "resident"]
    assert small[0] <= small[1] + slack
    assert large[0] <= large[1] + slack
    assert large[0] <= 8 * mib  # the logits alone would be 64 MiB
    assert 60 * mib <= kept[0] <= 1024 * 32768 * 2 + 8 * mib
    assert held[1] <= 24 * mib
    assert held[0] <= 24 * mib * 1.05 + slack
    assert in_gradient[0] <= plain[1] + slack
    assert frozen[0] <= 6 * mib  # a gradient of the weight would be 16 MiB
    assert wide[0] <= 16 * mib  # 7 of them the direction that the forward keeps for every row
    assert half[0] <= 24 * mib  # with 16-bit products its sums are laid out in panels first


@pytest.fixture
def executed(monkeypatch, backend):
    """Work that reaches the implementation, by direction: multiply-adds counted by torch where it does the products, else rows."""
    from torch.utils.flop_counter import FlopCounterMode

    implementation, work = module._implementation(backend), {"forward": 0, "backward": 0, "calls": 0}

    def spy(name):
        real = getattr(implementation, name)

        def call(head, *args, **kwargs):
            work["calls"] += 1
            with FlopCounterMode(display=False) as counter:
                result = real(head, *args, **kwargs)
            work[name] += counter.get_total_flops() if backend == "torch" else len(head.rows)
            return result

        monkeypatch.setattr(implementation, name, call)

    spy("forward")
    spy("backward")
    return work


def test_half_prompt_batch_costs_at_most_055_and_inactive_pairs_nothing_to_go_back(backend, executed):
    hidden, weight, _, _ = _inputs(8 * 64, 1100, 40)
    hidden = hidden.view(8, 64, 40).requires_grad_()
    weight.requires_grad_()
    full = torch.randint(1100, (8, 64), generator=torch.Generator().manual_seed(2))
    half = full.clone()
    half[:, :32] = -100
    spent = []
    for labels in (full, half):
        before = dict(executed)
        out = fused_linear_logprob(hidden, weight, labels, backend=backend, mode="recompute")
        out.logp.sum().backward()
        assert out.stats.gemm_units == 4
        spent.append({name: executed[name] - before[name] for name in executed})
    for direction in ("forward", "backward"):
        assert 0 < spent[1][direction] <= 0.55 * spent[0][direction]

    ref_logp = torch.tensor([0.0] * 4 + [1e5] * 4)  # every pair far beyond its margin
    for mode in ("recompute", "resident"):
        before = dict(executed)
        result = fused_preference_loss(hidden, weight, full, loss=Hinge(), ref_logp=ref_logp, backend=backend, mode=mode)
        result.loss.backward()
        forward, backward = (executed[name] - before[name] for name in ("forward", "backward"))
        assert forward > 0
        assert backward < 0.02 * forward
        assert executed["calls"] - before["calls"] == 1  # one forward whatever the number of pairs, no backward


def test_products_keep_their_rows_at_any_ratio_of_vocabulary_to_hidden_size():
    """A chunk rule in V / D would leave 8-row products here, far below the bandwidth knee."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                rows.append(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    hidden, weight, labels, _ = _inputs(256, 86 * 12, 12)
    index = (labels != -100).nonzero()[:, 0]
    head = _head(hidden, weight, None, labels, index, 0, 0, 1.0, 0.0, 1.0)[0]
    with Record():
        module._implementation("torch").forward(head, 0)
    assert min(rows) >= 64
