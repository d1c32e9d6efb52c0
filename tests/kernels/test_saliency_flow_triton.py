"""The Triton kernels of saliency flow against the float64 definition: on a GPU where there is one, else in Triton's interpreter (a second
process). The tile lists they work from are checked by counting every pair."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from llmcore.kernels import saliency_flow_tiles as lists
from llmcore.kernels.saliency_flow import OUTPUTS, attention_with_lse, saliency_flow, saliency_flow_reference
from llmcore.kernels.saliency_flow_operator import Problem
from llmcore.kernels.visibility import visible_ranges

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
pytestmark = pytest.mark.usefixtures("quiet_numpy")
served = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETING, reason="runs in the interpreter's process, see test_in_the_interpreter"
)
FIELDS = ("abs_sum", "signed_sum", "pos_sum", "attn_sum", "headsum_abs", "row_by_seg", "col_by_seg", "row_sum", "col_sum", "matrix")
# name -> (batch, heads, kv heads, rows, columns, head size, value size, options); tiles are 16 x 16 in these tests
MASKS = {
    "causal": (1, 4, 2, 21, 21, 20, 12, {}),
    "one token": (1, 2, 1, 1, 1, 3, 3, {}),
    "tile border": (1, 1, 1, 17, 17, 16, 16, {}),
    "bidirectional": (1, 2, 2, 21, 21, 20, 12, {"causal": False}),
    "window": (1, 2, 1, 21, 21, 20, 12, {"window": 7}),
    "softcap": (1, 2, 1, 21, 21, 20, 12, {"softcap": 2.0}),
    "sinks": (1, 2, 1, 21, 21, 20, 12, {"sinks": True}),
    "offset": (1, 2, 1, 21, 21, 20, 12, {"q_offset": 3}),
    "no diagonal": (1, 2, 1, 21, 21, 20, 12, {"exclude_diagonal": True}),
    "no diagonal, bidirectional": (1, 2, 1, 21, 21, 20, 12, {"exclude_diagonal": True, "causal": False}),
    "prefix": (1, 2, 1, 5, 21, 20, 28, {}),
    "decode": (1, 2, 1, 1, 21, 20, 20, {}),
    "padding": (2, 2, 1, 20, 20, 20, 28, {"key_mask": "ends"}),
    "holes": (1, 2, 1, 21, 21, 20, 20, {"key_mask": "holes"}),
    "documents": (1, 2, 1, 21, 21, 20, 12, {"cu_seqlens_q": [0, 5, 5, 12, 18]}),
    "documents with prefixes": (1, 2, 1, 7, 21, 20, 20, {"cu_seqlens_q": [0, 2, 6], "cu_seqlens_k": [0, 9, 20]}),
    "windowed documents": (2, 2, 1, 21, 21, 20, 20, {"cu_seqlens_q": [[0, 5, 17, 20], [0, 1, 2, 21]], "window": 4}),
    "large heads": (1, 1, 1, 17, 17, 130, 70, {}),
}


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETING, reason="these tests run on the GPU, or already in the interpreter")
def test_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)


@pytest.fixture
def tiles(monkeypatch):
    """Sets the tile of every configuration and how many segments count as few: small tiles reach every path on small inputs."""

    def use(rows: int, columns: int, few: int) -> None:
        from llmcore.kernels import saliency_flow_triton as kernels

        warps = 4
        monkeypatch.setattr(kernels, "_CONFIGS", {key: kernels.Config(rows, columns, warps, 1) for key in kernels._CONFIGS})
        monkeypatch.setattr(lists, "FEW", few)

    return use


def _inputs(seed, batch, heads, kv_heads, rows, cols, size, value_size, options, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    tensors = (
        draw(batch, heads, rows, size),
        draw(batch, kv_heads, cols, size),
        draw(batch, kv_heads, cols, value_size),
        draw(batch, heads, rows, value_size),
    )
    row_segments = torch.randint(-1, 3, (batch, rows), generator=generator).to(DEVICE)
    col_segments = row_segments if rows == cols else torch.randint(-1, 4, (batch, cols), generator=generator).to(DEVICE)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = draw(heads)
    if options.get("key_mask") == "ends":
        mask = torch.ones(batch, cols, dtype=torch.bool)
        mask[0, :6], mask[1, cols - 5 :] = False, False
        options["key_mask"] = mask.to(DEVICE)
    elif options.get("key_mask") == "holes":
        options["key_mask"] = (torch.rand(batch, cols, generator=generator) < 0.6).to(DEVICE)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32, device=DEVICE)
    return tensors, row_segments, col_segments, options


def _lse(tensors, options):
    """The float64 lse, rounded once: what is tested is the sums."""
    forward = {name: x for name, x in options.items() if name != "exclude_diagonal"}
    return attention_with_lse(*(t.double() for t in tensors[:3]), **forward)[1].float()


def _flow(tensors, row_segments, col_segments, options, **more):
    counts = {"num_row_segments": 3, "num_col_segments": 4, **more}
    return saliency_flow(*tensors, _lse(tensors, options), row_segments, col_segments, backend="triton", **options, **counts)


def _truth(tensors, rows, cols, options, **more):
    wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in options.items()}
    counts = {"num_row_segments": 3, "num_col_segments": 4, **more}
    return saliency_flow_reference(*(t.double() for t in tensors), None, rows, cols, **wide, **counts)


def _check(name, ours, truth, fields, relative=1e-5, absolute=2e-6):
    """|ours - truth| ≤ relative · |truth| + absolute · max|truth|, entry by entry; sums that cancel: relative to what was added."""
    for field in fields:
        got, want = getattr(ours, field), getattr(truth, field)
        assert got.dtype == torch.float32, field
        size = truth.abs_sum if field == "signed_sum" else want
        allowed = relative * size.abs() + absolute * size.abs().max()
        error = (got.double() - want).abs()
        worst = int((error - allowed).argmax())
        assert bool((error <= allowed).all()), (
            f"{name} {field}: {got.flatten()[worst]:.9e} for {want.flatten()[worst]:.9e}, allowed error {allowed.flatten()[worst]:.1e}"
        )
    assert torch.equal(ours.count, truth.count)
    assert torch.equal(ours.box, truth.box)


PAIRS = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()


@served
@pytest.mark.parametrize(("mask", "few", "pruned"), [(mask, 8 * (i % 2), i // 2 % 2 == 1) for i, mask in enumerate(MASKS)])
def test_every_output_matches_the_definition(mask, few, pruned, tiles):
    tiles(16, 16, few)
    tensors, rows, cols, options = _inputs(0, *MASKS[mask])
    pairs = PAIRS.to(DEVICE) if pruned else None
    truth = _truth(tensors, rows, cols, options, pairs=pairs, outputs=OUTPUTS)
    _check(mask, _flow(tensors, rows, cols, options, pairs=pairs, outputs=OUTPUTS), truth, FIELDS)
    if few:  # alone, the default sum leaves tiles out that the other outputs need
        _check(mask, _flow(tensors, rows, cols, options, pairs=pairs), truth, ("abs_sum",))


@served
@pytest.mark.parametrize("few", [0, 8])
def test_pruned_sums_without_the_outputs_that_need_every_pair(few, tiles):
    """row_by_seg, col_by_seg and headsum_abs leave pruning on: unwanted pairs are zero in all of them."""
    tiles(16, 16, few)
    tensors, rows, cols, options = _inputs(1, *MASKS["prefix"])
    outputs = ("abs", "signed", "pos", "headsum_abs", "row_by_seg", "col_by_seg")
    pairs = PAIRS.to(DEVICE)
    truth = _truth(tensors, rows, cols, options, pairs=pairs, outputs=outputs)
    _check("pruned", _flow(tensors, rows, cols, options, pairs=pairs, outputs=outputs), truth, FIELDS[:3] + FIELDS[4:7])


@served
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_float32_probabilities(dtype):
    """With the tiles that a GPU uses; the float64 definition of the same rounded inputs, 1e-3 a bin."""
    tensors, rows, cols, options = _inputs(2, 1, 2, 1, 140, 140, 64, 40, {}, dtype=dtype)
    truth = _truth(tensors, rows, cols, options)
    _check(str(dtype), _flow(tensors, rows, cols, options), truth, ("abs_sum",), 1e-3, 0.0)
    wide = _inputs(2, 1, 1, 1, 20, 20, 300, 16, {}, dtype=dtype)
    _check("300", _flow(*wide), _truth(*wide), ("abs_sum",), 1e-3, 0.0)


@served
@pytest.mark.parametrize(
    ("rows", "extra", "group", "size", "options"),
    [(1, 0, 1, 1, {}), (29, 3, 2, 33, {"window": 9}), (18, 20, 3, 7, {"softcap": 1.5, "sinks": True}), (31, 0, 1, 40, {"causal": False})],
)
def test_signed_row_sums_are_grad_dot_output(rows, extra, group, size, options, tiles):
    """Σ_j G_ij = do_i · o_i for any visible set, without a reference: every row its own segment, all columns one."""
    tiles(16, 16, 8)
    tensors, _, _, options = _inputs(3, 1, group, 1, rows, rows + extra, size, 9, options)
    output, _ = attention_with_lse(*(t.double() for t in tensors[:3]), **options)
    own, all_one = torch.arange(rows, device=DEVICE)[None], torch.zeros(1, rows + extra, dtype=torch.long, device=DEVICE)
    flow = _flow(tensors, own, all_one, options, num_row_segments=rows, num_col_segments=1, outputs=("signed", "abs"))
    expected = (tensors[3].double() * output).sum(-1)
    allowed = 2e-5 * flow.abs_sum[..., 0] + 1e-5 * expected.abs().max()
    assert ((flow.signed_sum[..., 0] - expected).abs() <= allowed).all()


@served
def test_tile_sizes_and_ways_of_dealing_agree(tiles):
    """Runs whose borders lie on, inside and across tiles; scattered ids; a permuted and a split segment."""
    tensors, scattered, _, _ = _inputs(4, 1, 2, 1, 75, 75, 16, 16, {})
    runs = torch.repeat_interleave(torch.tensor([0, 1, -1, 2, 0], device=DEVICE), torch.tensor([16, 15, 3, 33, 8], device=DEVICE))[None]
    order = torch.tensor([2, 0, 1], device=DEVICE)
    for ids in (runs, scattered):
        results = []
        for block, few in ((16, 8), (64, 8), (256, 8), (32, 0)):
            tiles(block, min(block, 64), few)
            results.append(_flow(tensors, ids, ids, {}, outputs=("abs", "signed"), num_col_segments=3))
        for other in results[1:]:
            torch.testing.assert_close(other.abs_sum, results[0].abs_sum, rtol=1e-6, atol=0)
            assert ((other.signed_sum - results[0].signed_sum).abs() <= 1e-6 * results[0].abs_sum).all()
        permuted = _flow(tensors, torch.where(ids < 0, ids, order[ids]), None, {}, num_col_segments=3).abs_sum
        torch.testing.assert_close(permuted[..., order, :][..., order], results[0].abs_sum, rtol=1e-6, atol=0)
        third = torch.where((ids == 2) & (torch.arange(75, device=DEVICE) % 2 == 0), 3, ids)
        split = _flow(tensors, third, None, {}, num_row_segments=4, num_col_segments=4).abs_sum
        merged = split[..., :3].clone()
        merged[..., 2] += split[..., 3]
        merged[..., 2, :] += merged[..., 3, :]
        torch.testing.assert_close(merged[..., :3, :], results[0].abs_sum, rtol=1e-6, atol=0)


@served
@pytest.mark.parametrize("few", [0, 8])
def test_same_bits_in_every_run_and_every_batch(few, tiles):
    tiles(16, 16, few)
    tensors, rows, _, _ = _inputs(5, 2, 2, 1, 21, 21, 24, 24, {})
    lse = _lse(tensors, {})
    outputs = ("abs", "signed", "row_by_seg", "col_by_seg", "headsum_abs")

    def run(pick):
        counts = {"num_row_segments": 3, "num_col_segments": 3}
        return saliency_flow(*(t[pick] for t in tensors), lse[pick], rows[pick], backend="triton", outputs=outputs, **counts)

    whole, again, alone = run(slice(None)), run(slice(None)), run(slice(1, 2))
    for field in ("abs_sum", "signed_sum", "row_by_seg", "col_by_seg", "headsum_abs"):
        assert torch.equal(getattr(whole, field), getattr(again, field)), field
        assert torch.equal(getattr(whole, field)[1:2], getattr(alone, field)), field


@served
def test_strides_packing_and_padding_do_not_matter(tiles):
    """(batch, n, heads, d) storage read through views; two packed documents and a left-padded sequence against the sequences alone."""
    tiles(16, 16, 8)
    tensors, ids, _, _ = _inputs(6, 1, 2, 1, 30, 30, 20, 12, {})
    plain = _flow(tensors, ids, ids, {}, outputs=("abs", "col_by_seg"))
    views = [torch.nn.functional.pad(t.transpose(1, 2), (3, 5))[..., 3:-5].transpose(1, 2) for t in tensors]
    assert not views[0].is_contiguous()
    strided = _flow(views, ids, ids, {}, outputs=("abs", "col_by_seg"))
    assert torch.equal(plain.abs_sum, strided.abs_sum)
    assert torch.equal(plain.col_by_seg, strided.col_by_seg)

    first, second = [t[:, :, :11] for t in tensors], [t[:, :, 11:] for t in tensors]
    borders = torch.tensor([0, 11, 30], device=DEVICE)
    packed = _flow(tensors, ids, ids, {"cu_seqlens_q": borders}).abs_sum
    singles = _flow(first, ids[:, :11], ids[:, :11], {}).abs_sum + _flow(second, ids[:, 11:], ids[:, 11:], {}).abs_sum
    torch.testing.assert_close(packed, singles, rtol=2e-6, atol=0)

    padded = [torch.nn.functional.pad(t, (0, 0, 7, 0), value=9.0) for t in tensors]
    padded_ids = torch.nn.functional.pad(ids, (7, 0), value=-1)
    mask = (torch.arange(37, device=DEVICE) >= 7)[None]
    left = _flow(padded, padded_ids, padded_ids, {"key_mask": mask}).abs_sum
    torch.testing.assert_close(left, plain.abs_sum, rtol=2e-6, atol=0)


@served
@pytest.mark.parametrize("few", [0, 8])
def test_extreme_scores_blind_rows_zero_gradients_and_empty_segments(few, tiles):
    tiles(16, 16, few)
    tensors, _, _, _ = _inputs(7, 1, 2, 1, 40, 40, 8, 8, {})
    query, key, value, grad = tensors
    ids = (torch.arange(40, device=DEVICE) >= 20).long()[None]
    flow = _flow((query * 1e4, key, value, grad), ids, ids, {})
    truth = _truth((query * 1e4, key, value, grad), ids, ids, {})
    assert ((flow.abs_sum - truth.abs_sum).abs() <= 2e-2 * truth.abs_sum.max()).all()  # scores of 1e4 carry an error of 1e-3 in float32
    assert (flow.abs_sum[..., 1, 0] > 0).all()
    assert (flow.abs_sum[..., 0, 1] == 0).all()  # nothing flows back under a causal mask

    mask = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    mask[:, 30:] = True  # rows before 30 see nothing
    lse = _lse(tensors, {"key_mask": mask})
    assert (lse[:, :, :30] == -torch.inf).all()
    outputs = ("abs", "attn", "row_sum", "headsum_abs", "col_sum")
    _check("blind", _flow(tensors, ids, ids, {"key_mask": mask}, outputs=outputs),
           _truth(tensors, ids, ids, {"key_mask": mask}, outputs=outputs), ("abs_sum", "attn_sum", "row_sum", "headsum_abs", "col_sum"))

    only = torch.zeros_like(grad)
    only[:, 1, 30] = grad[:, 1, 30]
    flow = _flow((query, key, value, only), ids, ids, {}, outputs=("row_sum", "attn", "abs"))
    assert (flow.row_sum != 0).sum() == 1
    torch.testing.assert_close(flow.attn_sum.sum(), torch.tensor(80.0, device=DEVICE))  # attention is there where the gradient is zero
    assert not _flow((query, key, value, torch.zeros_like(grad)), ids, ids, {}, outputs=("abs", "headsum_abs")).headsum_abs.any()

    nothing = _flow(tensors, torch.full_like(ids, -1), ids, {}, outputs=("abs", "headsum_abs", "col_by_seg"))
    assert not nothing.abs_sum.any()
    assert not nothing.headsum_abs.any()
    assert not nothing.col_by_seg.any()
    none = _flow([t[:, :, :0] for t in tensors], ids[:, :0], ids[:, :0], {}, outputs=OUTPUTS)
    assert none.abs_sum.shape == (1, 2, 3, 4)
    assert not none.abs_sum.any()
    nan = grad.clone()
    nan[0, 0, 5, 2] = torch.nan
    from llmcore.kernels import saliency_flow_triton as kernels

    visible = visible_ranges(1, 40, 40, device=DEVICE)
    every = torch.ones(2, 2, dtype=torch.uint8, device=DEVICE)
    bins = kernels.forward(
        Problem(query, key, value, nan, _lse(tensors, {}), *visible[:2], None, None, ids.int(), ids.int(), every, 0.3, 0.0, 1)
    ).bins
    assert bins[0, 0, 0, 0, 0].isnan(), "a NaN is shown in the segment that it is in"
    assert not bins[0, 0, 0, 0, 1]
    assert bins[0, 0, 1].isfinite().all()


@served
def test_float64_is_refused_by_name():
    tensors, rows, cols, _ = _inputs(8, *MASKS["one token"], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"triton.*float64"):
        saliency_flow(*tensors, None, rows, cols, num_row_segments=3, num_col_segments=4, backend="triton")


# The tile lists need no kernel: plain PyTorch on any device.


@pytest.mark.parametrize("seed", range(8))
def test_tile_lists_cover_each_visible_wanted_pair_once(seed):
    generator = torch.Generator().manual_seed(seed)
    n, m, block_m, block_n = (int(torch.randint(1, top, (), generator=generator)) for top in (40, 40, 14, 9))
    batch, number, other = 2, 4, 3
    rows = torch.randint(-1, number, (batch, n), generator=generator)
    columns = torch.randint(-1, other, (batch, m), generator=generator)
    if seed % 2:
        rows, columns = rows.sort(1).values, columns.sort(1, descending=True).values  # contiguous runs
    causal = seed % 3 != 0
    visible = visible_ranges(batch, n, m, device=rows.device, causal=causal, window=[None, 7][seed // 3 % 2], q_offset=[None, 5][seed % 2])
    low, high = visible.low.clamp(0, m), visible.high.clamp(0, m)
    diagonal = visible.diagonal if seed % 4 == 1 else None
    pairs = torch.rand(number, other, generator=generator) < 0.6
    valid = (torch.rand(batch, m, generator=generator) < 0.8).to(torch.uint8) if seed % 3 == 1 else None

    j = torch.arange(m)
    see = (j >= low[..., None]) & (j < high[..., None])
    if valid is not None:
        see &= valid[:, None] != 0
    see &= (rows >= 0)[..., None] & (columns >= 0)[:, None] & pairs[rows.clamp(min=0)[..., None], columns.clamp(min=0)[:, None]]

    def tokens(side, b, tile):
        start, count = int(side.start[b, tile]), int(side.length[b, tile])
        return side.order[b, start : start + count].long()

    def records(work):
        return [(b, record) for b in range(batch) for record in work[b].tolist()]

    row_cut = lists.row_side(rows, low, high, pairs, None, block_m, True)
    column_cut = lists.column_side(columns, valid, pairs, block_n, True)
    assert row_cut.tiles <= n // block_m + number
    covered = torch.zeros(batch, n, m, dtype=torch.int)
    spans = lists.row_spans(row_cut, column_cut, low, high, diagonal, pairs, m)
    for b, (edges, fulls, first, before, column, tile, segment) in records(spans):
        i = tokens(row_cut, b, tile)
        for e in range(edges):
            reads = tokens(column_cut, b, first + e + (fulls if e >= before else 0))
            assert (columns[b, reads] == segment).all()
            covered[b, i[:, None], reads] += 1
        reads = torch.arange(column, column + fulls * block_n)
        assert see[b, i[:, None], reads].all(), "a full tile needs no mask"
        assert diagonal is None or not (reads == diagonal[b, i, None]).any()
        covered[b, i[:, None], reads] += 1
    assert (covered[see] == 1).all()
    assert covered.max() <= 1

    for cut in (False, True):
        row_side = lists.row_side(rows, low, high, pairs, None, block_m, cut)
        column_side = lists.column_side(columns, valid, pairs, block_n, cut)
        covered = torch.zeros(batch, n, m, dtype=torch.int)
        for b, (active, r, c) in records(lists.tile_pairs(row_side, column_side, low, high, pairs, m)):
            if active:
                covered[b, tokens(row_side, b, r)[:, None], tokens(column_side, b, c)] += 1
        assert (covered[see] == 1).all()
        covered.zero_()
        for b, (begin, end, c, segment) in records(lists.column_spans(row_cut, column_side, low, high, pairs, m)):
            for tile in range(begin, end):
                assert (rows[b, tokens(row_cut, b, tile)] == segment).all()
                covered[b, tokens(row_cut, b, tile)[:, None], tokens(column_side, b, c)] += 1
        assert (covered[see] == 1).all()
        for side, number_of in ((row_side, number), (column_side, other)):
            begin, end = side.pieces()
            slots = [slot for s in range(number_of) for slot in range(int(begin[0, s]), int(end[0, s]))]
            assert len(set(slots)) == len(slots), "two parts share a slot"
            assert not slots or max(slots) < side.tiles + number_of


def test_pruned_pairs_invisible_tiles_and_zero_gradients_are_in_no_list():
    n, block = 512, 16
    ids = torch.arange(n)[None] * 4 // n
    low, high, _ = visible_ranges(1, n, n, device=ids.device)
    grad = torch.zeros(1, 2, n, 8)
    grad[:, 1, 300] = 1.0

    def work(pairs, gradient=None):
        rows, columns = lists.row_side(ids, low, high, pairs, gradient, block, True), lists.column_side(ids, None, pairs, block, True)
        return int(lists.row_spans(rows, columns, low, high, None, pairs, n)[..., :2].sum())

    tiles = n // block
    everything = torch.ones(4, 4, dtype=torch.bool)
    assert work(everything) == tiles * (tiles + 1) // 2, "causal: half of the square, the diagonal included"
    one = torch.zeros(4, 4, dtype=torch.bool)
    one[3, 1] = True
    assert work(one) == (tiles // 4) ** 2, "time falls with the wanted visible pairs"
    assert work(everything, grad) == 300 // block + 1, "one row with a gradient reads one row of tiles"
    assert work(everything, torch.zeros_like(grad)) == 0
