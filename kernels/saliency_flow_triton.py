"""Triton kernels of saliency flow: NVIDIA and AMD GPUs, CPU tensors in the interpreter. Contract: kernels/saliency_flow_operator.py.

    P = exp(s_RC - lse_R) where visible, else 0;   D = do_R v_C^T;   bins[segment of row, segment of column] += |P · D|

A program owns a row tile R and one column segment, walks that segment's column tiles C (`spans_kernel`) and adds |P · D| over columns in
registers: two products a tile pair, nothing of size n × m in memory, no binning inside a tile. Full tiles are read by arithmetic on
contiguous columns and unmasked; tiles on an edge of the visible range, or of scattered columns, through the order list and a mask. What
the mask features mean is in low / high / order alone (kernels/visibility.py, kernels/saliency_flow_tiles.py): none costs a variant.
Many short segments: one program a tile pair splits its tile by the segments in it (`pieces_kernel`), which also serves sums over heads,
its loop over heads inside. Column outputs are the transposed walk (`columns_kernel`).

Every program writes slots that are its own, and `reduce_kernel` adds the slots of a segment in list order: no atomics, the same bits in
every run, whatever else is in the batch. Products of 16-bit inputs run on tensor cores with float32 sums; P is never rounded.
No value is read back to the host. Scratch: (n / 128 + Sr) · Sc · H numbers a kind of sum; n · Sc · H where rows are kept apart.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from llmcore.kernels import saliency_flow_tiles as tiles
from llmcore.kernels.aot import AotCase
from llmcore.kernels.backends import interpreting
from llmcore.kernels.saliency_flow_operator import COLUMN_BINS, HEADSUM, MATRIX, ROW_BINS, Problem, Sums
from llmcore.kernels.saliency_flow_triton_kernels import columns_kernel, pieces_kernel, reduce_kernel, spans_kernel
from torch import Tensor

# B batch, H query heads, G key/value heads, n rows, m columns, d / e head sizes of key / value, R / C row / column segments


@dataclasses.dataclass(frozen=True)
class Config:
    """One row of the table: tile of rows and columns, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Keyed by what changes the code: step, padded head size ("chunked": by chunks of it), architecture. "lean" is the default sum alone over
# few segments, without cap and diagonal; "rich" anything else. Not measured: chosen by the registers and shared memory of the compiled
# binary (python -m llmcore.kernels.aot); replace a row together with the device, date and figures that justify it.
_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
_CONFIGS: dict[tuple[str, int | str, str], Config] = {
    **{("lean", 64, target): Config(128, 128, 8, 3) for target in ("sm_90", "sm_100")},
    **{("lean", 128, target): Config(128, 128, 8, 2) for target in ("sm_90", "sm_100")},
    **{("lean", 256, target): Config(64, 64, 8, 2) for target in ("sm_90", "sm_100")},
    **{("lean", size, "sm_80"): Config(128, 64, 8, 2) for size in (64, 128)},
    ("lean", 256, "sm_80"): Config(64, 32, 8, 2),
    **{("rich", size, target): Config(64, 64, 8, 2) for size in (64, 128) for target in ("sm_90", "sm_100")},
    **{("rich", 256, target): Config(64, 32, 8, 2) for target in ("sm_90", "sm_100")},
    **{("rich", size, "sm_80"): Config(64, 64, 8, 1) for size in (64, 128)},
    ("rich", 256, "sm_80"): Config(64, 32, 8, 1),
    **{(step, size, "gfx942"): Config(64, 64, 4, 2) for step in ("lean", "rich") for size in (64, 128)},
    **{(step, 256, "gfx942"): Config(64, 32, 4, 1) for step in ("lean", "rich")},
    **{(step, "chunked", target): Config(32, 32, 4, 1) for step in ("lean", "rich") for target in _ARCHITECTURES},
}
_CHUNK = {2: 64, 4: 32}  # part of the head size that one step of a chunked product takes, by the operands' width
LARGEST_WHOLE = 256  # of the head sizes that fit a tile of 16-bit operands


def _shape(itemsize: int, size: int, value_size: int) -> tuple[int | str, int, int]:
    """(key of the table, BLOCK_D, BLOCK_E) of a pair of head sizes."""
    block_d, block_e = (max(16, triton.next_power_of_2(x)) for x in (size, value_size))
    if itemsize == 2 and max(block_d, block_e) <= LARGEST_WHOLE:
        return max(64, block_d, block_e), block_d, block_e
    return "chunked", min(block_d, _CHUNK[itemsize]), min(block_e, _CHUNK[itemsize])


@functools.cache
def _architecture(device: torch.device) -> str:
    """The row of the table that serves a device; the interpreter takes the Hopper one."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def _reduce(source: Tensor, out: Tensor, begin: Tensor, end: Tensor, batch: int, order: Tensor | None = None) -> None:
    """source (kinds, B, H, slots, width) into out (kinds, B, H, segments, width), any strides of the last two dimensions."""
    kinds, _, heads, segments, width = out.shape
    if out.numel() == 0:
        return
    block = min(32, triton.next_power_of_2(width))
    reduce_kernel[(segments, heads, kinds * batch)](
        source, out, order, begin.repeat(kinds, 1), end.repeat(kinds, 1),
        width, segments, batch, 0 if order is None else order.shape[1],
        source.stride(2), source.stride(3), source.stride(4), out.stride(2), out.stride(3), out.stride(4),
        GATHER=order is not None, BLOCK_S=128, BLOCK_I=block, num_warps=4,
    )  # fmt: skip


def forward(problem: Problem) -> Sums:
    query, key, value, grad, lse, low, high, diagonal, key_valid, row_segment, column_segment, pairs, scale, softcap, outputs = problem
    batch, heads, n, size = query.shape
    m, value_size, device = key.shape[2], value.shape[3], query.device
    row_segments, segments = pairs.shape
    kinds = [kind for kind in range(4) if outputs >> kind & 1]
    planes = {name: kinds.index(kind) if kind in kinds else -1 for kind, name in enumerate(("ABS", "SIGNED", "POS", "ATTN"))}
    results = bins, headsum, row_bins, column_bins, matrix = Sums.of(problem)
    if batch * heads * n * m * row_segments * segments == 0:
        return Sums(*results)

    bucket, block_d, block_e = _shape(query.dtype.itemsize, size, value_size)
    architecture = _architecture(device)
    config = _CONFIGS["lean", bucket, architecture]
    short = tiles.few(row_segments, n, config.block_m) and tiles.few(segments, m, config.block_n)
    if outputs != 1 or softcap > 0 or diagonal is not None or not short:
        config = _CONFIGS["rich", bucket, architecture]
    wanted = pairs != 0
    # Attention mass is there where the gradient is zero; everything else is zero with it.
    by_gradient = None if planes["ATTN"] >= 0 else grad
    rows_cut = tiles.few(row_segments, n, config.block_m)
    columns_cut = tiles.few(segments, m, config.block_n)
    columns = tiles.column_side(column_segment, key_valid, wanted, config.block_n, columns_cut)
    rows = tiles.row_side(row_segment, low, high, wanted, by_gradient, config.block_m, rows_cut)
    row_slots, column_slots = rows.tiles + row_segments, columns.tiles + segments
    by_row = bool(outputs & ROW_BINS)
    spans = columns_cut and (rows_cut or by_row or n * segments <= row_slots * column_slots)

    strides = [t.stride(dim) for t in (query, key, value, grad) for dim in range(3)]
    common = {
        "CAPPED": softcap > 0, "DIAGONAL": diagonal is not None, "SIZE": size, "VALUE_SIZE": value_size,
        "COMPUTE": _compute(query.dtype), "PRECISION": _precision(query.dtype), "CHUNKED": bucket == "chunked",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": block_d, "BLOCK_E": block_e,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    tensors = query, key, value, grad, lse, low, high, diagonal
    group = heads // key.shape[1]
    numbers = float(scale), float(softcap)

    if kinds and spans:
        apart = by_row or not rows_cut
        slots = n if apart else rows.tiles
        partial = (torch.zeros if apart else torch.empty)(len(kinds), batch, heads, slots, segments, dtype=torch.float32, device=device)
        spans_kernel[(rows.tiles * segments, heads, batch)](
            *tensors, rows.order, rows.segment, rows.start, rows.length, columns.order, columns.start, columns.length,
            tiles.row_spans(rows, columns, low, high, diagonal, wanted, m, bucket != "chunked"), pairs, partial, matrix,
            n, m, group, rows.tiles, columns.tiles, segments, batch * heads * slots * segments, *strides, *numbers,
            **planes, ROWS=apart, STORE=bool(outputs & MATRIX), **common,
        )  # fmt: skip
        if apart:
            _reduce(partial, bins, rows.begin[:, :-1].int(), rows.begin[:, 1:].int(), batch, rows.order)
        else:
            _reduce(partial, bins, rows.tile_begin.int(), rows.tile_end.int(), batch)
        if by_row:
            row_bins = partial[planes["ABS"]]

    def pieces(planes: dict[str, int], count: int, over_heads: bool, into: Tensor) -> None:
        inner = 1 if over_heads else heads
        partial = torch.zeros(count, batch, inner, row_slots, column_slots, dtype=torch.float32, device=device)
        separate = not over_heads and by_row
        parts = partial.new_zeros((1, batch, heads, n, column_slots) if separate else (0,))
        pieces_kernel[(rows.tiles * columns.tiles, inner, batch)](
            *tensors, rows.order, rows.segment, rows.start, rows.length, rows.first.int(), (rows.last + 1).int(),
            columns.order, columns.segment, columns.start, columns.length, columns.first.int(), (columns.last + 1).int(),
            tiles.tile_pairs(rows, columns, low, high, wanted, m), pairs, partial, parts, matrix,
            n, m, heads, heads if over_heads else 1, group, rows.tiles, columns.tiles, row_segments, segments, partial.stride(0),
            *strides, *numbers,
            **planes, BY_ROW=separate, STORE=bool(outputs & MATRIX) and not over_heads, **common,
        )  # fmt: skip
        by_segment = torch.empty(count, batch, inner, row_segments, column_slots, dtype=torch.float32, device=device)
        _reduce(partial, by_segment, *rows.pieces(), batch)
        _reduce(by_segment.mT, into.view(count, batch, inner, row_segments, segments).mT, *columns.pieces(), batch)
        if separate:
            _reduce(parts.mT, row_bins[None].mT, *columns.pieces(), batch)

    if kinds and not spans:
        pieces(planes, len(kinds), False, bins)
    if outputs & HEADSUM:
        pieces({"ABS": 0, "SIGNED": -1, "POS": -1, "ATTN": -1}, 1, True, headsum)
    if outputs & COLUMN_BINS:
        if not rows.cut:
            rows = tiles.row_side(row_segment, low, high, wanted, by_gradient, config.block_m, True)
        columns_kernel[(columns.tiles * row_segments, heads, batch)](
            *tensors, rows.order, rows.start, rows.length, columns.order, columns.segment, columns.start, columns.length,
            tiles.column_spans(rows, columns, low, high, wanted, m), pairs, column_bins,
            n, m, group, rows.tiles, columns.tiles, row_segments, segments, *strides, *numbers, **common,
        )  # fmt: skip
    return Sums(bins, headsum, row_bins, column_bins, matrix)


def _compute(dtype: torch.dtype) -> tl.dtype:
    """Operand type of the products. The interpreter has no bfloat16 product; widening first gives the same exact products."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreting() else tl.bfloat16
    return {torch.float32: tl.float32, torch.float16: tl.float16}[dtype]


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact ones unless PyTorch was told that TF32 will do."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def aot_cases() -> list[AotCase]:
    """Head sizes × dtypes × options. What a mask does is in the data, so causal, window, padding and documents are no variants."""
    pointers = {
        name: kind
        for kind, names in {
            "*i32": (
                "low high diagonal row_order row_segment row_start row_count row_first row_end column_order column_segment column_start "
                "column_count column_first column_end spans active order begin end"
            ),
            "*u8": "pairs",
            "*fp32": "lse partial by_row matrix column_bins source out",
        }.items()
        for name in names.split()
    }
    wide = ("plane", "source_plane", "out_plane", "source_slot", "out_segment")
    off = {"CAPPED": False, "DIAGONAL": False, "diagonal": None}
    on = {"CAPPED": True, "DIAGONAL": True}
    first = {"ABS": 0, "SIGNED": -1, "POS": -1, "ATTN": -1}
    every = {"ABS": 0, "SIGNED": 1, "POS": 2, "ATTN": 3}
    plain = {"STORE": False, "matrix": None}
    cases = []

    def case(name, kernel, config, constants, target, kind):
        tensors = {name: f"*{kind}" for name in ("query", "key", "value", "grad")}
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants or argument.isupper():
                signature[argument] = "constexpr"
            elif argument in ("scale", "softcap"):
                signature[argument] = "fp32"
            else:
                signature[argument] = {**pointers, **tensors}.get(argument, "i64" if argument in wide else "i32")
        divisible = tuple(argument for argument in signature if argument.startswith("stride_") and signature[argument] == "i32")
        stack = "float32 on scalar units, or head sizes beyond 256: tens of bytes of stack beside hundreds of products an entry"
        spills = dict.fromkeys(("sm_80", "sm_90", "sm_100"), stack) if constants.get("CHUNKED") else {}
        everyday = "bf16 128" in name or (target == "sm_90" and "fp32 64" in name)
        cases.append(
            AotCase(f"saliency_flow {name}", kernel, signature, constants, config.num_warps, config.num_stages, divisible, (target,),
                    spills, everyday)
        )  # fmt: skip

    sizes = [(kind, size, size) for kind in ("bf16", "fp16", "fp32") for size in (64, 128, 256)] + [("bf16", 576, 512)]
    dtypes = {"bf16": (2, tl.bfloat16), "fp16": (2, tl.float16), "fp32": (4, tl.float32)}
    for target in _ARCHITECTURES:
        for kind, size, value_size in sizes:
            itemsize, compute = dtypes[kind]
            bucket, block_d, block_e = _shape(itemsize, size, value_size)

            def add(name, kernel, constants, step="rich", target=target, kind=kind, size=size, value_size=value_size, compute=compute,
                    bucket=bucket, block_d=block_d, block_e=block_e):  # fmt: skip
                config = _CONFIGS[step, bucket, target]
                shape = {
                    "SIZE": size, "VALUE_SIZE": value_size, "BLOCK_D": block_d, "BLOCK_E": block_e, "BLOCK_M": config.block_m,
                    "BLOCK_N": config.block_n, "COMPUTE": compute, "PRECISION": "ieee", "CHUNKED": bucket == "chunked",
                }  # fmt: skip
                case(f"{name} {kind} {size}", kernel, config, {**shape, **constants}, target, kind)

            rows = {"ROWS": False, "row_segment": None, "pairs": None}
            add("spans", spans_kernel, {**off, **first, **plain, **rows}, "lean")
            add("spans.all_options", spans_kernel, {**on, **every, "STORE": True, "ROWS": True})
            add("pieces.heads", pieces_kernel, {**off, **first, **plain, "BY_ROW": False, "by_row": None})
            add("pieces.all_options", pieces_kernel, {**on, **every, "STORE": True, "BY_ROW": True})
            add("columns", columns_kernel, on)
        for name, constants in (("reduce", {"GATHER": False, "order": None}), ("reduce.gather", {"GATHER": True})):
            case(name, reduce_kernel, Config(0, 0, 4, 1), {**constants, "BLOCK_S": 128, "BLOCK_I": 32}, target, "fp32")
    return cases
