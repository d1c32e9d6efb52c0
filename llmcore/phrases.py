"""Find phrases in generated tokens without decoding text.

`PhraseMatcher` holds the phrases and two ways to ask: `matches(text)` searches a string; `automaton` is the same question as an
Aho–Corasick machine over UTF-8 bytes, one transition a byte, compiled (`llmcore._native`) or plain Python. `PhraseRule` walks the
automaton over
token ids: the bytes that each token adds to the decoded text come from a table of the tokenizer; special tokens add none. Because UTF-8 is
self-synchronising, a phrase occurs in the decoded text exactly when its bytes occur in the byte stream. Tokenizers whose decoder is
neither byte-level nor SentencePiece-like are served by decoding text (`TextRule`).
"""

from __future__ import annotations

import functools
import json
import unicodedata
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from llmcore.kernels import backends

_SPACE = " \t\r\n"
_QUOTES = {0x2018: "'", 0x2019: "'", 0x201B: "'", 0x02BC: "'", 0xFF07: "'", 0x00B4: "'", 0x201C: '"', 0x201D: '"'}


@functools.cache
def _fold_table(ignore_case: bool, quotes: bool, unicode: bool) -> dict[int, str]:
    """Code point -> replacement, character by character, so that folding commutes with cutting a text anywhere."""
    table: dict[int, str] = {}
    for code in [*range(0x3400), *range(0xFF00, 0xFFF0)]:
        char = chr(code)
        if unicode:
            char = unicodedata.normalize("NFKD", char)
        if quotes:
            char = "".join(_QUOTES.get(ord(c), c) for c in (_QUOTES.get(code, char)))
        if ignore_case:
            char = char.lower()
        if char != chr(code):
            table[code] = char
    return table


class PyAutomaton:
    """Aho–Corasick over bytes in plain Python; `llmcore._native.PhraseAutomaton` is the same machine compiled.

    States are integers; 0 is the start and `MATCH` (-1) absorbs. With `anchored`, a phrase counts only at the start of the text, blanks
    aside;
    `DEAD` (-2) then means that none can come.
    """

    MATCH, DEAD = -1, -2

    def __init__(self, patterns: Sequence[bytes], anchored: bool):
        goto: list[dict[int, int]] = [{}]
        final = [False]
        for pattern in patterns:
            state = 0
            for byte in pattern:
                if byte not in goto[state]:
                    goto.append({})
                    final.append(False)
                    goto[state][byte] = len(goto) - 1
                state = goto[state][byte]
            final[state] = True
        table = [[self.DEAD if anchored else 0] * 256 for _ in goto]
        queue, fail = [0], [0] * len(goto)
        for state in queue:  # breadth first: a state's failure state is complete before it
            if state and not anchored:
                table[state] = list(table[fail[state]])
            for byte, target in goto[state].items():
                fail[target] = table[fail[state]][byte] if state and not anchored else 0
                final[target] = final[target] or (not anchored and final[fail[target]])
                queue.append(target)
            for byte, target in goto[state].items():
                table[state][byte] = target
        if anchored:
            for blank in _SPACE.encode():
                table[0][blank] = table[0][blank] if blank in goto[0] else 0
        self._table = [[self.MATCH if target > 0 and final[target] else target for target in row] for row in table]
        self._tokens: list[bytes] = []

    def walk(self, state: int, data: bytes) -> int:
        """State after these bytes."""
        for byte in data:
            if state < 0:
                return state
            state = self._table[state][byte]
        return state

    def set_tokens(self, tokens: Sequence[bytes]) -> None:
        """Bytes of each token id, for `walk_token`."""
        self._tokens = list(tokens)

    def walk_token(self, state: int, token_id: int) -> int:
        """State after one token; ids beyond the table add nothing."""
        return self.walk(state, self._tokens[token_id]) if token_id < len(self._tokens) else state


class PhraseMatcher:
    """Which of these phrases occur in a text.

    Args:
        phrases: non-empty strings.
        ignore_case, normalise_quotes, normalise_unicode: fold case, curly quotes, compatibility and combining forms, in phrases and
        text alike.
        position: "anywhere", or "start" (after blanks).

    Example:
        >>> PhraseMatcher(["I cannot"]).matches("Well, I cannot say.")
        True
    """

    def __init__(
        self,
        phrases: Sequence[str],
        *,
        ignore_case: bool = False,
        normalise_quotes: bool = False,
        normalise_unicode: bool = False,
        position: str = "anywhere",
    ):
        if isinstance(phrases, str) or not phrases or not all(isinstance(p, str) and p for p in phrases):
            raise ValueError(f"phrases must be a non-empty sequence of non-empty strings, got {phrases!r}")
        if position not in ("anywhere", "start"):
            raise ValueError(f"position must be 'anywhere' or 'start', got {position!r}")
        self.phrases = tuple(phrases)
        self.options = {
            "ignore_case": ignore_case,
            "normalise_quotes": normalise_quotes,
            "normalise_unicode": normalise_unicode,
            "position": position,
        }
        self.folding = ignore_case or normalise_quotes or normalise_unicode
        self._table = _fold_table(ignore_case, normalise_quotes, normalise_unicode) if self.folding else {}
        self.anchored = position == "start"
        self._folded = tuple(dict.fromkeys(self.fold(p).lstrip(_SPACE) if self.anchored else self.fold(p) for p in phrases))
        if not all(self._folded):
            raise ValueError(f"phrases must not be blank, got {phrases!r}")

    def fold(self, text: str) -> str:
        """The text as it is compared."""
        return text.translate(self._table) if self.folding else text

    def matches(self, text: str) -> bool:
        """Search the text itself."""
        text = self.fold(text)
        if self.anchored:
            return text.lstrip(_SPACE).startswith(self._folded)
        return any(phrase in text for phrase in self._folded)

    def first(self, text: str) -> int:
        """Index of the earliest occurrence in an unfolded text, or -1."""
        found = [at for at in (text.find(phrase) for phrase in self.phrases) if at >= 0]
        return min(found, default=-1)

    def automaton(self, backend: str = "auto") -> Any:
        """A fresh automaton: "native", "python", or "auto" (native when it is built)."""
        if backend not in ("auto", "native", "python"):
            raise ValueError(f"backend must be 'auto', 'native' or 'python', got {backend!r}")
        patterns = [phrase.encode() for phrase in self._folded]
        if backend == "python" or (backend == "auto" and backends.native_error() is not None):
            return PyAutomaton(patterns, self.anchored)
        return backends.native().PhraseAutomaton(patterns, self.anchored)

    def to_dict(self) -> dict[str, Any]:
        """Phrases and options, as stored in profiles."""
        return {"phrases": list(self.phrases), **self.options}


# ---- bytes of tokens -------------------------------------------------------------------------------------------------------------


def byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE vocabularies use for bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in plain}
    for extra, byte in enumerate(b for b in range(256) if b not in plain):
        alphabet[chr(256 + extra)] = byte
    return alphabet


class TokenBytes:
    """What each token id adds to the decoded text: bytes; b"" for special tokens. `fallback` marks ids that stand for one raw byte
    (SentencePiece).
    """

    def __init__(self, tokens: list[bytes], fallback: frozenset[int]):
        self.tokens, self.fallback = tokens, fallback


_token_bytes: weakref.WeakKeyDictionary[Any, TokenBytes | None] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> TokenBytes | None:
    """The table of a fast tokenizer, or None when its decoder is of another kind (or disagrees with the table on a sample of texts)."""
    if tokenizer not in _token_bytes:
        _token_bytes[tokenizer] = _build_table(tokenizer)
    return _token_bytes[tokenizer]


def _build_table(tokenizer: Any) -> TokenBytes | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = [step["type"] for step in decoder.get("decoders", [decoder]) if step]
    vocab = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    tokens = [b""] * (max(vocab.values()) + 1)
    fallback: set[int] = set()
    if kinds == ["ByteLevel"]:
        alphabet = byte_level_alphabet()
        for text, i in vocab.items():
            if i not in special:
                tokens[i] = text.encode() if i in added or any(c not in alphabet for c in text) else bytes(alphabet[c] for c in text)
    elif "ByteFallback" in kinds or "Metaspace" in kinds:
        for text, i in vocab.items():
            if i in special:
                continue
            if "ByteFallback" in kinds and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                tokens[i] = bytes([int(text[3:5], 16)])
                fallback.add(i)
            else:
                tokens[i] = text.encode() if i in added else text.replace("▁", " ").encode()
    else:
        return None
    table = TokenBytes(tokens, frozenset(fallback))
    for text in ("I'm sorry, but I can't.", 'Förlåt — jag kan inte "göra" det…', "对不起，我不能。 ok", " two  blanks\nand\ta line"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        ours = b"".join(tokens[i] for i in ids).decode("utf-8", "replace")
        theirs = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if ours.lstrip() != theirs.lstrip():
            return None
    return table


# ---- stop rules ------------------------------------------------------------------------------------------------------------------


class PhraseRule:
    """Stop rule (llmcore.decoding.StopRule) that ends a sample with "match" as soon as a phrase is complete, from token ids alone."""

    def __init__(self, matcher: PhraseMatcher, table: TokenBytes, *, backend: str = "auto"):
        self.matcher, self.table = matcher, table
        self.machine = matcher.automaton(backend)
        self.direct = not matcher.folding and not table.fallback
        if self.direct:
            self.machine.set_tokens(table.tokens)

    def begin(self) -> Any:
        return 0 if self.direct else (0, b"")

    def advance(self, state: Any, token_id: int) -> tuple[Any, str | None]:
        if self.direct:
            state = self.machine.walk_token(state, token_id)
            return state, "match" if state == -1 else None
        state = self._feed(state, token_id)
        return state, "match" if state[0] == -1 else None

    def end(self, state: Any) -> str | None:
        if self.direct:
            return None
        return "match" if self._flush(*state) == -1 else None

    def _feed(self, state: tuple[int, bytes], token_id: int) -> tuple[int, bytes]:
        at, pending = state
        piece = self.table.tokens[token_id] if token_id < len(self.table.tokens) else b""
        if not piece:
            return state
        if self.table.fallback:
            # A run of raw bytes is decoded as a whole when it ends: all of it, or replacement characters when it is not UTF-8.
            if token_id in self.table.fallback:
                return at, pending + piece
            return self._walk(self._flush(at, pending), piece), b""
        data = pending + piece
        whole = len(data) - _incomplete(data)
        return self._walk(at, data[:whole]), data[whole:]

    def _walk(self, at: int, data: bytes) -> int:
        return self.machine.walk(at, self.matcher.fold(data.decode("utf-8", "replace")).encode() if self.matcher.folding else data)

    def _flush(self, at: int, pending: bytes) -> int:
        if not pending:
            return at
        try:
            pending.decode("utf-8")
        except UnicodeDecodeError:
            return self.machine.walk(at, "\ufffd".encode() * len(pending))
        return self._walk(at, pending)


def _incomplete(data: bytes) -> int:
    """Bytes at the end that begin a UTF-8 character without finishing it."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            need = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 1
            return back if need > back else 0
    return 0


class TextRule:
    """Stop rule that decodes the tokens so far and asks a function of the text: any tokenizer, any judge. With early=False it asks only
    at the end.
    """

    def __init__(self, judge: Callable[[str], bool], tokenizer: Any, *, early: bool = True):
        self.judge, self.tokenizer, self.early = judge, tokenizer, early

    def begin(self) -> tuple[int, ...]:
        return ()

    def advance(self, state: tuple[int, ...], token_id: int) -> tuple[tuple[int, ...], str | None]:
        state = (*state, token_id)
        # A trailing replacement character may be the first half of a character: the text without it is final, the rest is not.
        return state, "match" if self.early and self.judge(decode(self.tokenizer, state).rstrip("\ufffd")) else None

    def end(self, state: tuple[int, ...]) -> str | None:
        return "match" if self.judge(decode(self.tokenizer, state)) else None


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Text of generated tokens: special tokens removed, nothing stripped or tidied."""
    return tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def phrase_rule(matcher: PhraseMatcher | Callable[[str], bool], tokenizer: Any, *, backend: str = "auto") -> PhraseRule | TextRule:
    """The fastest stop rule for a matcher: over bytes when the tokenizer allows it, over text otherwise; any other callable is asked
    once, at the end.
    """
    if not isinstance(matcher, PhraseMatcher):
        return TextRule(matcher, tokenizer, early=False)
    table = token_bytes(tokenizer)
    return PhraseRule(matcher, table, backend=backend) if table is not None else TextRule(matcher.matches, tokenizer)
