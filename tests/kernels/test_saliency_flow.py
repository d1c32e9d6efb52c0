"""Saliency flow: every backend against the float64 definition on every mask feature, the identities that need no reference, determinism
and failures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmcore.kernels import backends
from llmcore.kernels.saliency_flow import (
    OUTPUTS,
    attention_with_lse,
    plan_saliency_flow,
    planned_saliency_flow,
    saliency_flow,
    saliency_flow_reference,
)
from llmcore.kernels.saliency_flow_operator import SCHEMA

BACKENDS = [
    pytest.param("cpp", marks=pytest.mark.skipif(backends.extension_error() is not None, reason=str(backends.extension_error()))),
    "torch",
]
FIELDS = ("abs_sum", "signed_sum", "pos_sum", "attn_sum", "headsum_abs", "row_by_seg", "col_by_seg", "row_sum", "col_sum", "matrix")
# name -> (batch, heads, kv heads, rows, columns, head size, value size, options)
MASKS = {
    "causal": (2, 4, 2, 37, 37, 20, 12, {}),
    "one token": (1, 2, 1, 1, 1, 3, 3, {}),
    "tile border": (1, 3, 1, 97, 97, 16, 16, {}),
    "bidirectional": (2, 4, 4, 37, 37, 20, 12, {"causal": False}),
    "window": (2, 4, 2, 37, 37, 20, 12, {"window": 7}),
    "softcap": (2, 4, 2, 37, 37, 20, 12, {"softcap": 2.0}),
    "sinks": (2, 4, 2, 37, 37, 20, 12, {"sinks": True}),
    "offset": (2, 4, 2, 37, 37, 20, 12, {"q_offset": 3}),
    "no diagonal": (2, 4, 2, 37, 37, 20, 12, {"exclude_diagonal": True}),
    "prefix": (2, 4, 2, 11, 37, 20, 28, {}),
    "decode": (2, 4, 1, 1, 37, 20, 20, {}),
    "padding": (2, 4, 2, 37, 37, 20, 28, {"key_mask": "ends"}),
    "padded prefix": (2, 4, 2, 11, 37, 20, 28, {"key_mask": "ends"}),
    "holes": (2, 4, 2, 37, 37, 20, 20, {"key_mask": "holes"}),
    "documents": (1, 4, 2, 37, 37, 20, 12, {"cu_seqlens_q": [0, 5, 5, 17, 30]}),
    "documents with prefixes": (1, 4, 1, 7, 37, 20, 20, {"cu_seqlens_q": [0, 2, 6], "cu_seqlens_k": [0, 9, 20]}),
    "windowed documents": (2, 4, 2, 37, 37, 20, 20, {"cu_seqlens_q": [[0, 5, 17, 30], [0, 1, 2, 37]], "window": 4}),
}


def _inputs(seed, batch, heads, kv_heads, rows, cols, size, value_size, options, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = (
        draw(batch, heads, rows, size),
        draw(batch, kv_heads, cols, size),
        draw(batch, kv_heads, cols, value_size),
        draw(batch, heads, rows, value_size),
    )
    row_segments = torch.randint(-1, 3, (batch, rows), generator=generator)
    col_segments = row_segments if rows == cols else torch.randint(-1, 4, (batch, cols), generator=generator)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = draw(heads)
    if options.get("key_mask") == "ends":
        options["key_mask"] = torch.ones(batch, cols, dtype=torch.bool)
        options["key_mask"][0, :9], options["key_mask"][1, cols - 7 :] = False, False
    elif options.get("key_mask") == "holes":
        options["key_mask"] = torch.rand(batch, cols, generator=generator) < 0.6
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32)
    return tensors, row_segments, col_segments, options


def _flow(tensors, row_segments, col_segments, options, backend, **more):
    query, key, value, grad = tensors
    forward = {name: x for name, x in options.items() if name != "exclude_diagonal"}
    _, lse = attention_with_lse(query, key, value, **forward)
    return saliency_flow(
        query, key, value, grad, lse, row_segments, col_segments, num_row_segments=3, num_col_segments=4, backend=backend, **options, **more
    )


def _close(name, ours, truth, relative, absolute):
    """|ours - truth| ≤ relative · |truth| + absolute · max|truth|, entry by entry."""
    ours, truth = ours.double(), truth.double()
    error = (ours - truth).abs()
    allowed = relative * truth.abs() + absolute * truth.abs().max()
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"{name}: {ours.flatten()[worst]:.9e} for {truth.flatten()[worst]:.9e}, allowed error {allowed.flatten()[worst]:.1e}"
    )


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_output_matches_the_definition(backend, mask, pruned):
    tensors, rows, cols, options = _inputs(0, *MASKS[mask])
    pairs = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool() if pruned else None
    wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()}
    truth = saliency_flow_reference(
        *(t.double() for t in tensors), None, rows, cols, num_row_segments=3, num_col_segments=4, pairs=pairs, outputs=OUTPUTS, **wide
    )
    ours = _flow(tensors, rows, cols, options, backend, pairs=pairs, outputs=OUTPUTS)
    for field in FIELDS:
        result = getattr(ours, field)
        assert result.dtype == torch.float32
        if field in ("signed_sum",):  # sums that cancel: rounding is relative to what was added, not to what is left
            assert ((result - truth.signed_sum).abs() <= 2e-6 * truth.abs_sum.max() + 1e-5 * truth.abs_sum).all()
        else:
            _close(f"{backend} {mask} {field}", result, getattr(truth, field), 1e-5, 2e-6)
    assert torch.equal(ours.count, truth.count)
    assert torch.equal(ours.box, truth.box)
    alone = _flow(tensors, rows, cols, options, backend, pairs=pairs)  # without the outputs that switch pruning off
    _close(f"{backend} {mask} abs alone", alone.abs_sum, truth.abs_sum, 1e-5, 2e-6)
    assert alone.signed_sum is None


@pytest.mark.parametrize("mask", ["causal", "window", "softcap", "sinks", "padding", "documents", "prefix"])
def test_float64_matches_to_rounding(mask):
    tensors, rows, cols, options = _inputs(1, *MASKS[mask], dtype=torch.float64)
    truth = saliency_flow_reference(*tensors, None, rows, cols, num_row_segments=3, num_col_segments=4, outputs=OUTPUTS, **options)
    ours = _flow(tensors, rows, cols, options, "auto", outputs=OUTPUTS)
    for field in FIELDS:
        assert getattr(ours, field).dtype == torch.float64
        _close(f"{mask} {field}", getattr(ours, field), getattr(truth, field), 0.0, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_inputs_keep_float32_probabilities(backend, dtype):
    tensors, rows, cols, _options = _inputs(2, *MASKS["tile border"], dtype=dtype)
    truth = saliency_flow_reference(*(t.double() for t in tensors), None, rows, cols, num_row_segments=3, num_col_segments=4)
    lse = saliency_lse(tensors)
    ours = saliency_flow(*tensors, lse, rows, cols, num_row_segments=3, num_col_segments=4, backend=backend)
    _close("abs_sum", ours.abs_sum, truth.abs_sum, 1e-3, 0.0)


def saliency_lse(tensors):
    return attention_with_lse(*(t.double() for t in tensors[:3]))[1].float()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 70),
    extra=st.integers(0, 40),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    size=st.integers(1, 33),
    value_size=st.integers(1, 40),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(0.5, 30),
    sinks=st.booleans(),
)
def test_signed_row_sums_are_grad_dot_output(backend, seed, rows, extra, group, kv_heads, size, value_size, window, softcap, sinks):
    """Σ_j G_ij = do_i · o_i for any visible set: an identity that holds without any reference."""
    shape = 1, group * kv_heads, kv_heads, rows, rows + extra, size, value_size
    tensors, _, _, options = _inputs(seed, *shape, {"window": window, "softcap": softcap, "sinks": sinks or None})
    output, lse = attention_with_lse(*tensors[:3], **options)
    own = torch.arange(rows)[None]  # every row its own segment, all columns one
    flow = saliency_flow(
        *tensors,
        lse,
        own,
        torch.zeros(1, rows + extra, dtype=torch.long),
        num_row_segments=rows,
        num_col_segments=1,
        outputs=("signed", "abs"),
        backend=backend,
        **options,
    )
    expected = (tensors[3].double() * output.double()).sum(-1)
    # the scale of rounding is what was added, |G|, plus the products' own
    assert ((flow.signed_sum[..., 0] - expected).abs() <= 2e-5 * flow.abs_sum[..., 0] + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_and_splitting_segments(backend):
    tensors, rows, _, _ = _inputs(3, 2, 4, 2, 130, 130, 16, 16, {})
    _, lse = attention_with_lse(*tensors[:3])

    def flow(ids, count):
        return saliency_flow(*tensors, lse, ids, num_row_segments=count, num_col_segments=count, backend=backend).abs_sum

    base = flow(rows, 3)
    order = torch.tensor([2, 0, 1])
    permuted = flow(torch.where(rows < 0, rows, order[rows]), 3)
    torch.testing.assert_close(permuted[..., order, :][..., order], base, rtol=1e-6, atol=0)
    split = flow(torch.where((rows == 2) & (torch.arange(130) % 2 == 0), 3, rows), 4)
    merged = split[..., :3].clone()
    merged[..., 2] += split[..., 3]
    merged[..., 2, :] += merged[..., 3, :]
    torch.testing.assert_close(merged[..., :3, :], base, rtol=1e-6, atol=0)


def test_contiguous_and_shuffled_segments_agree_across_backends():
    """Runs of any length, borders inside and on tiles: the binning may not depend on how tokens are grouped in memory."""
    tensors, _, _, _ = _inputs(4, 1, 2, 1, 210, 210, 8, 8, {})
    _, lse = attention_with_lse(*tensors[:3])
    for lengths in ([1, 15, 16, 17, 31, 130], [96, 96, 18], [210]):
        ids = torch.repeat_interleave(torch.arange(len(lengths)) % 3, torch.tensor(lengths))[None]
        truth = saliency_flow_reference(*(t.double() for t in tensors), None, ids, num_row_segments=3, num_col_segments=3)
        for backend in ("auto", "torch"):
            _close(
                "abs",
                saliency_flow(*tensors, lse, ids, num_row_segments=3, num_col_segments=3, backend=backend).abs_sum,
                truth.abs_sum,
                1e-5,
                2e-6,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_where_tiles_begin(backend):
    """The same document at several offsets of a longer row: every alignment of its tokens to the tiles' borders."""
    tensors, rows, _, _ = _inputs(13, 1, 4, 2, 75, 75, 16, 16, {})
    base = saliency_flow(*tensors, None, rows, num_row_segments=3, num_col_segments=3, backend=backend, outputs=("abs", "attn"))
    for offset in (1, 5, 16, 96, 130):
        moved = [torch.nn.functional.pad(t, (0, 0, offset, 9), value=1.0) for t in tensors]
        ids = torch.nn.functional.pad(rows, (offset, 9), value=-1)
        borders = torch.tensor([0, offset, offset + 75, offset + 84], dtype=torch.int32)
        flow = saliency_flow(
            *moved, None, ids, num_row_segments=3, num_col_segments=3, cu_seqlens_q=borders, backend=backend, outputs=("abs", "attn")
        )
        torch.testing.assert_close(flow.abs_sum, base.abs_sum, rtol=1e-6, atol=0)
        torch.testing.assert_close(flow.attn_sum, base.attn_sum, rtol=1e-6, atol=0)
        assert torch.equal(flow.count, base.count)


def test_label_word_proportions_of_wang_et_al():
    """S_wp, S_pq, S_ww of "Label words are anchors", from the matrix as its code computes them and from bins of ours."""
    tensors, _, _, _ = _inputs(14, 1, 2, 2, 24, 24, 8, 8, {})
    labels, final = [5, 11, 17], 22
    _, lse = attention_with_lse(*tensors[:3])
    ids = torch.zeros(1, 24, dtype=torch.long)
    ids[0, labels], ids[0, final], ids[0, 23] = 1, 2, -1  # other text, label words, the position that predicts; behind it: nothing
    flow = saliency_flow(*tensors, lse, ids, outputs=("headsum_abs", "matrix"), exclude_diagonal=True)
    matrix = saliency_flow(*tensors, lse, ids, outputs=("signed", "matrix")).matrix  # |G| a head; heads are added before abs below
    a = (tensors[0] @ tensors[1].transpose(2, 3) * 8**-0.5).masked_fill(torch.ones(24, 24).triu(1).bool(), -torch.inf).softmax(-1)
    signed = a * (tensors[3] @ tensors[2].transpose(2, 3))
    torch.testing.assert_close(matrix, signed.abs(), rtol=1e-4, atol=1e-6)
    saliency = signed.sum(1)[0].abs().double()
    saliency.fill_diagonal_(0)
    s_wp = saliency[labels].sum() / sum(labels)
    s_pq = saliency[final, labels].sum() / len(labels)
    rest = saliency[: final + 1].sum() - saliency[labels].sum() - saliency[final, labels].sum()
    s_ww = rest / ((final + 1) * final / 2 - sum(labels) - len(labels))
    h = flow.headsum_abs[0].double()
    ours_wp, ours_pq = h[1].sum() / flow.count[0, 1].sum(), h[2, 1] / flow.count[0, 2, 1]
    assert float(ours_wp) == pytest.approx(float(s_wp), rel=1e-5)
    assert float(ours_pq) == pytest.approx(float(s_pq), rel=1e-5)
    others, pairs = h[0].sum() + h[2, 0] + h[2, 2], flow.count[0, 0].sum() + flow.count[0, 2, 0] + flow.count[0, 2, 2]
    assert float(others / pairs) == pytest.approx(float(s_ww), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_deterministic_and_independent_of_the_batch(backend):
    tensors, rows, _cols, _ = _inputs(5, 3, 4, 2, 250, 250, 24, 24, {})
    _, lse = attention_with_lse(*tensors[:3])

    def run(pick):
        return saliency_flow(
            *(t[pick] for t in tensors),
            lse[pick],
            rows[pick],
            num_row_segments=3,
            num_col_segments=3,
            backend=backend,
            outputs=("abs", "signed", "row_by_seg", "headsum_abs"),
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first, alone = run(slice(None)), run(slice(1, 2))
        torch.set_num_threads(2)
        second = run(slice(None))
    finally:
        torch.set_num_threads(threads)
    for field in ("abs_sum", "signed_sum", "row_by_seg", "headsum_abs"):
        if backend == "cpp":  # plain PyTorch promises no order across thread counts
            assert torch.equal(getattr(first, field), getattr(second, field)), field
        assert torch.equal(getattr(run(slice(None)), field), getattr(run(slice(None)), field)), field
        assert torch.equal(getattr(first, field)[1:2], getattr(alone, field)), field


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_empty_and_absent_segments(backend):
    tensors, rows, _, _ = _inputs(6, *MASKS["causal"])
    _, lse = attention_with_lse(*tensors[:3])
    nothing = saliency_flow(*tensors, lse, torch.full_like(rows, -1), num_row_segments=2, num_col_segments=2, backend=backend)
    assert not nothing.abs_sum.any()
    assert not nothing.count.any()
    assert nothing.mean().isnan().all()
    some = saliency_flow(*tensors, lse, rows.clamp(max=0), num_row_segments=2, num_col_segments=2, backend=backend)
    assert not some.abs_sum[..., 1, :].any()
    assert some.mean(empty="zero")[..., 1, :].eq(0).all()
    assert some.mean(denominator="visible")[..., 0, 0].isfinite().all()
    with pytest.raises(ValueError, match="empty='raise'"):
        some.mean(empty="raise")
    no_rows = saliency_flow(
        *(t[:, :, :0] for t in tensors), lse[:, :, :0], rows[:, :0], num_row_segments=2, num_col_segments=2, backend=backend
    )
    assert no_rows.abs_sum.shape == (2, 4, 2, 2)
    assert not no_rows.abs_sum.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_direction_extreme_scores_blind_rows_and_zero_gradients(backend):
    query, key, value, grad = _inputs(7, 1, 2, 1, 40, 40, 8, 8, {})[0]
    ids = (torch.arange(40) >= 20).long()[None]  # question, then prompt
    _, lse = attention_with_lse(query * 1e4, key, value)
    flow = saliency_flow(query * 1e4, key, value, grad, lse, ids, backend=backend)
    assert (flow.abs_sum[..., 1, 0] > 0).all()  # rows of the prompt read the question
    assert (flow.abs_sum[..., 0, 1] == 0).all()  # never the other way round under a causal mask
    truth = saliency_flow_reference(*(t.double() for t in (query * 1e4, key, value, grad)), None, ids)
    assert ((flow.abs_sum - truth.abs_sum).abs() <= 2e-2 * truth.abs_sum.max()).all()  # scores of 1e4 carry an error of 1e-3 in float32

    blind = torch.zeros(1, 40, dtype=torch.bool)
    output, lse = attention_with_lse(query, key, value, key_mask=blind)
    assert (lse == -torch.inf).all()
    assert not output.any()
    assert not saliency_flow(query, key, value, grad, lse, ids, key_mask=blind, backend=backend).abs_sum.any()

    only = torch.zeros_like(grad)
    only[:, :, 30] = grad[:, :, 30]
    _, lse = attention_with_lse(query, key, value)
    flow = saliency_flow(query, key, value, only, lse, ids, outputs=("row_sum", "attn"), backend=backend)
    assert (flow.row_sum != 0).sum() == 2
    assert flow.attn_sum.sum().item() == pytest.approx(2 * 40, rel=1e-5)  # attention mass is there where the gradient is zero


def test_counts_match_a_loop_over_pairs():
    visible = 0
    rows = torch.tensor([[0, 0, -1, 1, 1]])
    zeros = torch.zeros(1, 1, 5, 2)
    flow = saliency_flow(zeros, zeros, zeros, zeros, None, rows, window=2, key_mask=torch.tensor([[1, 1, 1, 0, 1]]))
    expected = torch.zeros(2, 2, dtype=torch.long)
    for i in range(5):
        for j in range(5):
            if 0 <= i - j < 2 and j != 3 and rows[0, i] >= 0 and rows[0, j] >= 0:
                expected[rows[0, i], rows[0, j]] += 1
                visible += 1
    assert torch.equal(flow.count[0], expected)
    assert torch.equal(flow.box[0], torch.full((2, 2), 4))
    assert visible == flow.count.sum()


@pytest.mark.parametrize(
    "mask", ["causal", "bidirectional", "window", "softcap", "sinks", "prefix", "padding", "padded prefix", "holes", "documents", "decode"]
)
def test_attention_gradients(mask):
    (query, key, value, _), _, _, options = _inputs(8, *MASKS[mask], dtype=torch.float64)
    query, key, value = (t[..., :6].clone().requires_grad_() for t in (query, key, value[..., :5]))
    sinks = options.pop("sinks", None)
    extra = [sinks.requires_grad_()] if sinks is not None else []

    def run(q, k, v, *s):
        return attention_with_lse(q, k, v, sinks=s[0] if s else None, **options)[0]

    assert torch.autograd.gradcheck(run, (query, key, value, *extra), fast_mode=True)


def test_flash_and_blocked_attention_agree():
    for mask, shape in MASKS.items():
        (query, key, value, _), _, _, options = _inputs(9, *shape)
        options = {name: x for name, x in options.items() if name != "exclude_diagonal"}
        ours, blocked = attention_with_lse(query, key, value, **options), attention_with_lse(query, key, value, backend="torch", **options)
        torch.testing.assert_close(ours[0], blocked[0], rtol=2e-5, atol=2e-6, msg=mask)
        torch.testing.assert_close(ours[1], blocked[1], rtol=2e-5, atol=2e-6, msg=mask)


def test_attention_over_nothing_does_not_end_the_process():
    for rows, cols in ((0, 4), (4, 0), (0, 0)):
        output, lse = attention_with_lse(torch.ones(1, 2, rows, 8), torch.ones(1, 1, cols, 8), torch.ones(1, 1, cols, 8))
        assert output.shape == (1, 2, rows, 8)
        assert not output.any()
        assert (lse == -torch.inf).all()


def test_operator_contract():
    (query, key, value, grad), rows, _, _ = _inputs(10, 1, 4, 2, 20, 20, 8, 8, {})
    _, lse = attention_with_lse(query, key, value)
    low, high, diagonal = (
        torch.zeros(1, 20, dtype=torch.int32),
        torch.arange(1, 21, dtype=torch.int32)[None],
        torch.arange(20, dtype=torch.int32)[None],
    )
    arguments = (
        query,
        key,
        value,
        grad,
        lse,
        low,
        high,
        diagonal,
        None,
        rows.int(),
        rows.int(),
        torch.ones(3, 3, dtype=torch.uint8),
        0.3,
        0.0,
        255,
    )
    operators = [torch.ops.llmcore.saliency_flow_blocked] + (
        [torch.ops.llmcore.saliency_flow_fwd] if backends.extension_error() is None else []
    )
    for operator in operators:
        assert str(operator.default._schema).split("(", 1)[1] == SCHEMA[1:]  # csrc/bindings.cpp and Python state it apart
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        torch.ops.llmcore.attention_lse_fwd.default,
        (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), 0.3, True, None, None, None, None, None, None, None, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_plan_serves_layers_of_its_shape_only():
    """Other heads, head sizes and scales may share a plan; another length, batch or device may not."""
    masks = {"window": 9, "key_mask": torch.arange(40).expand(2, 40) > 2}
    ids = _inputs(5, 2, 4, 2, 33, 40, 8, 8, {})[1:3]
    counts = {"num_row_segments": 3, "num_col_segments": 4, "outputs": OUTPUTS}
    plan = plan_saliency_flow(*ids, **counts, **masks)
    for heads, kv, size, scale in ((4, 2, 8, 0.3), (6, 3, 16, 0.7)):
        query, key, value, grad = _inputs(size, 2, heads, kv, 33, 40, size, size, {})[0]
        alone = saliency_flow(query, key, value, grad, None, *ids, softmax_scale=scale, **counts, **masks)
        planned = planned_saliency_flow(plan, query, key, value, grad, None, softmax_scale=scale)
        for name, bins in vars(alone).items():
            assert (bins is None and getattr(planned, name) is None) or torch.equal(bins, getattr(planned, name)), name
    for wrong in (query[:, :, 1:], query[:1]):
        with pytest.raises(ValueError, match="plan's"):
            planned_saliency_flow(plan, wrong, key[: len(wrong)], value[: len(wrong)], grad, None)
    with pytest.raises(ValueError, match="plan's"):
        planned_saliency_flow(plan, query, key[:, :, 1:], value[:, :, 1:], grad, None)
    with pytest.raises(ValueError, match="num_rows"):
        plan_saliency_flow(torch.zeros(4, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore")
def test_compiles_without_graph_breaks():
    (query, key, value, grad), rows, _, _ = _inputs(11, 1, 4, 2, 20, 20, 8, 8, {})

    def run(query, key, value, grad, rows):
        output, lse = attention_with_lse(query, key, value)
        return output, saliency_flow(
            query, key, value, grad, lse, rows, num_row_segments=3, num_col_segments=3, outputs=("abs", "row_sum")
        ).abs_sum

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours, plain in zip(compiled(query, key, value, grad, rows), run(query, key, value, grad, rows), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grad_output": "nan"}, ValueError, "grad_output must be finite"),
        ({"key": (2, 3, 37, 20)}, ValueError, "value must agree with key|num_kv_heads"),
        ({"lse": (2, 4, 36)}, ValueError, "lse must be float"),
        ({"row_segments": "big"}, ValueError, "row_segments must be -1 or in"),
        ({"row_segments": "low"}, ValueError, "row_segments must be -1 or in"),
        ({"row_segments": "float"}, TypeError, "row_segments must be integer"),
        ({"window": 0}, ValueError, "window must be positive"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"outputs": ("saliency",)}, ValueError, "outputs must be among"),
        ({"outputs": "abs"}, TypeError, "outputs must be a sequence"),
        ({"pairs": torch.ones(2, 2)}, ValueError, "pairs must be"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, ValueError, "batch must be 1"),
        ({"key_mask": torch.ones(2, 36, dtype=torch.bool)}, ValueError, "key_mask must be"),
        ({"backend": "cuda"}, RuntimeError, "saliency_flow has no cuda"),
        ({"sinks": torch.ones(3)}, ValueError, "sinks must be"),
    ],
)
def test_failures_name_the_argument(change, error, words):
    (query, key, value, grad), rows, _, _ = _inputs(12, *MASKS["causal"])
    arguments = {
        "query": query,
        "key": key,
        "value": value,
        "grad_output": grad,
        "lse": torch.zeros(2, 4, 37),
        "row_segments": rows,
        "num_row_segments": 3,
        "num_col_segments": 3,
    }
    for name, x in change.items():
        if x == "nan":
            grad[1, 2, 3, 4] = torch.nan
        elif isinstance(x, tuple) and isinstance(x[0], int):
            arguments[name] = torch.zeros(x)
        elif name == "row_segments":
            arguments[name] = {"big": rows + 1, "low": rows - 1, "float": rows.float()}[x]
        else:
            arguments[name] = x
    with pytest.raises(error, match=words):
        saliency_flow(**arguments)


def test_a_huge_matrix_must_be_asked_for():
    big = torch.zeros(1, 64, 1100, 1)
    with pytest.raises(ValueError, match="large_matrix"):
        saliency_flow(big, big, big, big, None, torch.zeros(1, 1100, dtype=torch.long), outputs=("matrix",))


def test_extra_memory_stays_linear():
    """Peak resident memory over the inputs at n = 4096: one matrix of one head alone would be 67 MB, all eight 537 MB."""
    code = (
        "import resource, torch; from llmcore.kernels.saliency_flow import saliency_flow\n"
        "torch.set_num_threads(1); n = 4096\n"
        "q, k, v, do = torch.randn(1, 8, n, 16), torch.randn(1, 2, n, 16), torch.randn(1, 2, n, 16), torch.randn(1, 8, n, 16)\n"
        "ids, lse = torch.arange(n)[None] * 3 // n, torch.full((1, 8, n), 9.0)\n"
        "saliency_flow(*(t[:, :, :64] for t in (q, k, v, do)), lse[:, :, :64], ids[:, :64])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "saliency_flow(q, k, v, do, lse, ids)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 24 * 1024  # kilobytes
