"""Where the matrices of a layer lie in a checkpoint, for every family of models, and how their rows are read.

A `Matrix` is a linear weight in (out, in) orientation whose rows are read in blocks: stored rows may be shuffled by fusion (per head
[q | k | v], per group [r queries | k | v], [gate | up]) or the whole tensor stored transposed. Layouts are chosen by `model_type` of the
configuration and confirmed by names and shapes. Grouped heads: query head h meets key/value head h // (H / G), as the models compute it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from llmcore.methods.huref.families import FAMILIES, REFUSED, Family

from llmcore.checkpoints import CheckpointError

# D hidden size, H query heads, G key/value heads, d head dimension, F feed-forward width

BLOCK_BYTES = 1 << 20  # sequential reads of some size, and few enough rows that blocks are small beside the factors
FEWEST_ROWS = 256  # fewer rows make a product that runs at a fraction of the machine's rate
WIDE_ROWS = 1024  # of a matrix so wide that BLOCK_BYTES hold less than half of FEWEST_ROWS: each block's product reads all of X (K, D)
LARGEST_BLOCK = 64 << 20


class Reader(Protocol):
    """What is asked of a checkpoint: CheckpointReader, or one with an adapter's changes on top."""

    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def bytes_read(self) -> int: ...

    path: Path
    header_bytes: int

    def names(self) -> list[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def nbytes(self, name: str) -> int: ...
    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor: ...
    def slice(
        self, name: str, start: int, stop: int, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...
    def rows(self, name: str, ids: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor: ...
    def close(self) -> None: ...


@dataclasses.dataclass
class Matrix:
    """A linear weight (out, in). rows: stored row of each logical row, None for all in order. transposed: stored as (in, out)."""

    name: str
    out_size: int
    in_size: int
    rows: np.ndarray | None = None
    transposed: bool = False

    def read(self, reader: Reader, start: int, stop: int, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logical rows [start, stop), (stop - start, in); in the first rows of `out` (rows, in) where they are stored in order."""
        into = None if out is None else out[: stop - start]
        if self.transposed:
            whole = reader.read(self.name, dtype=dtype).mT
            return (whole if self.rows is None else whole[torch.from_numpy(self.rows)])[start:stop]
        if self.rows is None:
            return reader.slice(self.name, start, stop, dtype=dtype, out=into)
        wanted = self.rows[start:stop]
        if len(wanted) and np.array_equal(wanted, np.arange(wanted[0], wanted[0] + len(wanted))):
            return reader.slice(self.name, int(wanted[0]), int(wanted[0]) + len(wanted), dtype=dtype, out=into)
        return reader.rows(self.name, wanted, dtype=dtype)

    def block_rows(self, dtype: torch.dtype, limit: int, *, multiple: int = 1) -> int:
        """Rows of a block: BLOCK_BYTES, yet enough of them for a product at full rate, within `limit` bytes; a transposed matrix whole."""
        if self.transposed:
            return self.out_size
        return max(multiple, rows_of_block(self.in_size * dtype.itemsize, limit) // multiple * multiple)

    def blocks(self, reader: Reader, dtype: torch.dtype, limit: int, *, multiple: int = 1) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows) over the whole matrix; see read_blocks."""
        for start, stop, (rows,) in read_blocks([self], reader, dtype, limit, multiple=multiple):
            yield start, stop, rows

    def nbytes(self, reader: Reader) -> int:
        """Stored bytes of the rows that are used."""
        rows = reader.shape(self.name)[0]
        return reader.nbytes(self.name) if self.transposed or self.rows is None else reader.nbytes(self.name) * len(self.rows) // rows


def rows_of_block(row_bytes: int, limit: int) -> int:
    rows = BLOCK_BYTES // row_bytes
    return min(WIDE_ROWS if 2 * rows < FEWEST_ROWS else max(rows, FEWEST_ROWS), limit // row_bytes)


def read_blocks(
    matrices: Sequence[Matrix], reader: Reader, dtype: torch.dtype, limit: int, *, multiple: int = 1
) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """(start, stop, rows of each matrix) over matrices of one shape; a thread reads the next block while the caller computes.

    Two blocks of each matrix are alive, in the same memory all the way: fresh memory for each costs more time than reading. The rows last
    until the next block is asked for.
    """
    height, step = matrices[0].out_size, matrices[0].block_rows(dtype, limit, multiple=multiple)
    bounds = [(start, min(start + step, height)) for start in range(0, height, step)]
    memory = [
        [None if m.transposed else torch.empty(min(step, height), m.in_size, dtype=dtype) for m in matrices] for _ in bounds[:2]
    ]

    def read(i: int) -> list[torch.Tensor]:
        return [finite(m.read(reader, *bounds[i], dtype, out), reader, m.name) for m, out in zip(matrices, memory[i % 2], strict=True)]

    if len(bounds) == 1:
        yield *bounds[0], read(0)
        return
    with ThreadPoolExecutor(1, "huref-read") as ahead:
        upcoming = ahead.submit(read, 0)
        for i, (start, stop) in enumerate(bounds):
            rows = upcoming.result()
            if i + 1 < len(bounds):
                upcoming = ahead.submit(read, i + 1)
            yield start, stop, rows


def finite(values: torch.Tensor, reader: Reader, name: str) -> torch.Tensor:
    """The values, refused when one of them is NaN or infinite (x · 0 is 0 for finite x alone)."""
    if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{reader.path}: tensor {name!r} holds NaN or infinite numbers")
    return values


@dataclasses.dataclass
class Layer:
    """Matrices of one layer. experts: (gate or None, up, down) of each expert (one for a dense model).

    norm_attention, norm_mlp: names of the gains before the two sub-layers (None: no such norm); norm_after_*: after them, on the output.
    """

    query: Matrix
    key: Matrix
    value: Matrix
    output: Matrix
    experts: list[tuple[Matrix | None, Matrix, Matrix]]
    norm_attention: str | None = None
    norm_mlp: str | None = None
    norm_after_attention: str | None = None
    norm_after_mlp: str | None = None

    def matrices(self) -> list[Matrix]:
        return [self.query, self.key, self.value, self.output, *(m for expert in self.experts for m in expert if m is not None)]


@dataclasses.dataclass
class Layout:
    """Everything that the terms need to know of a checkpoint."""

    model_type: str
    embedding: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_offset: float
    has_qk_position: bool
    compat: str
    layer_prefix: str
    _family: Family
    _reader: Reader

    def layer(self, index: int) -> Layer:
        """Layer `index` (negative counts from the end)."""
        if not -self.num_layers <= index < self.num_layers:
            raise ValueError(f"layers must lie in [-{self.num_layers}, {self.num_layers}) for {self._reader.path}, got {index}")
        return _layer(self, self._family, index % self.num_layers)


def find_layout(reader: Reader, *, layout: str | None = None, compat: str | None = None) -> Layout:
    """The layout of a checkpoint.

    Args:
        layout: a model type of FAMILIES that overrides the configuration's. compat: None, or "published" for the tensor splits of the
            published code (per-head and per-group fused tensors cut in thirds, gpt2's output not transposed, chatglm's gate dropped).

    Raises: ValueError for a model type that is not supported; CheckpointError for missing tensors or shapes that contradict the
    configuration.
    """
    if compat not in (None, "published"):
        raise ValueError(f"compat must be None or 'published', got {compat!r}")
    config = reader.config
    if not config:
        raise CheckpointError(f"{reader.path}: config.json is missing; the numbers of heads cannot be told from the tensors alone")
    nested = next((config[k] for k in ("text_config", "llm_config", "language_config") if isinstance(config.get(k), dict)), None)
    if nested is not None:
        config = {**config, **nested}
    model_type = layout or config.get("model_type", "")
    if model_type in ("gemma3", "gemma3n", "mistral3"):
        model_type = {"gemma3": "gemma3_text", "mistral3": "mistral"}.get(model_type, model_type)
    if model_type in REFUSED:
        raise ValueError(f"{reader.path}: model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{reader.path}: model_type {model_type!r} is not supported; pass layout= with one of {', '.join(sorted(FAMILIES))} "
            "if the tensors are named as there"
        )
    family = FAMILIES[model_type]
    stem = family.embedding
    present = set(reader.names())
    candidates = [
        stem,
        *(p + stem for p in ("language_model.", "text_model.", "model.")),
        stem.replace("model.", "model.language_model.", 1),
        stem.removeprefix("transformer."),
        stem.removeprefix("model."),
        stem.removeprefix("gpt_neox."),
    ]
    found = next((name for name in candidates if name in present or name in reader), None)
    if found is None:
        raise CheckpointError(
            f"{reader.path}: no embedding tensor {stem!r} (model_type {model_type!r}); pass layout= to choose another family"
        )
    if found.endswith(stem):
        layer_prefix = found[: len(found) - len(stem)] + family.layer
    elif stem.endswith(found):
        layer_prefix = family.layer.removeprefix(stem[: len(stem) - len(found)])
    else:
        layer_prefix = family.layer.replace("model.", "model.language_model.", 1)
    vocab_size, hidden = reader.shape(found)

    def number(*keys: str, default: int | None = None) -> int:
        value = next((config[k] for k in keys if isinstance(config.get(k), int) and not isinstance(config[k], bool)), default)
        if value is None or value < 1:
            raise CheckpointError(f"{reader.path}: config.json: {keys[0]} must be a positive integer, got {value!r}")
        return value

    heads = number("num_attention_heads", "n_head", "n_heads", "num_heads")
    layers = number("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    kv_heads = number("num_key_value_heads", "num_kv_heads", "multi_query_group_num", default=heads)
    if model_type == "chatglm" and not config.get("multi_query_attention", "multi_query_group_num" in config):
        kv_heads = heads
    if model_type == "falcon":
        kv_heads = kv_heads if config.get("new_decoder_architecture") else 1 if config.get("multi_query", True) else heads
        fused = "groups" if config.get("new_decoder_architecture") else "thirds" if config.get("multi_query", True) else "heads"
        norms = ("ln_attn", "ln_mlp", None, None) if layer_prefix.format(0) + "ln_attn.weight" in present else family.norms
        if not config.get("parallel_attn", True) and not config.get("new_decoder_architecture"):
            norms = ("input_layernorm", "post_attention_layernorm", None, None)
        family = dataclasses.replace(family, fused=fused, norms=norms)
    if model_type == "gpt_neox" and "num_key_value_heads" not in config:
        kv_heads = heads
    if heads % kv_heads:
        raise CheckpointError(f"{reader.path}: config.json: {heads} query heads are not a multiple of {kv_heads} key/value heads")
    head_dim = number("head_dim", "kv_channels", default=max(hidden // heads, 1))
    if compat == "published" and family.fused in ("heads", "groups"):
        family = dataclasses.replace(family, fused="thirds")
    return Layout(
        model_type,
        found,
        hidden,
        vocab_size,
        layers,
        heads,
        kv_heads,
        head_dim,
        family.norm_offset,
        family.rotary,
        compat or "",
        layer_prefix,
        family,
        reader,
    )


def _fused_rows(kind: str, heads: int, groups: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored rows of the logical q (H·d), k and v (G·d) in a fused tensor."""
    if kind == "thirds":
        edges = np.cumsum([0, heads * dim, groups * dim, groups * dim])
        return tuple(np.arange(edges[i], edges[i + 1]) for i in range(3))  # type: ignore[return-value]
    repeat = heads // groups
    rows = np.arange(groups * (repeat + 2) * dim).reshape(groups, repeat + 2, dim)  # "heads" is G = H
    return rows[:, :repeat].reshape(-1), rows[:, repeat].reshape(-1), rows[:, repeat + 1].reshape(-1)


def _layer(layout: Layout, family: Family, index: int) -> Layer:
    reader, prefix = layout._reader, layout.layer_prefix.format(index)
    hidden, heads, groups, dim = layout.hidden_size, layout.num_heads, layout.num_kv_heads, layout.head_dim

    def matrix(
        name: str,
        out_size: int | None,
        in_size: int | None,
        rows: np.ndarray | None = None,
        total: int | None = None,
        transposed: bool = family.transposed,
    ) -> Matrix:
        full = f"{prefix}{name}.weight"
        shape = reader.shape(full)
        stored_out, stored_in = (shape[1], shape[0]) if transposed and len(shape) == 2 else (shape[0], shape[-1])
        expected_out = total if total is not None else out_size
        if len(shape) != 2 or (expected_out is not None and stored_out != expected_out) or (in_size is not None and stored_in != in_size):
            raise CheckpointError(
                f"{reader.path}: tensor {full!r}: shape {shape} does not fit the configuration (hidden size {hidden}, "
                f"{heads} heads, {groups} key/value heads of {dim})"
            )
        return Matrix(full, out_size if out_size is not None else stored_out, stored_in, rows, transposed)

    if family.qkv is not None:
        fused = [(heads + 2 * groups) * dim]
        rows = _fused_rows(family.fused or "thirds", heads, groups, dim)
        query, key, value = (matrix(family.qkv, len(r), hidden, r, fused[0]) for r in rows)
    else:
        query = matrix(family.query, heads * dim, hidden)
        key, value = matrix(family.key, groups * dim, hidden), matrix(family.value, groups * dim, hidden)
    published_gpt2 = layout.compat == "published" and family.transposed
    output = matrix(family.output, hidden, heads * dim, transposed=family.transposed and not published_gpt2)

    experts: list[tuple[Matrix | None, Matrix, Matrix]] = []
    if family.experts is not None and f"{prefix}{family.experts[1].format(0)}.weight" in reader:
        number = 0
        while f"{prefix}{family.experts[1].format(number)}.weight" in reader:
            gate, up, down = (name.format(number) for name in family.experts)
            experts.append((matrix(gate, None, hidden), matrix(up, None, hidden), matrix(down, hidden, None)))
            number += 1
    elif family.gate_up is not None:
        stored = reader.shape(f"{prefix}{family.gate_up}.weight")[0]
        if stored % 2:
            raise CheckpointError(f"{reader.path}: tensor {prefix}{family.gate_up}.weight: {stored} rows are not [gate | up]")
        half = stored // 2
        gate_matrix = matrix(family.gate_up, half, hidden, np.arange(half), stored)
        up_matrix = matrix(family.gate_up, half, hidden, np.arange(half, stored), stored)
        dropped = layout.compat == "published" and layout.model_type == "chatglm"
        experts.append((None if dropped else gate_matrix, up_matrix, matrix(family.down, hidden, half)))
    else:
        up = matrix(family.up, None, hidden)
        experts.append((matrix(family.gate, up.out_size, hidden) if family.gate else None, up, matrix(family.down, hidden, up.out_size)))

    def norm(name: str | None) -> str | None:
        return f"{prefix}{name}.weight" if name is not None and f"{prefix}{name}.weight" in reader else None

    return Layer(query, key, value, output, experts, *(norm(name) for name in family.norms))


def layer_indices(layout: Layout, layers: Sequence[int]) -> list[int]:
    """Non-negative indices of the layers asked for that exist: of a one-layer model (-2, -1) gives its one layer."""
    kept = [i for i in layers if -layout.num_layers <= i < layout.num_layers]
    if not kept:
        raise ValueError(f"layers {tuple(layers)} do not exist in a model of {layout.num_layers} layers")
    return [i % layout.num_layers for i in kept]
