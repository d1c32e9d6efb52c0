"""Vocabularies: bytes of pieces, the five kinds of files, ranking and alignment by byte string."""

from __future__ import annotations

import base64
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llmcore.kernels import backends
from llmcore.methods.huref import tokens as t

GIVEN = ["a", "b", "Ġ", "Ċ", "ab", "Ġab", "ĠĠ", "é"]  # as byte-level BPE writes them; "é" is the byte 0xE9 alone
MERGES = ["a b", "Ġ ab", "Ġ Ġ"]
BYTES = [b"a", b"b", b" ", b"\n", b"ab", b" ab", b"  ", b"\xe9"]


@pytest.mark.parametrize(("piece", "byte_level", "expected"), [
    ("Ġthe", True, b" the"), ("Ċ", True, b"\n"), ("é", True, b"\xe9"), ("Ã©", True, "é".encode()), ("Ń", True, b"\xad"),
    ("a b", True, b"a b"),  # a space is no character of the alphabet: an added token, spelled as it stands
    ("Ġ\u2581x", True, "Ġ x".encode()), ("\x7f", True, b"\x7f"), ("\xa0", True, "\xa0".encode()), ("日", True, "日".encode()),
    ("\u2581the", False, b" the"), ("Ġthe", False, "Ġthe".encode()), ("é", False, "é".encode()), ("😀", False, "😀".encode()),
    ("<0x0A>", False, b"\n"), ("<0xfF>", True, b"\xff"), ("<0x0G>", False, b"<0x0G>"), ("<0x0A>>", False, b"<0x0A>>"),
    ("\udcff", False, b"\xed\xb3\xbf"), ("", True, b""),
])  # fmt: skip
def test_bytes_of_a_piece(piece, byte_level, expected):
    assert t.token_bytes(piece, byte_level) == expected


@given(st.lists(st.text(st.characters(max_codepoint=0x250) | st.characters(categories=None), max_size=8)
                | st.text("<0x9aFg> \u2581Ġ", min_size=5, max_size=7)), st.booleans())  # fmt: skip
def test_compiled_bytes_are_those_of_python(pieces, byte_level):
    if backends.native_error():
        pytest.skip(backends.native_error())
    assert backends.native().token_bytes(pieces, byte_level) == [t.token_bytes(p, byte_level) for p in pieces]


def _sentencepiece(pieces):
    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    entries = [field(1, piece.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + bytes([3 << 3, kind])
               for piece, score, kind in pieces]  # fmt: skip
    return b"".join(field(1, e) for e in entries)


def test_every_kind_of_file_names_the_same_tokens(tmp_path):
    def folder(name, **files):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    table = {piece: i for i, piece in enumerate([*GIVEN, "<|end|>"])}
    for merges in (MERGES, [m.split() for m in MERGES]):
        name = "json" + type(merges[0]).__name__
        content = {"model": {"vocab": table, "merges": merges}, "decoder": {"type": "ByteLevel"},
                   "added_tokens": [{"id": 8, "content": "<|end|>"}, {"id": 9, "content": "<|later|>"}]}  # fmt: skip
        found = t.read_vocabulary(folder(name, tokenizer__json=json.dumps(content)))
        assert found.strings == (*BYTES, None)
        assert found.ranked == (0, 1, 2, 3, 7, 4, 5, 6)  # what no merge makes, then merges in the order they were learnt
    files = {"vocab__json": json.dumps(table), "merges__txt": "#version: 0.2\n" + "\n".join(MERGES)}
    assert t.read_vocabulary(folder("slow", **files)).strings == (*BYTES, None)
    assert t.read_vocabulary(folder("slow2", **files)).ranked == found.ranked
    ranks = "\n".join(f"{base64.b64encode(b).decode()} {i}" for i, b in enumerate(BYTES))
    assert t.read_vocabulary(folder("rank", cl100k__tiktoken=ranks)).strings == tuple(BYTES)
    metadata = {"tokenizer.ggml.tokens": [*GIVEN, "<|end|>", "<|later|>"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": MERGES}
    assert t.read_vocabulary(tmp_path, metadata) is found  # the same pieces in a conversion
    alone = t.read_vocabulary(tmp_path, {**metadata, "tokenizer.ggml.tokens": GIVEN})
    assert (alone.strings, alone.ranked) == (tuple(BYTES), found.ranked)
    unigram = [("<unk>", 0.0, 2), ("\u2581a", -1.0, 1), ("b", -3.0, 1), ("<0x41>", -2.0, 6), ("\u2581a", -9.0, 1)]
    pieces = t.read_vocabulary(folder("spm", tokenizer__model=_sentencepiece(unigram)))
    assert pieces.strings == (None, b" a", b"b", b"A")
    assert pieces.ranked == (1, 3, 2)
    assert t.read_vocabulary(folder("none")) is None
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        t.read_vocabulary(folder("broken", tokenizer__json="{"))


def test_ranking_and_alignment_by_byte_string():
    strings = tuple(bytes([65 + i // 26, 65 + i % 26]) for i in range(100))
    a = t.Vocabulary((*strings, strings[3], None), tuple(reversed(range(101))), "a")
    listed = t.TokenList.from_tokenizer(a)
    assert listed.ids == tuple(reversed(range(100)))  # id 100 stands for the bytes of id 3: the lowest counts
    assert a.ids[strings[3]] == 3
    b = t.Vocabulary((None, *strings[10:], b"other"), tuple(range(1, 92)), "b")
    found = t.align(listed, b, 70, size_a=95, size_b=90)  # ids 95 and on, and 90 and on, have no row
    assert found.ids_a == tuple(reversed(range(10, 80)))
    assert found.ids_b == tuple(i - 9 for i in found.ids_a)
    assert (found.common, found.dropped_a, found.dropped_b) == (85, 15, 6)
    assert found.digest == t.TokenList(found.ids_a, tuple(strings[i] for i in found.ids_a)).digest
    with pytest.raises(ValueError, match="only 0 tokens are common"):
        t.align(listed, t.Vocabulary((b"other",), (0,), "c"), 70, size_a=95, size_b=90)
    with pytest.raises(ValueError, match=r"ids must be >= 0, got -1"):
        t.TokenList((3, -1))
    with pytest.raises(ValueError, match="2 occurs twice"):
        t.TokenList((2, 1, 2))
