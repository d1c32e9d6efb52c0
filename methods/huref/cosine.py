"""Parameter cosine of two checkpoints, tensor by tensor, with the list of what was not compared.

PCS = <a, b> / (|a| |b|) over all parameters that both have under one name in one shape. Decisive for honest derivatives (a fine-tuned model
stays near 1, unrelated ones near 0) and blind to any permutation or mixing of dimensions; the invariant terms see through those.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llmcore.methods.huref.adapters import open_checkpoint
from llmcore.methods.huref.layouts import Reader

_BLOCK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class ParameterCosine:
    """value: the cosine (NaN when nothing could be compared). skipped: (tensor, elements, reason)."""

    value: float
    compared_tensors: int
    compared_elements: int
    skipped: list[tuple[str, int, str]]
    bytes_read: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def pcs(
    a: str | Path,
    b: str | Path,
    *,
    exclude: Sequence[str] = (),
    common_rows: bool = False,
    base_a: str | Path | None = None,
    base_b: str | Path | None = None,
) -> ParameterCosine:
    """Parameter cosine of two checkpoints, streamed; float64 accumulation.

    Args:
        exclude: leave out tensors whose name contains one of these; "norm" and "embed" are wise, since norm gains near 1 alone lift the
            cosine of unrelated models. common_rows: compare the first common rows of tensors that differ in their number of rows only
            (vocabularies extended at the end); otherwise such tensors are skipped and listed.
    """
    reader_a, reader_b = open_checkpoint(a, base=base_a), open_checkpoint(b, base=base_b)
    try:
        return _pcs(reader_a, reader_b, tuple(exclude), common_rows)
    finally:
        reader_a.close()
        reader_b.close()


def _canonical(reader: Reader) -> dict[str, str]:
    """Canonical name -> the name to read by: GGUF files answer to Hugging Face names."""
    names = getattr(reader, "huggingface_names", None)
    table = names() if names is not None else {n: n for n in reader.names()}
    plain = {n: n for n in reader.names() if not n.endswith(("_scale", "_scale_inv", ".scale_weight"))}
    return {name: name for name in table} if getattr(reader, "format", "") == "gguf" else plain


def _pcs(reader_a: Reader, reader_b: Reader, exclude: tuple[str, ...], common_rows: bool) -> ParameterCosine:
    names_a, names_b = _canonical(reader_a), _canonical(reader_b)
    skipped: list[tuple[str, int, str]] = []
    dot = square_a = square_b = 0.0
    tensors = elements = 0
    for name in sorted(names_a.keys() | names_b.keys()):
        where = reader_a if name in names_a else reader_b
        shape = where.shape(name)
        if name not in names_a or name not in names_b:
            skipped.append((name, math.prod(shape), f"only in {'a' if name in names_a else 'b'}"))
            continue
        other = reader_b.shape(name)
        if any(part in name for part in exclude):
            skipped.append((name, math.prod(shape), "excluded"))
            continue
        rows = shape[0] if shape else 1
        if shape != other:
            if not (common_rows and len(shape) == len(other) and shape and shape[1:] == other[1:]):
                skipped.append((name, math.prod(shape), f"shape {shape} against {other}"))
                continue
            rows = min(shape[0], other[0])
            skipped.append((name, abs(shape[0] - other[0]) * math.prod(shape[1:]), "rows that one side does not have"))
        step = max(1, _BLOCK_BYTES // (4 * max(1, math.prod(shape[1:]))))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            x, y = (
                r.slice(name, start, stop, dtype=torch.float32) if shape else r.read(name, dtype=torch.float32)
                for r in (reader_a, reader_b)
            )
            sums = _pair_sums(x, y)
            square_a, square_b, dot = square_a + sums[2], square_b + sums[3], dot + sums[4]
        tensors, elements = tensors + 1, elements + rows * math.prod(shape[1:])
    value = dot / math.sqrt(square_a) / math.sqrt(square_b) if square_a > 0 and square_b > 0 else math.nan
    return ParameterCosine(value, tensors, elements, skipped, reader_a.bytes_read + reader_b.bytes_read)


def _pair_sums(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    from llmcore.kernels.invariants import stored_sums

    return stored_sums(x.reshape(-1), y.reshape(-1)).tolist()
