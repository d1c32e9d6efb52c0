"""Split a chat prompt at the text that is perturbed: prefix ids, the user's ids, suffix ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Messages = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Assembled:
    """Token ids of a prompt in three pieces; `span` = (a, a + n) are the query's positions, `mask` tells which of its tokens are
    the user's.

    With span="last_user" the mask is all true; with "all_user" the query runs from the first user's text to the last one and the mask
    leaves out what lies between.
    """

    prefix_ids: tuple[int, ...]
    query_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    span: tuple[int, int]
    mask: tuple[bool, ...]

    @property
    def input_ids(self) -> tuple[int, ...]:
        return self.prefix_ids + self.query_ids + self.suffix_ids


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise ValueError(f"messages must carry text (a string, or parts of type 'text'), got {type(content).__name__}")


def as_messages(query: Messages) -> list[dict[str, str]]:
    """Messages of a query: a string is one user message."""
    if isinstance(query, str):
        return [{"role": "user", "content": query}]
    if not isinstance(query, Sequence) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in query):
        raise ValueError("messages must be a string or a list of {'role': …, 'content': …}")
    return [{**message, "content": _text(message["content"])} for message in query]


def _opening(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence id that the tokenizer itself puts in front, if any."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and full[:1] == [bos] and plain[:1] != [bos] else []


def assemble(
    tokenizer: Any, messages: Messages, *, span: str = "last_user", parse_user_specials: bool = False, slot: str | None = None
) -> Assembled:
    """Render the chat template with slots where the user's text goes, split there, and tokenise the pieces separately.

    Special tokens are parsed in what the template wrote; in the user's text they are plain text unless parse_user_specials. The tokenizer's
    own beginning-of-sequence token comes first iff the tokenizer adds one and the template has not written it.

    Args:
        messages: a string (one user message) or a list of role/content messages. span: "last_user" or "all_user".
        slot: the placeholder; default is one that no message contains.

    Raises: ValueError: no user message, an empty user text, no chat template, a template that drops or repeats the slot.
    """
    if span not in ("last_user", "all_user"):
        raise ValueError(f"span must be 'last_user' or 'all_user', got {span!r}")
    turns = as_messages(messages)
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        raise ValueError("messages must contain a message with role 'user': nothing to perturb")
    chosen = users if span == "all_user" else users[-1:]
    for i in chosen:
        if not turns[i]["content"]:
            raise ValueError("messages must not have an empty user text: nothing to perturb")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "tokenizer must have a chat template; set tokenizer.chat_template (the method needs to know what frames the user's text)"
        )
    everything = "\0".join(turn["content"] for turn in turns)
    if slot is None:
        slot = "Slot" + hashlib.blake2b(everything.encode(errors="surrogatepass"), digest_size=12).hexdigest()
    if slot in everything:
        raise ValueError(f"slot must be a string that no message contains, got {slot!r}")
    names = [f"{slot}n{k}e" for k in range(len(chosen))]
    marked = [dict(turn) for turn in turns]
    for name, i in zip(names, chosen, strict=True):
        marked[i]["content"] = name
    rendered = tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
    pieces, rest = [], rendered
    for name in names:
        if rendered.count(name) != 1:
            raise ValueError(f"the chat template must write the user's text exactly once, it wrote it {rendered.count(name)} times")
        before, _, rest = rest.partition(name)
        pieces.append(before)

    def framed(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False) if text else []

    def spoken(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not parse_user_specials)

    prefix = framed(pieces[0])
    bos = _opening(tokenizer)
    if bos and prefix[:1] != bos:
        prefix = bos + prefix
    query: list[int] = []
    mask: list[bool] = []
    for k, i in enumerate(chosen):
        between = framed(pieces[k]) if k else []
        user = spoken(turns[i]["content"])
        query += between + user
        mask += [False] * len(between) + [True] * len(user)
    if not any(mask):
        raise ValueError("messages must not have an empty user text: nothing to perturb")
    suffix = framed(rest)
    return Assembled(tuple(prefix), tuple(query), tuple(suffix), (len(prefix), len(prefix) + len(query)), tuple(mask))
