"""A checkpoint made ready for its terms: reader, layout and vocabulary; its token list; the terms themselves as matrices."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from llmcore.kernels.invariants import invariant_matrix
from llmcore.methods.huref.adapters import AdaptedReader, open_checkpoint
from llmcore.methods.huref.layouts import LARGEST_BLOCK, Layout, Reader, find_layout, layer_indices
from llmcore.methods.huref.terms import CHANNELS, check_terms, embedding_rows, layer_factors
from llmcore.methods.huref.tokens import TokenList, Vocabulary, read_vocabulary

LAYERS = (-2, -1)
Tokens = TokenList | Sequence[int] | str | Path | None


@dataclasses.dataclass
class Opened:
    """A checkpoint made ready: reader, layout, vocabulary (None without tokenizer files)."""

    reader: Reader
    layout: Layout
    vocabulary: Vocabulary | None
    path: Path

    def forget_vocabulary(self) -> None:
        """Drop what only the alignment of tokens needs: the strings, and with a GGUF file the tokenizer in its metadata."""
        self.vocabulary = None
        metadata = getattr(self.reader, "metadata", None) or {}
        for key in [k for k in metadata if k.startswith("tokenizer.")]:
            del metadata[key]

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.reader.close()


def open_model(path: str | Path, *, base: str | Path | None = None, layout: str | None = None, compat: str | None = None) -> Opened:
    reader = open_checkpoint(path, base=base)
    try:
        found = find_layout(reader, layout=layout, compat=compat)
        metadata = getattr(reader, "metadata", None)
        vocabulary = read_vocabulary(reader.path, metadata)
        if vocabulary is None and isinstance(reader, AdaptedReader):
            vocabulary = read_vocabulary(reader.base_path, metadata)
    except BaseException:
        reader.close()
        raise
    return Opened(reader, found, vocabulary, Path(path))


def release_free_memory() -> None:
    """Give freed heap back to the system where the C library can (glibc); elsewhere nothing happens."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def give_back_blocks(least_bytes: int = 1 << 18) -> None:
    """Have glibc return every freed block of least_bytes or more at once, for the whole process; elsewhere nothing happens.

    Left alone it raises this threshold to the largest block freed so far and keeps what is freed later, which a budget of memory cannot
    know. The command line calls this; a program that wants the same sets MALLOC_MMAP_THRESHOLD_=262144.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    if sys.platform == "linux" and (setting := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        setting(mmap_threshold, least_bytes)


def resolve_tokens(tokens: Tokens, model: Opened) -> TokenList:
    """A token list of a model: given, from a file, from explicit ids, or ranked from its own tokenizer."""
    if isinstance(tokens, TokenList):
        return tokens
    if isinstance(tokens, (str, Path)):
        return TokenList.from_file(tokens, model.vocabulary)
    if tokens is not None:
        ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else list(tokens)
        return TokenList.of(ids, model.vocabulary)
    if model.vocabulary is None:
        raise ValueError(f"tokens: {model.path} has no tokenizer file to rank tokens by; pass tokens= (a TokenList, ids, or a file of ids)")
    found = TokenList.from_tokenizer(model.vocabulary)
    if max(found.ids, default=0) < model.layout.vocab_size:
        return found
    keep = [i for i, token in enumerate(found.ids) if token < model.layout.vocab_size]
    return TokenList(tuple(found.ids[i] for i in keep), tuple(found.strings[i] for i in keep), found.source)


def invariant_terms(
    path: str | Path,
    *,
    layers: Sequence[int] = LAYERS,
    tokens: Tokens = None,
    K: int = 4096,
    terms: str | Sequence[str] = "paper",
    gqa: str = "interleave",
    ff: str = "gate_times_up",
    compat: str | None = None,
    layout: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The invariant terms themselves, (C, K, K): channels (qk, vo, ff) of the first layer, then of the next, not standardised.

    Args:
        layers: layer indices, negative from the end. tokens: a TokenList, ids in order, a file, or None for the model's own ranking; the
        last K
            are used. terms: "paper", "hardened" (qk*, vo*, up*), or both (then the paper's three channels come first in each layer).
        gqa: "interleave" (query head h meets key/value head h // (H / G), as models compute it) or "tile" (published: h mod G).
        compat: "published" for the published splits of fused tensors. dtype: of arithmetic and result; float64 makes this the exact form.

    Memory: C · K² numbers for the result. Comparisons and fingerprints never need it: see compare and fingerprint.
    """
    chosen = check_terms(terms)
    with open_model(path, base=base, layout=layout, compat=compat) as model:
        listed = resolve_tokens(tokens, model).last(K)
        embeddings = embedding_rows(model.reader, model.layout, listed.ids, dtype)
        result = []
        for index in layer_indices(model.layout, layers):
            found = {
                f.name: invariant_matrix(f.left, f.right)
                for f in layer_factors(model.reader, model.layout, index, embeddings, terms=chosen, gqa=gqa, ff=ff)
            }
            result += [found[name] for t in chosen for name in CHANNELS[t]]
    return torch.stack(result)


def block_bytes(max_memory: int | None) -> int:
    """Largest block of rows that is read: a sixteenth of the budget (four are alive at once), at most the default."""
    if max_memory is None:
        return LARGEST_BLOCK
    if max_memory < 1 << 20:
        raise ValueError(f"max_memory must be at least 1 MiB (1048576 bytes), got {max_memory}")
    return max(1 << 16, min(LARGEST_BLOCK, max_memory // 16))
