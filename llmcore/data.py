"""Rows in, token batches out: preference pairs, unpaired feedback and instructions.

    read_rows   JSONL (also .gz), Parquet, Hugging Face datasets  ->  Row      every bad input is an error that names file, line and field
    tokenize    Row  ->  Example            prefix-safe, the model's real stop id, truncation and empty completions by stated policy
    collate     sequences  ->  Batch        padded, packed or prefix-shared; masks from lengths, never from token ids
    Batches     Example  ->  Batch per optimiser step, a pure function of (seed, step): resuming needs no data state

Column names and the conversational format are TRL's. A preference row has `chosen`, `rejected` and optionally `prompt`; without one the
prompt is what both sides share: whole messages, or for text the common characters (up to the last "\n\nAssistant:" in a dialogue of that
format).

A token is scored when its completion mask is 1 and it has a predecessor in its own sequence; n of a sequence is the number of its scored
tokens, everywhere.
"""
# S sequences, P pairs, N scored rows, B rows of a trunk input, T tokens of its longest row

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

COLUMNS = {
    "preference": "chosen, rejected and optionally prompt",
    "unpaired": "prompt, completion and label (true = desirable)",
    "instruction": "messages, or prompt and completion, or instruction (with input) and output, or text",
}
TRUNCATION = ("reject", "keep_start", "keep_end", "drop")
ON_EMPTY = ("error", "zero", "drop")
LAYOUTS = ("padded", "packed", "shared")
ASSISTANT = "\n\nAssistant:"

Text = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example before tokenisation: `completions` is (chosen, rejected) or (completion,); id is "file:line"."""

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    desirable: bool | None = None


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


# ---- reading


def read_rows(
    source: str | Path | Iterable[Mapping[str, Any]], kind: str = "preference", *, split: str = "train", limit: int | None = None
) -> list[Row]:
    """Read and check all rows of a source before any of them is used.

    Args:
        source: a .jsonl / .json / .parquet file (.gz too), a directory saved by `datasets`, a Hugging Face dataset's name, a Dataset, or
            dictionaries.
        kind: "preference", "unpaired" or "instruction"; see COLUMNS.
        split: split of a Hugging Face dataset.
        limit: stop after this many rows.

    Returns:
        Rows in the order of the source.

    Raises:
        FileNotFoundError, ValueError: what is wrong, with file, line and field.

    Example:
        rows = read_rows([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}])
    """
    if kind not in COLUMNS:
        raise ValueError(f"kind must be one of {tuple(COLUMNS)}, got {kind!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    rows = []
    for where, record in _records(source, split):
        rows.append(_row(where, record, kind))
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise ValueError(f"source {source if isinstance(source, (str, Path)) else type(source).__name__} holds no rows")
    return rows


def _records(source: Any, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(source, (str, Path)):
        name = getattr(source, "builder_name", None) or "rows"
        yield from ((f"{name}:{i + 1}", record) for i, record in enumerate(source))
        return
    path = Path(source)
    suffixes = [s for s in path.suffixes if s != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    if path.is_file():
        if suffix in (".jsonl", ".json", ".ndjson"):
            yield from _json_lines(path)
        elif suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            try:
                table = pyarrow.parquet.ParquetFile(path)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{path}: not a Parquet file ({error})") from None
            line = 0
            for batch in table.iter_batches():
                for record in batch.to_pylist():
                    line += 1
                    yield f"{path}:{line}", record
        else:
            raise ValueError(f"{path}: unknown file type {suffix!r}; expected .jsonl, .json or .parquet (also .gz)")
        return
    if path.is_dir():
        import datasets

        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path}: no split {split!r}; it holds {sorted(loaded)}")
            loaded = loaded[split]
        yield from ((f"{path}:{i + 1}", record) for i, record in enumerate(loaded))
        return
    if suffix or path.is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        raise FileNotFoundError(f"data file {path} does not exist")
    import datasets

    loaded = datasets.load_dataset(str(source), split=split)
    yield from ((f"{source}[{split}]:{i + 1}", record) for i, record in enumerate(loaded))


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    line = 0
    with opener(path, "rb") as file:
        try:
            if path.suffixes[-1:] == [".json"] or path.suffixes[-2:] == [".json", ".gz"]:
                text = file.read()
                if text.lstrip()[:1] == b"[":  # one array instead of a row on each line
                    records = json.loads(text.decode("utf-8"))
                    yield from ((f"{path}:item {i + 1}", record) for i, record in enumerate(records))
                    return
                lines: Iterable[bytes] = text.splitlines()
            else:
                lines = file
            for raw in lines:
                line += 1
                if raw.strip():
                    yield f"{path}:{line}", json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{line}: not UTF-8 at byte {error.start} of the line; convert the file to UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line}: broken JSON at column {error.colno}: {error.msg}") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip data after line {line} ({error})") from None


def _row(where: str, record: Any, kind: str) -> Row:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with {COLUMNS[kind]}, got {type(record).__name__}")
    record = {key: value for key, value in record.items() if value is not None}

    def need(*fields: str) -> None:
        missing = [f for f in fields if f not in record]
        if missing:
            hint = ""
            if kind == "preference" and {"completion", "label"} <= set(record):
                hint = "; these are unpaired rows: use an unpaired loss (kto)"
            elif kind == "unpaired" and {"chosen", "rejected"} <= set(record):
                hint = "; these are preference rows: use a pair loss (dpo, ipo_sum, …)"
            raise ValueError(
                f"{where}: field '{missing[0]}' is missing; expected {COLUMNS[kind]}, got columns {sorted(map(str, record))}{hint}"
            )

    def text(name: str) -> Text:
        return _text(where, name, record[name])

    if kind == "preference":
        need("chosen", "rejected")
        chosen, rejected = text("chosen"), text("rejected")
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise ValueError(f"{where}: field 'rejected' must have the form of 'chosen' (both text or both messages)")
        if "prompt" in record:
            prompt = text("prompt")
            if isinstance(prompt, str) != isinstance(chosen, str):
                raise ValueError(f"{where}: field 'prompt' must have the form of 'chosen' (both text or both messages)")
            return Row(where, prompt, (chosen, rejected))
        cut = _common(chosen, rejected)
        return Row(where, chosen[:cut], (chosen[cut:], rejected[cut:]))
    if kind == "unpaired":
        need("prompt", "completion", "label")
        label = record["label"]
        if not isinstance(label, (bool, int, np.bool_)) or label not in (0, 1):
            raise ValueError(f"{where}: field 'label' must be true or false (or 1 or 0), got {label!r}")
        prompt, completion = text("prompt"), text("completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError(f"{where}: field 'completion' must have the form of 'prompt' (both text or both messages)")
        return Row(where, prompt, (completion,), bool(label))
    if "messages" in record:
        messages = text("messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: field 'messages' must be a list of messages that ends with the assistant's, got {_show(messages)}")
        return Row(where, messages[:-1], (messages[-1:],))
    if "instruction" in record:
        need("output")
        prompt = text("instruction")
        extra = record.get("input") or ""
        return Row(where, f"{prompt}\n\n{extra}\n\n" if extra else f"{prompt}\n\n", (text("output"),))
    if "text" in record and "prompt" not in record:
        return Row(where, "", (text("text"),))
    need("prompt", "completion")
    prompt, completion = text("prompt"), text("completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError(f"{where}: field 'completion' must have the form of 'prompt' (both text or both messages)")
    return Row(where, prompt, (completion,))


def _text(where: str, name: str, value: Any) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, np.ndarray)):
        messages = list(value)
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError(f"{where}: field '{name}[{i}]' must be a message with text 'role' and 'content', got {_show(message)}")
        if messages or name != "messages":
            return [dict(message) for message in messages]
    raise ValueError(f"{where}: field '{name}' must be text or a list of messages, got {_show(value)}")


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '…'}"


def _common(chosen: Text, rejected: Text) -> int:
    """Length of the implicit prompt, in characters or messages."""
    if isinstance(chosen, str) and isinstance(rejected, str) and ASSISTANT in chosen and ASSISTANT in rejected:
        limit = _prefix(chosen, rejected)
        turn = chosen.rfind(ASSISTANT, 0, limit)
        if turn >= 0:
            return turn + len(ASSISTANT)
    cut = _prefix(chosen, rejected)
    # A space that ends the shared text belongs to the completions: tokenisers attach it to the word that follows.
    if isinstance(chosen, str) and 0 < cut < max(len(chosen), len(rejected)) and chosen[cut - 1] == " ":
        cut -= 1
    # Identical sides share everything; keeping the last message as the completion leaves something to score.
    if not isinstance(chosen, str) and cut == len(chosen) == len(rejected) and cut > 1:
        cut -= 1
    return cut


def _prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if isinstance(a, np.ndarray):
        differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
        return int(differs[0]) if differs.size else n
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


# ---- tokenising


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
            ids, prompt = full_ids[position], prompt_ids[position]
            position += 1
            start = _prefix(prompt, ids)
            if start < len(prompt):
                counts["boundary_merged"] += 1
            if _is_empty(completion):
                ids, start = prompt, len(prompt)
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
    prompt = list(row.prompt)
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


# ---- batches


class TrunkInput(NamedTuple):
    """One forward call of the model: keyword arguments, and the flat positions (into B·T) of the scored rows of its sequences, in
    sequence order.
    """

    inputs: dict[str, torch.Tensor]
    rows: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences ready for a model: trunk calls, and for the scored rows (N,) their labels and the bounds of each sequence.

    `labels[k]` is the token that row k predicts; sequence s owns rows cu_seqlens[s] … cu_seqlens[s+1]. `pair_index` (P, 2) holds (chosen,
    rejected) sequence numbers; `desirable` (S,) is set for unpaired batches; `ref_logp` (S,) float32 when the reference is already scored.
    """

    calls: tuple[TrunkInput, ...]
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    pair_index: torch.Tensor | None
    ids: tuple[str, ...]
    index: tuple[int, ...] = ()
    desirable: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    sequences: tuple[Tokens, ...] = field(default=(), repr=False)
    layout: str = "padded"
    isolate: bool = False
    order: torch.Tensor | None = None  # rows of the calls -> rows of `labels`, when they differ

    @property
    def counts(self) -> torch.Tensor:
        """(S,) scored tokens of each sequence."""
        return self.cu_seqlens.diff().long()

    @property
    def num_items(self) -> int:
        """Pairs, or sequences of an unpaired batch: what a mean loss divides by."""
        return len(self.pair_index) if self.pair_index is not None else len(self.cu_seqlens) - 1

    @property
    def trunk_tokens(self) -> int:
        return sum(call.inputs["input_ids"].numel() for call in self.calls)

    def to(self, device: torch.device | str) -> Batch:
        def move(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        calls = tuple(
            TrunkInput({k: v.to(device, non_blocking=True) for k, v in c.inputs.items()}, c.rows.to(device, non_blocking=True))
            for c in self.calls
        )
        return replace(
            self,
            calls=calls,
            labels=self.labels.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
            pair_index=move(self.pair_index),
            order=move(self.order),
            desirable=move(self.desirable),
            ref_logp=move(self.ref_logp),
        )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], *, layout: str = "padded", isolate: bool = False) -> Batch:
        """From tensors: input_ids (B, T) with attention_mask, or (1, ΣT) with cu_seqlens; completion_mask of the same shape; pair_index
        (P, 2) or, for an even number of sequences without `desirable`, first half chosen and second half rejected; optional desirable,
        ref_logp, ids.
        """
        input_ids, mask = torch.as_tensor(fields["input_ids"]).cpu(), fields.get("completion_mask")
        if mask is None:
            raise ValueError("completion_mask is missing: it marks the completion tokens of input_ids, same shape")
        mask = torch.as_tensor(mask).cpu().bool()
        if mask.shape != input_ids.shape:
            raise ValueError(f"completion_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
        spans: list[tuple[torch.Tensor, torch.Tensor]] = []
        if fields.get("cu_seqlens") is not None:
            bounds = torch.as_tensor(fields["cu_seqlens"]).tolist()
            spans = [(input_ids.flatten()[a:b], mask.flatten()[a:b]) for a, b in itertools.pairwise(bounds)]
        else:
            attention = fields.get("attention_mask")
            keep = torch.ones_like(mask) if attention is None else torch.as_tensor(attention).cpu().bool()
            spans = [(input_ids[b][keep[b]], mask[b][keep[b]]) for b in range(len(input_ids))]
        scored = [m.numpy() for _, m in spans]
        sequences = [
            Tokens(ids.numpy().astype(np.int64), int(np.argmax(m)) if m.any() else len(m))
            for (ids, _), m in zip(spans, scored, strict=True)
        ]
        pair_index, desirable = fields.get("pair_index"), fields.get("desirable")
        if pair_index is None and desirable is None:
            half, odd = divmod(len(sequences), 2)
            if odd:
                raise ValueError(
                    f"pair_index is missing and {len(sequences)} sequences have no two halves; give pair_index (P, 2) or desirable (S,)"
                )
            pair_index = torch.stack([torch.arange(half), torch.arange(half) + half], dim=1)
        return collate(
            sequences,
            pair_index=pair_index,
            desirable=desirable,
            ref_logp=fields.get("ref_logp"),
            ids=fields.get("ids"),
            masks=scored,
            layout=layout,
            isolate=isolate,
        )


def collate(
    sequences: Sequence[Tokens],
    *,
    pair_index: Any = None,
    desirable: Any = None,
    ref_logp: Any = None,
    ids: Sequence[str] | None = None,
    index: Sequence[int] = (),
    masks: Sequence[np.ndarray] | None = None,
    layout: str = "padded",
    isolate: bool = False,
) -> Batch:
    """Build a Batch.

    Args:
        sequences: S token sequences. masks: optional per-token completion masks replacing "everything from start".
        pair_index: (P, 2) integer (chosen, rejected) sequence numbers, or None for unpaired data.
        layout: "padded" (right padding), "packed" (one row, positions restart, no padding) or "shared" (a pair's common tokens are
            computed once: prompt + 2 completions instead of 2 prompts + 2 completions; needs an attention that takes a block mask and no
            sliding window).
        isolate: one trunk call per sequence (per pair when shared), so that a score is bit for bit independent of its batch; best on CPU,
            where a batch of one is as fast, and what makes cached reference scores subtract to exactly 0.

    Raises:
        ValueError: pair_index out of range, wrong lengths, unknown layout. Warns when a sequence is in no pair.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    S = len(sequences)
    pairs = None
    if pair_index is not None:
        pairs = torch.as_tensor(pair_index).cpu().long().reshape(-1, 2)
        if pairs.numel() and (int(pairs.min()) < 0 or int(pairs.max()) >= S):
            raise ValueError(f"pair_index must lie in [0, {S}), got values from {int(pairs.min())} to {int(pairs.max())}")
        if len(set(pairs.flatten().tolist())) < S:
            warnings.warn(
                f"{S - len(set(pairs.flatten().tolist()))} of {S} sequences are in no pair and do not enter the loss", stacklevel=2
            )
    for name, value in (("desirable", desirable), ("ref_logp", ref_logp)):
        if value is not None and len(value) != S:
            raise ValueError(f"{name} must have one entry for each of the {S} sequences, got {len(value)}")
    places, labels, bounds = [], [], [0]
    for i, s in enumerate(sequences):
        if masks is None:
            scored = np.arange(max(s.start, 1), len(s.ids))
        else:
            scored = np.flatnonzero(masks[i])
            scored = scored[scored > 0]
        places.append(scored - 1)
        labels.append(s.ids[scored])
        bounds.append(bounds[-1] + len(scored))
    if layout == "shared" and pairs is not None and len(set(pairs.flatten().tolist())) == pairs.numel() == S:
        order = pairs.tolist()
        groups = [[pair] for pair in order] if isolate else [order]
        calls = [_shared(sequences, places, group) for group in groups]
        used = [s for pair in order for s in pair]
    else:
        # A sequence without a scored token needs no trunk; one call stays, so that the loss is connected to the model.
        used = [i for i in range(S) if len(places[i])] or [0][:S]
        units = [[i] for i in used] if isolate else [used]
        calls = [(_packed if layout == "packed" else _padded)(sequences, places, unit) for unit in units if unit]
    order = None
    if used != sorted(used):  # rows leave the trunk in the order of the calls, labels lie in the order of the sequences
        sizes = [len(places[i]) for i in used]
        starts = dict(zip(used, np.cumsum([0, *sizes]).tolist(), strict=False))
        order = torch.cat([torch.arange(starts[i], starts[i] + len(places[i])) for i in sorted(used)])
    return Batch(
        tuple(calls),
        torch.from_numpy(np.concatenate(labels) if labels else np.zeros(0, np.int64)),
        torch.tensor(bounds, dtype=torch.int32),
        pairs,
        tuple(ids) if ids is not None else tuple(str(i) for i in range(S if pairs is None else len(pairs))),
        tuple(index),
        None if desirable is None else torch.as_tensor(desirable).bool(),
        None if ref_logp is None else torch.as_tensor(ref_logp, dtype=torch.float32),
        tuple(sequences),
        layout,
        isolate,
        order,
    )


def _padded(sequences: Sequence[Tokens], places: Sequence[np.ndarray], unit: Sequence[int]) -> TrunkInput:
    T = max(1, *(len(sequences[i].ids) for i in unit))
    input_ids, mask = torch.zeros(len(unit), T, dtype=torch.long), torch.zeros(len(unit), T, dtype=torch.long)
    for b, i in enumerate(unit):
        n = len(sequences[i].ids)
        input_ids[b, :n] = torch.from_numpy(sequences[i].ids)
        mask[b, : max(n, 1)] = 1
    rows = torch.from_numpy(np.concatenate([places[i] + b * T for b, i in enumerate(unit)]))
    inputs = {"input_ids": input_ids} if bool(mask.all()) else {"input_ids": input_ids, "attention_mask": mask}
    return TrunkInput(inputs, rows)


def _packed(sequences: Sequence[Tokens], places: Sequence[np.ndarray], unit: Sequence[int]) -> TrunkInput:
    lengths = [len(sequences[i].ids) for i in unit]
    starts = np.cumsum([0, *lengths])
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate([sequences[i].ids for i in unit]))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
    }
    return TrunkInput(inputs, torch.from_numpy(np.concatenate([places[i] + a for a, i in zip(starts, unit, strict=False)])))


def _shared(sequences: Sequence[Tokens], places: Sequence[np.ndarray], pairs: Sequence[Sequence[int]]) -> TrunkInput:
    """One row per pair: chosen whole, then what of rejected follows their common tokens; a mask hides the chosen tail from the rejected
    one.
    """
    common = [_prefix(sequences[w].ids, sequences[l].ids) for w, l in pairs]
    lengths = [len(sequences[w].ids) + len(sequences[l].ids) - k for (w, l), k in zip(pairs, common, strict=True)]
    T = max(1, *lengths)
    input_ids, position_ids = torch.zeros(len(pairs), T, dtype=torch.long), torch.zeros(len(pairs), T, dtype=torch.long)
    mask = torch.zeros(len(pairs), 1, T, T, dtype=torch.bool)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    rows = []
    for b, ((w, l), k, length) in enumerate(zip(pairs, common, lengths, strict=True)):
        a = len(sequences[w].ids)
        input_ids[b, :a] = torch.from_numpy(sequences[w].ids)
        input_ids[b, a:length] = torch.from_numpy(sequences[l].ids[k:])
        position_ids[b, :a] = torch.arange(a)
        position_ids[b, a:length] = torch.arange(k, len(sequences[l].ids))
        mask[b, 0] = causal
        mask[b, 0, a:length, k:a] = False
        # Token t of rejected stands at t while shared, behind chosen afterwards.
        rows += [places[w] + b * T, np.where(places[l] < k, places[l], places[l] - k + a) + b * T]
    return TrunkInput(
        {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}, torch.from_numpy(np.concatenate(rows))
    )


class Batches:
    """Micro-batches of each optimiser step: `batches[step]` depends on (seed, step) alone, so that a resumed run sees what the
    interrupted one would have.

    Every epoch is one permutation; the last, smaller step of an epoch is kept. The micro-batches of a step are what data-parallel ranks
    divide.

    Args:
        examples: from tokenize. batch_size: examples per optimiser step, over all ranks. micro_batch_size: examples per forward and
            backward.
        num_steps: optimiser steps, or None for `epochs` passes. shuffle: False keeps the order of the data.
        ref_logp: (len(examples), sequences per example) cached reference scores.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int = 8,
        micro_batch_size: int = 2,
        num_steps: int | None = None,
        epochs: float = 1.0,
        seed: int = 0,
        shuffle: bool = True,
        layout: str = "padded",
        isolate: bool = False,
        ref_logp: torch.Tensor | None = None,
    ) -> None:
        if not examples:
            raise ValueError("examples must not be empty")
        for name, value in (("batch_size", batch_size), ("micro_batch_size", micro_batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        width = len(examples[0].sequences)
        if ref_logp is not None and tuple(ref_logp.shape) != (len(examples), width):
            raise ValueError(f"ref_logp must be ({len(examples)}, {width}), one score per sequence, got {tuple(ref_logp.shape)}")
        self.examples, self.batch_size, self.micro_batch_size = list(examples), min(batch_size, len(examples)), micro_batch_size
        self.seed, self.shuffle, self.layout, self.isolate, self.ref_logp = seed, shuffle, layout, isolate, ref_logp
        self.steps_per_epoch = -(-len(self.examples) // self.batch_size)
        self.num_steps = num_steps if num_steps is not None else max(1, round(epochs * self.steps_per_epoch))

    def __len__(self) -> int:
        return self.num_steps

    def select(self, step: int) -> list[int]:
        """Indices of the examples of one step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples)) if self.shuffle else np.arange(len(self.examples))
        return order[place * self.batch_size : (place + 1) * self.batch_size].tolist()

    def __getitem__(self, step: int) -> list[Batch]:
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step must lie in [0, {self.num_steps}), got {step}")
        chosen = self.select(step)
        return [self.batch(chosen[i : i + self.micro_batch_size]) for i in range(0, len(chosen), self.micro_batch_size)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of these examples, in this order."""
        examples = [self.examples[i] for i in indices]
        return batch_of(
            examples,
            index=indices,
            layout=self.layout,
            isolate=self.isolate,
            ref_logp=None if self.ref_logp is None else self.ref_logp[list(indices)],
        )


def batch_of(
    examples: Sequence[Example],
    *,
    index: Sequence[int] = (),
    layout: str = "padded",
    isolate: bool = False,
    ref_logp: torch.Tensor | None = None,
) -> Batch:
    """Collate examples: sequences 2p and 2p + 1 are chosen and rejected of pair p; one sequence per example for unpaired and instruction
    rows.
    """
    width = len(examples[0].sequences)
    pairs = torch.arange(2 * len(examples)).reshape(-1, 2) if width == 2 else None
    desirable = None if width == 2 or examples[0].desirable is None else [bool(e.desirable) for e in examples]
    return collate(
        [s for e in examples for s in e.sequences],
        pair_index=pairs,
        desirable=desirable,
        ids=[e.id for e in examples],
        index=index,
        layout=layout,
        isolate=isolate,
        ref_logp=None if ref_logp is None else ref_logp.flatten(),
    )
