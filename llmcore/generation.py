"""Text generation on a local model: batched, prompts computed once, every draw reproducible.

    complete(model, prompts)                  one completion a prompt, continuous refill, the tokens all prompts open with computed once
    sample_from_embeddings(model, prefixes)   N samples a prefix (token ids or embeddings), prefill shared by its samples
    stream(model, prompt)                     pieces of text as they come

A token depends on (sampling.seed, query id, sample, step) and the model's logits only: batch size, order and company of a prompt change
nothing
beyond rounding of the model itself. Decoding is described in `llmcore.decoding`, drawing in `llmcore.sampling`.

Cost: prompt tokens once each (the common prefix once in all), and one model row a step for each *distinct* running sample.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from llmcore.decoding import Batch, Counters, Decoder, Prefix, Row, StopRule, decoder_for
from llmcore.phrases import PhraseMatcher, decode, phrase_rule
from llmcore.sampling import Sampling, draw, kept_distribution, philox4x32, uniforms

__all__ = [
    "Completion",
    "Completions",
    "Counters",
    "SampleSet",
    "Sampling",
    "complete",
    "draw",
    "kept_distribution",
    "philox4x32",
    "sample_from_embeddings",
    "stream",
    "uniforms",
]

Prompt = str | Sequence[dict[str, str]] | Sequence[int]
Progress = Callable[[int, int, Counters], None]
_MIN_SHARED = 4  # a common opening shorter than this is not worth a cache of its own


@dataclass(frozen=True)
class Completion:
    """One completion: its text, its token ids (no end-of-sequence id), why it ended ("eos", "stop" or "length") and its prompt's length
    in tokens.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int


@dataclass
class Completions(Sequence[Completion]):
    """Completions in the order of the prompts, and what they cost."""

    items: list[Completion]
    counters: Counters
    path: str
    seconds: float

    @overload
    def __getitem__(self, index: int) -> Completion: ...
    @overload
    def __getitem__(self, index: slice) -> list[Completion]: ...
    def __getitem__(self, index):
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def texts(self) -> list[str]:
        return [item.text for item in self.items]


@dataclass
class SampleSet:
    """N samples of one prefix: token ids, why each ended ("eos", "match", "length", "stop") and, with a tokenizer at hand, texts."""

    token_ids: list[list[int]]
    finish_reasons: list[str]
    counters: Counters = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)

    @property
    def texts(self) -> list[str]:
        if self.tokenizer is None:
            raise ValueError("model must come with a tokenizer for texts; pass a LanguageModel instead of a bare transformers model")
        return [decode(self.tokenizer, ids) for ids in self.token_ids]


def prompt_ids(model: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text as the tokenizer encodes it, messages under the chat template with the answer's opening, or ids as
    they are.
    """
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif len(prompt) and isinstance(prompt[0], dict):
        ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = list(prompt)  # type: ignore[arg-type]
    if not ids:
        raise ValueError("prompts must not be empty: a completion needs at least one token to start from")
    return [int(i) for i in ids]


def memory_limit(device: torch.device, budget: int | None) -> int:
    """Bytes that live rows may take: the budget, or 60 % of the GPU's free memory, or a quarter of the machine's."""
    if budget is not None:
        if budget <= 0:
            raise ValueError(f"memory_budget must be a positive number of bytes, got {budget}")
        return budget
    if device.type == "cuda":
        return int(0.6 * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def run_rows(
    decoder: Decoder,
    rows: Sequence[Row],
    *,
    max_rows: int,
    memory_budget: int | None = None,
    on_done: Callable[[Row], None] | None = None,
    counters: Counters | None = None,
) -> Counters:
    """Decode rows to their ends with continuous refill: finished rows make room for waiting ones, in groups of a quarter of the batch
    at least.
    """
    limit = memory_limit(decoder.device, memory_budget)
    batch = Batch(decoder, counters=counters or Counters())
    waiting, open_rows = list(rows), []
    while waiting or open_rows:
        live = batch.active
        room = max_rows - len(live)
        taken: list[Row] = []
        if waiting and (not live or room >= max(1, max_rows // 4)):
            used = batch.kv_bytes()
            while waiting and len(taken) < room:
                used += batch.row_bytes(waiting[0].length, waiting[0].num_samples, waiting[0].sampling.max_new_tokens)
                if (live or taken) and used > limit:
                    break
                taken.append(waiting.pop(0))
        if taken:
            batch.admit(taken)
            open_rows += taken
        else:
            batch.step()
        for row in [row for row in open_rows if row.done]:
            open_rows.remove(row)
            for name in ("prefilled_tokens", "reused_tokens"):
                setattr(batch.counters, name, getattr(batch.counters, name) + getattr(row.counters, name))
            if on_done:
                on_done(row)
    return batch.counters


def _shared(decoder: Decoder, prompts: list[list[int]], counters: Counters) -> Prefix | None:
    """The cache of the tokens with which all prompts open; at least one token of each prompt stays behind it."""
    if len(prompts) < 2:
        return None
    low, high = min(prompts), max(prompts)
    common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    common = min(common, min(len(ids) for ids in prompts) - 1)
    return decoder.prefix(low[:common], counters) if common >= _MIN_SHARED else None


def _later(decoder: Decoder, ids: list[int]) -> Callable[[], torch.Tensor]:
    return lambda: decoder.embed(ids)


def complete(
    model: Any,
    prompts: Sequence[Prompt],
    sampling: Sampling | None = None,
    *,
    ids: Sequence[int] | None = None,
    max_rows: int = 64,
    memory_budget: int | None = None,
    on_progress: Progress | None = None,
) -> Completions:
    """One completion of each prompt.

    Args:
        model: a LanguageModel (llmcore.load_model).
        prompts: texts (encoded as they are), message lists (rendered with the chat template) or lists of token ids.
        sampling: how to draw; default Sampling().
        ids: a number for each prompt that selects its random numbers (default 0, 1, …): equal id, prompt and seed give the equal
        completion.
        max_rows: prompts decoded at once. memory_budget: bytes of keys, values and logits; smaller means fewer rows at once, never a
        failure.
        on_progress: called with (completions done, total, counters).

    Returns: Completions, in order.

    Example:
        >>> model = llmcore.load_model("smollm2")
        >>> complete(model, [[{"role": "user", "content": "Say hi."}]], Sampling(temperature=0, max_new_tokens=8))[0].text
    """
    sampling = sampling or Sampling()
    if isinstance(prompts, str):
        raise TypeError("prompts must be a sequence of prompts, got one str; wrap it in a list")
    if not hasattr(model, "tokenizer"):
        raise TypeError(f"model must be a LanguageModel (llmcore.load_model), got {type(model).__name__}")
    if max_rows < 1:
        raise ValueError(f"max_rows must be >= 1, got {max_rows}")
    begin = time.perf_counter()
    encoded = [prompt_ids(model, prompt) for prompt in prompts]
    streams = list(range(len(encoded))) if ids is None else [int(i) for i in ids]
    if len(streams) != len(encoded):
        raise ValueError(f"ids must name every prompt: expected {len(encoded)}, got {len(streams)}")
    decoder = decoder_for(model)
    counters = Counters()
    prefix = _shared(decoder, encoded, counters)
    skip = prefix.length if prefix else 0
    cut = PhraseMatcher(sampling.stop) if sampling.stop else None
    rule: StopRule | None = phrase_rule(cut, model.tokenizer) if cut else None
    rows = [
        Row(_later(decoder, tokens[skip:]), len(tokens) - skip, prefix=prefix, sampling=sampling, stream=(stream, 0), stop_rule=rule)
        for tokens, stream in zip(encoded, streams, strict=True)
    ]
    done = 0

    def report(_: Row) -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, len(rows), counters)

    run_rows(
        decoder, sorted(rows, key=lambda row: row.length), max_rows=max_rows, memory_budget=memory_budget, on_done=report, counters=counters
    )
    items = []
    for row, tokens in zip(rows, encoded, strict=True):
        text, reason = decode(model.tokenizer, row.tokens[0]), row.finish[0] or "length"
        if cut and reason == "match":
            text, reason = text[: cut.first(text)], "stop"
        items.append(Completion(text, row.tokens[0], reason, len(tokens)))
    return Completions(items, counters, decoder.path, time.perf_counter() - begin)


def sample_from_embeddings(
    model: Any,
    prefixes: Sequence[torch.Tensor | Sequence[int]],
    num_samples: int,
    *,
    sampling: Sampling | None = None,
    stop_when: StopRule | Callable[[str], bool] | PhraseMatcher | None = None,
    ids: Sequence[int] | None = None,
    opening: Sequence[int] = (),
    share_samples: bool = True,
    max_rows: int = 32,
    memory_budget: int | None = None,
    on_progress: Progress | None = None,
) -> list[SampleSet]:
    """`num_samples` samples behind each prefix; a prefix is computed once and its cache is never copied.

    Args:
        model: a LanguageModel or a transformers model (then without texts and without stop strings).
        prefixes: each a (length, hidden_size) tensor of embeddings or a sequence of token ids.
        num_samples: N, 1 … 65535.
        stop_when: ends a sample with reason "match": a PhraseMatcher, a stop rule over token ids, or a function of the finished text.
        ids: a number for each prefix that selects its random numbers (default 0, 1, …).
        opening: token ids in front of every prefix, cached across calls.
        share_samples: run equal beginnings of samples as one row; the samples are the same either way.

    Returns: one SampleSet a prefix.

    Memory: keys and values of (length + N · max_new_tokens) tokens a row, as many rows at once as memory_budget allows (at least one).
    """
    sampling = sampling or Sampling()
    decoder = decoder_for(model)
    tokenizer = getattr(model, "tokenizer", None)
    rule: Any = stop_when
    if isinstance(stop_when, PhraseMatcher) or (stop_when is not None and not hasattr(stop_when, "advance")):
        if tokenizer is None:
            raise ValueError("stop_when over text needs a tokenizer; pass a LanguageModel instead of a bare transformers model")
        rule = phrase_rule(stop_when, tokenizer)  # type: ignore[arg-type]
    elif sampling.stop:
        if tokenizer is None:
            raise ValueError("sampling.stop needs a tokenizer; pass a LanguageModel instead of a bare transformers model")
        rule = phrase_rule(PhraseMatcher(sampling.stop), tokenizer)
    streams = list(range(len(prefixes))) if ids is None else [int(i) for i in ids]
    if len(streams) != len(prefixes):
        raise ValueError(f"ids must name every prefix: expected {len(prefixes)}, got {len(streams)}")
    counters = Counters()
    shared = decoder.prefix(opening, counters)
    rows = []
    width = decoder.embedding.weight.shape[1]
    for where, (prefix, stream) in enumerate(zip(prefixes, streams, strict=True)):
        if isinstance(prefix, torch.Tensor) and prefix.is_floating_point():
            if prefix.ndim != 2 or prefix.shape[1] != width:
                raise ValueError(f"prefixes[{where}] must be (length, hidden_size) = (·, {width}), got {tuple(prefix.shape)}")
            embeddings: Any = prefix.to(decoder.device, decoder.embedding.weight.dtype)
            length = len(prefix)
        else:
            tokens = [int(i) for i in prefix]
            embeddings, length = _later(decoder, tokens), len(tokens)
        rows.append(
            Row(
                embeddings,
                length,
                prefix=shared,
                num_samples=num_samples,
                sampling=sampling,
                stream=(stream, 0),
                stop_rule=rule,
                share=share_samples,
            )
        )
    done = 0

    def report(_: Row) -> None:
        nonlocal done
        done += 1
        if on_progress:
            on_progress(done, len(rows), counters)

    run_rows(decoder, rows, max_rows=max_rows, memory_budget=memory_budget, on_done=report, counters=counters)
    return [SampleSet(row.tokens, [reason or "length" for reason in row.finish], row.counters, tokenizer) for row in rows]


def pieces(tokenizer: Any, steps: Iterator[list[int]], stop: Sequence[str] = ()) -> Iterator[str]:
    """New text after each step, from the tokens so far: never half a character, never the beginning of a stop string."""
    sent, text = 0, ""
    for tokens in steps:
        text = decode(tokenizer, tokens)
        end = len(text.rstrip("\ufffd"))
        for phrase in stop:
            at = text.find(phrase)
            if at >= 0:
                if at > sent:
                    yield text[sent:at]
                return
            end = min(
                end, next((len(text) - size for size in range(min(len(phrase) - 1, len(text)), 0, -1) if text.endswith(phrase[:size])), end)
            )
        if end > sent:
            yield text[sent:end]
            sent = end
    if len(text) > sent:
        yield text[sent:]


def stream(model: Any, prompt: Prompt, sampling: Sampling | None = None, *, stream_id: int = 0) -> Iterator[str]:
    """Pieces of one completion as they are drawn; joined they are `complete`'s text."""
    sampling = sampling or Sampling()
    decoder = decoder_for(model)
    tokens = prompt_ids(model, prompt)
    rule = phrase_rule(PhraseMatcher(sampling.stop), model.tokenizer) if sampling.stop else None
    row = Row(_later(decoder, tokens), len(tokens), sampling=sampling, stream=(stream_id, 0), stop_rule=rule)
    batch = Batch(decoder)

    def steps() -> Iterator[list[int]]:
        batch.admit([row])
        yield row.tokens[0]
        while not row.done:
            batch.step()
            yield row.tokens[0]

    yield from pieces(model.tokenizer, steps(), sampling.stop)
