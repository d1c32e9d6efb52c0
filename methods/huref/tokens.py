"""Which tokens the rows of a fingerprint stand for, and the same tokens in another vocabulary.

Rows of two models compare only when they are the same tokens in the same order. Ids do not tell: vocabularies are extended and reordered.
Tokens are therefore known by their byte strings, with the spellings of a leading space (U+2581, U+0120) and of bytes (<0x41>) resolved.
Rare tokens are preferred: later training moves their embeddings least. Tokenizer files are read directly, no tokenizer library is needed.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import functools
import hashlib
import json
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llmcore.kernels import backends

from llmcore.phrases import byte_level_alphabet

DROPPED = ("<unk>", "<s>", "</s>")  # what the published lists leave out
MIN_COMMON = 64
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@functools.cache
def _to_latin1() -> dict[int, str]:
    """Translation of byte-level BPE characters to Latin-1; those that stand for no byte become U+FFFF, which Latin-1 cannot encode."""
    alphabet = byte_level_alphabet()
    strangers = {byte: "\uffff" for byte in range(256) if chr(byte) not in alphabet}
    return strangers | {ord(character): chr(byte) for character, byte in alphabet.items()}


def token_bytes(piece: str, byte_level: bool) -> bytes:
    """The bytes that a vocabulary's piece stands for."""
    if piece.startswith("<0x") and (found := _BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(found[1], 16)])
    if byte_level:
        spaced = piece.replace("\u0120", " ")
        if spaced.isascii() and piece.isprintable() and " " not in piece:  # most pieces; the table below says the same, slower
            return spaced.encode()
        try:
            return piece.translate(_to_latin1()).encode("latin-1")
        except UnicodeEncodeError:
            pass
    return piece.replace("\u2581", " ").encode("utf-8", "surrogatepass")


def _strings(pieces: Iterable[str], byte_level: bool) -> list[bytes]:
    """token_bytes of every piece, compiled where that is built."""
    if backends.native_error() is None and hasattr(backends.native(), "token_bytes"):  # an older build lacks it
        return backends.native().token_bytes(pieces, byte_level)
    return [token_bytes(piece, byte_level) for piece in pieces]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """strings: byte string of each id (None: special, added or unused). ranked: ids from the most frequent to the rarest by
    construction."""

    strings: tuple[bytes | None, ...]
    ranked: tuple[int, ...]
    source: str

    @functools.cached_property
    def ids(self) -> dict[bytes, int]:
        """Byte string -> id; the lowest id when two pieces stand for the same bytes."""
        table = dict(zip(reversed(self.strings), range(len(self.strings) - 1, -1, -1), strict=True))  # the last written stays: the lowest
        table.pop(None, None)
        return table  # type: ignore[return-value]


def _ranked(pieces: dict[str, int], order: Iterable[str], dropped: set[int]) -> tuple[int, ...]:
    seen = dict.fromkeys(map(pieces.get, order))
    for i in (None, *dropped):
        seen.pop(i, None)
    rest = sorted(set(pieces.values()) - seen.keys() - dropped)
    return (*rest, *seen)  # type: ignore[arg-type]  # what no merge makes are single characters: the most frequent


def _from_pieces(
    pieces: dict[str, int], order: Iterable[str], special: Iterable[int], source: str, byte_level: bool | None = None
) -> Vocabulary:
    if byte_level is None:
        byte_level = any(p.startswith("\u0120") for p in pieces) and not any(p.startswith("\u2581") for p in pieces)
    strings: list[bytes | None] = [None] * (max(pieces.values(), default=-1) + 1)
    for i, text in zip(pieces.values(), _strings(pieces, byte_level), strict=True):
        strings[i] = text
    dropped = set(special) | {pieces[p] for p in DROPPED if p in pieces}
    for i in dropped:
        if 0 <= i < len(strings):
            strings[i] = None
    return Vocabulary(tuple(strings), _ranked(pieces, order, dropped), source)


def read_vocabulary(path: str | Path, metadata: dict[str, Any] | None = None) -> Vocabulary | None:
    """The vocabulary stored with a checkpoint: tokenizer.json, vocab.json + merges.txt, tokenizer.model, *.tiktoken, or GGUF metadata."""
    if metadata and isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        return _from_gguf(metadata, str(path))
    folder = Path(path).expanduser()
    folder = folder if folder.is_dir() else folder.parent
    if (folder / "tokenizer.json").is_file():
        try:
            return _parsed((folder / "tokenizer.json").read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from None
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        pieces = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        return _from_pieces(
            pieces,
            (line.replace(" ", "") for line in lines if line and not line.startswith("#version")),
            [i for p, i in pieces.items() if p.startswith("<|") and p.endswith("|>")],
            str(folder / "vocab.json"),
            True,
        )
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece((folder / "tokenizer.model").read_bytes(), str(folder / "tokenizer.model"))
    for file in sorted(folder.glob("*.tiktoken")):
        entries = [line.split() for line in file.read_bytes().splitlines() if line.strip()]
        table = {int(rank): base64.b64decode(token) for token, rank in entries}
        strings = tuple(table.get(i) for i in range(max(table) + 1))
        return Vocabulary(strings, tuple(sorted(table)), str(file))
    return None


# A copy of a model brings the same tokenizer, which is parsed once while somebody holds it: 20 MB that nobody holds are given back.
# Known by the digest of a tokenizer.json and by its pieces, which a GGUF file of the model lists too.
_alive: weakref.WeakValueDictionary[bytes, Vocabulary] = weakref.WeakValueDictionary()


def _parsed(data: bytes) -> Vocabulary:
    digest = hashlib.blake2b(data).digest()
    found = _alive.get(digest)
    if found is None:
        _alive[digest] = found = _from_tokenizer_json(json.loads(data), "tokenizer.json")
    return found


def _pieces_digest(pieces: Sequence[str], byte_level: bool) -> bytes:
    """Digest of the pieces in the order of their ids: equal for the tokenizer of a model and of its conversions."""
    state = hashlib.blake2b("".join(pieces).encode("utf-8", "surrogatepass"), person=b"bytes" if byte_level else b"")
    state.update(np.fromiter(map(len, pieces), dtype="<i8", count=len(pieces)))
    return state.digest()


def _from_tokenizer_json(data: dict[str, Any], source: str) -> Vocabulary:
    model = data.get("model") or {}
    special = [t["id"] for t in data.get("added_tokens") or []]
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: [piece, score], the id is the place
        pieces = {piece: i for i, (piece, _) in enumerate(vocab)}
        order: Iterable[str] = [piece for piece, _ in sorted(vocab, key=lambda entry: -entry[1])]
    elif isinstance(vocab, dict):
        pieces = vocab
        order = ["".join(m) if isinstance(m, list) else m.replace(" ", "", 1) for m in model.get("merges") or []] or sorted(
            pieces, key=pieces.get
        )  # type: ignore[arg-type]
    else:
        raise ValueError(f"{source}: model.vocab must be a list or an object, got {type(vocab).__name__}")
    level = any("ByteLevel" in json.dumps(data.get(part) or {}) for part in ("pre_tokenizer", "decoder"))
    found = _from_pieces(pieces, order, special, source, level)
    named = dict(zip(pieces.values(), pieces, strict=True)) | {t["id"]: str(t.get("content")) for t in data.get("added_tokens") or []}
    _alive[_pieces_digest([named[i] for i in sorted(named)], level)] = found
    return found


def _from_gguf(metadata: dict[str, Any], source: str) -> Vocabulary:
    tokens, byte_level = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.model") == "gpt2"
    digest = _pieces_digest(tokens, byte_level)
    if (known := _alive.get(digest)) is not None:  # the other side's: kinds, scores and merges say nothing new of the same pieces
        return known
    pieces: dict[str, int] = {}
    for i, piece in enumerate(tokens):
        pieces.setdefault(piece, i)
    kinds, scores = metadata.get("tokenizer.ggml.token_type"), metadata.get("tokenizer.ggml.scores")
    special = [] if kinds is None else np.isin(kinds, (2, 3, 4, 5)).nonzero()[0].tolist()  # unknown, control, user defined, unused
    merges = metadata.get("tokenizer.ggml.merges")
    if merges:
        order: Iterable[str] = [m.replace(" ", "", 1) for m in merges]
    elif scores is not None and len(scores) == len(tokens):
        order = [tokens[i] for i in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")]
    else:
        order = tokens
    _alive[digest] = found = _from_pieces(pieces, order, special, source, byte_level)
    return found


def _from_sentencepiece(data: bytes, source: str) -> Vocabulary:
    """Pieces of a SentencePiece model: field 1 of the protocol buffer, each with piece (1), score (2, float), type (3)."""

    def varint(buffer: bytes, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(buffer) or shift > 63:
                raise ValueError(f"{source}: not a SentencePiece model")
            byte = buffer[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at

    def fields(buffer: bytes) -> Iterable[tuple[int, Any]]:
        at = 0
        while at < len(buffer):
            key, at = varint(buffer, at)
            if key & 7 == 0:
                value, at = varint(buffer, at)
                yield key >> 3, value
            elif key & 7 in (1, 5):
                size = 8 if key & 7 == 1 else 4
                yield key >> 3, buffer[at : at + size]
                at += size
            elif key & 7 == 2:
                size, at = varint(buffer, at)
                if at + size > len(buffer):
                    raise ValueError(f"{source}: truncated")
                yield key >> 3, buffer[at : at + size]
                at += size
            else:
                raise ValueError(f"{source}: not a SentencePiece model")

    pieces, scores, special = {}, [], []
    for number, value in fields(data):
        if number != 1 or not isinstance(value, bytes):
            continue
        entry = dict(fields(value))
        i = len(scores)
        pieces.setdefault(entry.get(1, b"").decode("utf-8", "surrogateescape"), i)
        scores.append(float(np.frombuffer(entry[2], "<f4")[0]) if 2 in entry else 0.0)
        if entry.get(3, 1) in (2, 3, 4, 5):
            special.append(i)
    order = sorted(pieces, key=lambda p: -scores[pieces[p]])
    return _from_pieces(pieces, order, special, source, False)


@dataclasses.dataclass(frozen=True)
class TokenList:
    """Ids in order, the most frequent first, with their byte strings (empty when no tokenizer was at hand).

    A fingerprint uses the last K. digest: of the strings (of the ids when there are none): equal digests mean the same rows.
    """

    ids: tuple[int, ...]
    strings: tuple[bytes, ...] = ()
    source: str = ""

    def __post_init__(self) -> None:
        if self.strings and len(self.strings) != len(self.ids):
            raise ValueError(f"strings must have one entry for each of the {len(self.ids)} ids, got {len(self.strings)}")
        if len(set(self.ids)) != len(self.ids):
            twice = next(i for i, n in collections.Counter(self.ids).items() if n > 1)
            raise ValueError(f"ids must be distinct, {twice} occurs twice among {len(self.ids)}")
        if min(self.ids, default=0) < 0:
            raise ValueError(f"ids must be >= 0, got {min(self.ids)}")

    def __len__(self) -> int:
        return len(self.ids)

    def last(self, count: int) -> TokenList:
        """The last `count` tokens (all, when there are fewer)."""
        if count < 2:
            raise ValueError(f"K must be at least 2, got {count}")
        return TokenList(self.ids[-count:], self.strings[-count:], self.source)

    @functools.cached_property
    def digest(self) -> str:
        state = hashlib.blake2b(digest_size=16)
        if self.strings:
            for text in self.strings:
                state.update(len(text).to_bytes(4, "little") + text)
        else:
            state.update(b"ids")
            state.update(np.asarray(self.ids, dtype="<i8").tobytes())
        return state.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "ids": list(self.ids),
            "strings": [base64.b64encode(s).decode() for s in self.strings],
            "source": self.source,
            "digest": self.digest,
        }

    def save(self, path: str | Path) -> None:
        from llmcore import files

        files.write_json(path, self.to_json(), indent=None)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenList:
        found = cls(tuple(data["ids"]), tuple(base64.b64decode(s) for s in data.get("strings") or ()), data.get("source", ""))
        if data.get("digest") not in (None, found.digest):
            raise ValueError(f"token list: digest {data['digest']} does not fit its content ({found.digest})")
        return found

    @classmethod
    def from_file(cls, path: str | Path, vocabulary: Vocabulary | None = None) -> TokenList:
        """One id a line, the most frequent first (the published format), or the JSON that `save` writes."""
        text = Path(path).read_text()
        if text.lstrip().startswith("{"):
            return cls.from_json(json.loads(text))
        try:
            ids = tuple(int(line) for line in text.split())
        except ValueError as error:
            raise ValueError(f"{path}: must hold one integer a line: {error}") from None
        return cls.of(ids, vocabulary, str(path))

    @classmethod
    def of(cls, ids: Sequence[int], vocabulary: Vocabulary | None = None, source: str = "ids") -> TokenList:
        """Explicit ids, with their strings when a vocabulary is given and knows all of them."""
        ids = tuple(int(i) for i in ids)
        strings = [vocabulary.strings[i] if vocabulary and 0 <= i < len(vocabulary.strings) else None for i in ids]
        known = tuple(s for s in strings if s is not None)
        return cls(ids, known if len(known) == len(ids) else (), source)

    @classmethod
    def from_tokenizer(cls, vocabulary: Vocabulary) -> TokenList:
        """Offline ranking: merges of a BPE in the order they were learnt, pieces of a Unigram model by score. Deterministic."""
        ids, strings = vocabulary.ids, vocabulary.strings
        texts = [strings[i] for i in vocabulary.ranked]
        kept = [n for n, (i, text) in enumerate(zip(vocabulary.ranked, texts, strict=True)) if text is not None and ids[text] == i]
        if len(kept) == len(texts):
            return cls(vocabulary.ranked, tuple(texts), vocabulary.source)  # type: ignore[arg-type]
        return cls(tuple(vocabulary.ranked[n] for n in kept), tuple(texts[n] for n in kept), vocabulary.source)  # type: ignore[misc]

    @classmethod
    def from_corpus(
        cls,
        texts: Iterable[str],
        encode: Callable[[str], Sequence[int]],
        vocabulary: Vocabulary | None = None,
        *,
        unit: str = "article",
        charset: str | None = "latin-cyrillic",
    ) -> TokenList:
        """Count the tokens of a corpus and sort by (count, id), both descending; tokens that never occur are not in the list.

        encode: text -> ids. unit: drop whole texts ("article", as published) or single lines ("line") with characters outside the charset,
        which allows codes below 592 and 1024 to 1278; charset=None keeps everything.
        """
        if unit not in ("article", "line"):
            raise ValueError(f"unit must be 'article' or 'line', got {unit!r}")
        if charset not in (None, "latin-cyrillic"):
            raise ValueError(f"charset must be None or 'latin-cyrillic', got {charset!r}")
        counts: collections.Counter[int] = collections.Counter()
        for text in texts:
            for part in [text] if unit == "article" else text.splitlines(keepends=True):
                if charset is None or all(ord(c) < 592 or 1024 <= ord(c) <= 1278 for c in part):
                    counts.update(int(i) for i in encode(part))
        ranked = [i for i, _ in sorted(counts.items(), key=lambda entry: (entry[1], entry[0]), reverse=True)]
        if vocabulary is not None:
            ranked = [i for i in ranked if i < len(vocabulary.strings) and vocabulary.strings[i] is not None]
        return cls.of(ranked, vocabulary, "corpus")


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The same tokens in two vocabularies. common: tokens both have; dropped_*: tokens of the list or vocabulary the other lacks."""

    ids_a: tuple[int, ...]
    ids_b: tuple[int, ...]
    digest: str
    common: int
    dropped_a: int
    dropped_b: int
    notes: tuple[str, ...] = ()


def align(tokens: TokenList, vocabulary_b: Vocabulary | None, num_tokens: int, *, size_a: int, size_b: int) -> Alignment:
    """Ids of the last K tokens of `tokens` (of model a) that model b has too, in the list's order, matched by byte string.

    size_a, size_b: rows of the embeddings. Without strings on either side equal ids are taken for equal tokens if the sizes agree.
    """
    notes: list[str] = []
    if tokens.strings and vocabulary_b is not None:
        other = vocabulary_b.ids
        counterparts = np.fromiter((other.get(s, size_b) for s in tokens.strings), np.int64, len(tokens))
        shared = ((np.fromiter(tokens.ids, np.int64, len(tokens)) < size_a) & (counterparts < size_b)).nonzero()[0]
        common, dropped_a, dropped_b = len(shared), len(tokens) - len(shared), len(other) - len(shared)
        pairs = [(tokens.ids[n], int(counterparts[n]), tokens.strings[n]) for n in shared[-num_tokens:].tolist()]
    elif size_a == size_b:
        notes.append("no tokenizer on one side: equal ids are taken for equal tokens")
        pairs = [(i, i, b"") for i in tokens.ids if i < size_a]
        common, dropped_a, dropped_b = len(pairs), len(tokens) - len(pairs), 0
    else:
        raise ValueError(
            f"tokens cannot be aligned: one side has no tokenizer file and the vocabularies differ ({size_a} and {size_b} rows); "
            "put tokenizer.json next to both checkpoints"
        )
    if common < MIN_COMMON:
        raise ValueError(
            f"tokens: only {common} tokens are common to both models, at least {MIN_COMMON} are needed "
            f"({dropped_a} of the base's and {dropped_b} of the other's have no counterpart)"
        )
    if common < num_tokens:
        notes.append(f"K = {num_tokens} asked for, {common} common tokens used")
    pairs = pairs[-num_tokens:]
    strings = tuple(s for _, _, s in pairs) if tokens.strings and vocabulary_b is not None else ()
    ids_a = tuple(a for a, _, _ in pairs)
    return Alignment(ids_a, tuple(b for _, b, _ in pairs), TokenList(ids_a, strings).digest, common, dropped_a, dropped_b, tuple(notes))
