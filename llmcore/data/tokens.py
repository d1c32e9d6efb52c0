"""Rows become token sequences: where a completion starts, how it ends, what is too long or empty."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmcore.data.rows import Row, Text, common_prefix

TRUNCATION = ("reject", "keep_start", "keep_end", "drop")
ON_EMPTY = ("error", "zero", "drop")


@dataclass(frozen=True)
class Tokens:
    """One sequence: token ids and where its completion starts. Everything from `start` on is completion."""

    ids: np.ndarray
    start: int

    @property
    def scored(self) -> int:
        return max(0, len(self.ids) - max(self.start, 1))


@dataclass(frozen=True)
class Example:
    """One tokenised row: two sequences (chosen, rejected) or one."""

    id: str
    sequences: tuple[Tokens, ...]
    desirable: bool | None = None


@dataclass(frozen=True)
class Tokenized:
    """Examples and what the policies did: counts of rows read, dropped, truncated, with a merged boundary, …"""

    examples: list[Example]
    counts: dict[str, int]


def tokenize(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    stop_ids: Sequence[int],
    max_length: int | None = 512,
    truncation: str = "reject",
    on_empty: str = "error",
    vocab_size: int | None = None,
) -> Tokenized:
    """Tokenise rows; a completion starts at the end of the longest common prefix of tokens(prompt) and tokens(prompt + completion).

    Args:
        rows: from read_rows.
        tokenizer: a transformers tokenizer; messages go through its chat template.
        stop_ids: the ids that end a completion, from the model's generation config (a tokenizer's eos_token may be another one). A
            completion that does not end with one of them gets the first; what a chat template writes after the end of the last turn is cut.
        max_length: tokens a sequence may have; None for no limit.
        truncation: "reject" raises for a row that is longer; "drop" removes it; "keep_start" cuts the end of each sequence; "keep_end"
            cuts the same number of tokens from the start of a row's sequences, so that both sides of a pair keep one prompt.
        on_empty: a completion without text or without a scored token: "error", "drop" its row, or "zero" (log-probability 0, no gradient).
        vocab_size: rows of the model's output embedding; an id beyond it is an error here instead of deep inside a kernel.

    Raises:
        ValueError: naming the row.
    """
    if truncation not in TRUNCATION:
        raise ValueError(f"truncation must be one of {TRUNCATION}, got {truncation!r}")
    if on_empty not in ON_EMPTY:
        raise ValueError(f"on_empty must be one of {ON_EMPTY}, got {on_empty!r}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if not stop_ids:
        raise ValueError("stop_ids must name at least one end-of-turn token id, got none; take them from the model's generation config")
    counts = dict.fromkeys(("rows", "kept", "dropped_long", "dropped_empty", "truncated", "empty", "boundary_merged", "identical"), 0)
    counts["rows"] = len(rows)
    chat = any(not isinstance(row.prompt, str) for row in rows)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{rows[0].id}: rows are conversations but the tokenizer has no chat template; set tokenizer.chat_template or give plain text"
        )
    prompts, fulls = [], []
    for row in rows:
        for completion in row.completions:
            prompt, full = _render(row, completion, tokenizer)
            prompts.append(prompt)
            fulls.append(full)
    # Text that went through a template already carries its special tokens.
    prompt_ids = _encode(prompts, tokenizer, special=not chat)
    full_ids = _encode(fulls, tokenizer, special=not chat)
    examples = []
    position = 0
    for row in rows:
        sequences = []
        empty = False
        for completion in row.completions:
            ids, before = full_ids[position], prompt_ids[position]
            position += 1
            start = common_prefix(before, ids)
            if start < len(before):
                counts["boundary_merged"] += 1
            if _is_empty(completion):
                ids, start = before, len(before)
            else:
                ids = _stopped(ids, start, stop_ids)
            empty |= _is_empty(completion)
            sequences.append(Tokens(ids.astype(np.int64), start))
        if max_length is not None and max(len(s.ids) for s in sequences) > max_length:
            longest = max(len(s.ids) for s in sequences)
            if truncation == "reject":
                raise ValueError(
                    f"{row.id}: {longest} tokens exceed max_length {max_length}; raise max_length or choose truncation "
                    "'drop', 'keep_start' or 'keep_end'"
                )
            if truncation == "drop":
                counts["dropped_long"] += 1
                continue
            counts["truncated"] += 1
            cut = longest - max_length if truncation == "keep_end" else 0
            sequences = [Tokens(s.ids[cut : cut + max_length], max(0, s.start - cut)) for s in sequences]
        empty |= any(s.scored == 0 for s in sequences)
        if empty:
            counts["empty"] += 1
            if on_empty == "error":
                which = [
                    ("chosen", "rejected")[i] if len(sequences) == 2 else "completion" for i, s in enumerate(sequences) if s.scored == 0
                ]
                raise ValueError(
                    f"{row.id}: field '{(which or ['completion'])[0]}' is an empty completion (no token to score"
                    f"{' within max_length' if counts['truncated'] else ''}); mend the row or choose on_empty 'drop' or 'zero'"
                )
            if on_empty == "drop":
                counts["dropped_empty"] += 1
                continue
        if vocab_size is not None:
            for s in sequences:
                if s.ids.size and int(s.ids.max()) >= vocab_size:
                    raise ValueError(
                        f"{row.id}: token id {int(s.ids.max())} is out of range for vocab_size {vocab_size}; is the tokenizer this model's?"
                    )
        if len(sequences) == 2 and np.array_equal(sequences[0].ids, sequences[1].ids):
            counts["identical"] += 1
        examples.append(Example(row.id, tuple(sequences), row.desirable))
    counts["kept"] = len(examples)
    if counts["boundary_merged"]:
        warnings.warn(
            f"{counts['boundary_merged']} of {position} prompts are no token prefix of prompt + completion (a merge across the boundary); "
            "their completions start at the end of the common tokens",
            stacklevel=2,
        )
    if counts["identical"]:
        warnings.warn(
            f"{counts['identical']} pairs have equal chosen and rejected tokens: they give no gradient to margin losses", stacklevel=2
        )
    if not examples:
        raise ValueError(
            f"no rows left of {len(rows)}: {counts['dropped_long']} exceed max_length {max_length}, "
            f"{counts['dropped_empty']} have an empty completion"
        )
    return Tokenized(examples, counts)


def _is_empty(completion: Text) -> bool:
    return not completion.strip() if isinstance(completion, str) else not any(message["content"].strip() for message in completion)


def _render(row: Row, completion: Text, tokenizer: Any) -> tuple[str, str]:
    if isinstance(completion, str):
        return str(row.prompt), str(row.prompt) + completion
    prompt: list[Any] = list(row.prompt)
    open_turn = bool(prompt) and prompt[-1]["role"] == "assistant"
    rendered = ""
    try:
        if prompt:
            how: dict[str, Any] = {"continue_final_message": True} if open_turn else {"add_generation_prompt": True}
            rendered = tokenizer.apply_chat_template(prompt, tokenize=False, **how)
        if not completion:
            return rendered, rendered
        return rendered, tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    except Exception as error:  # templates raise whatever their author chose
        raise ValueError(f"{row.id}: the chat template refuses these messages: {error}") from error


def _encode(texts: list[str], tokenizer: Any, special: bool) -> list[np.ndarray]:
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in encoded]


def _stopped(ids: np.ndarray, start: int, stop_ids: Sequence[int]) -> np.ndarray:
    """Make the completion end with its end-of-turn token: cut the (at most four) tokens a template writes after it, or append one."""
    for last in range(len(ids) - 1, max(start - 1, len(ids) - 5, -1), -1):
        if int(ids[last]) in stop_ids:
            return ids[: last + 1]
    return np.append(ids, stop_ids[0])


def tokenizer_hash(tokenizer: Any) -> str:
    """Sixteen hex digits of everything that decides a tokenisation: vocabulary, merges, special tokens, chat template."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)).encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    return digest.hexdigest()[:16]


def examples_hash(examples: Sequence[Example]) -> str:
    """Sixteen hex digits of the token ids and completion starts, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for s in example.sequences:
            digest.update(np.array([len(s.ids), s.start], dtype=np.int64).tobytes() + s.ids.astype(np.int64).tobytes())
    return digest.hexdigest()[:16]
