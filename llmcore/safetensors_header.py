"""Parse the header of a safetensors file without believing it.

Lengths, names, dtypes, shapes and offsets are checked against the size of the file; the records must cover the data without hole or
overlap. Memory stays a small multiple of the header's bytes, whatever the header holds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

import torch

from llmcore.files import CheckpointError, CountedFile, short

# safetensors dtype -> (torch dtype, bits); None: a format that is recognised but has no torch dtype to read it into.
DTYPES: dict[str, tuple[torch.dtype | None, int]] = {
    "F64": (torch.float64, 64), "F32": (torch.float32, 32), "F16": (torch.float16, 16), "BF16": (torch.bfloat16, 16),
    "F8_E4M3": (torch.float8_e4m3fn, 8), "F8_E5M2": (torch.float8_e5m2, 8), "F8_E8M0": (torch.float8_e8m0fnu, 8),
    "I64": (torch.int64, 64), "I32": (torch.int32, 32), "I16": (torch.int16, 16), "I8": (torch.int8, 8), "U8": (torch.uint8, 8),
    "U16": (torch.uint16, 16), "U32": (torch.uint32, 32), "U64": (torch.uint64, 64), "BOOL": (torch.bool, 8), "C64": (torch.complex64, 64),
    "F4": (None, 4), "F6_E2M3": (None, 6), "F6_E3M2": (None, 6),
}
MAX_HEADER = 100_000_000  # the format's own limit
_MAX_NAME = 65_535
_MAX_ENTRY = 16_384  # one tensor record
_MAX_DIMENSIONS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Where one stored tensor lies: file, dtype name as stored, shape, absolute byte range."""

    file: CountedFile
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: CountedFile) -> dict[str, Entry]:
    """Parse one safetensors header: 8-byte length, JSON object of records, data that the records cover without hole or overlap."""

    def fail(field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: {field}: {problem}")

    if file.size < 8:
        raise fail("header length", f"the file has {file.size} bytes, fewer than 8")
    length = int.from_bytes(file.read(8, 0, "header length"), "little")
    if length > MAX_HEADER or length > file.size - 8:
        raise fail("header length", f"{length} bytes, at most {min(MAX_HEADER, file.size - 8)} are possible in a file of {file.size}")
    try:
        text = file.read(length, 8, "header").decode()
    except UnicodeDecodeError:
        raise fail("header", "not UTF-8") from None
    data_start, data_bytes = 8 + length, file.size - 8 - length
    entries: dict[str, Entry] = {}
    for name, record in flat_records(text, fail, limit=_MAX_ENTRY):
        if name == "__metadata__":
            if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
                raise fail("__metadata__", "must be an object of strings")
            continue
        field = f"tensor {short(name)}"
        if name in entries:
            raise fail(field, "occurs twice")
        if set(record) != {"dtype", "shape", "data_offsets"}:
            raise fail(field, f"must have dtype, shape and data_offsets, got {short(', '.join(record))}")
        dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise fail(f"{field} dtype", f"{short(dtype)} is not one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            raise fail(f"{field} shape", f"must be at most {_MAX_DIMENSIONS} non-negative 64-bit integers, got {short(shape)}")
        if (not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets)
                or not 0 <= offsets[0] <= offsets[1]):
            raise fail(f"{field} data_offsets", f"must be two ascending offsets, got {short(offsets)}")
        if offsets[1] > data_bytes:
            raise fail(f"{field} data_offsets", f"end at {short(offsets[1])}, the file holds {data_bytes} bytes of data (truncated?)")
        if math.prod(max(n, 1) for n in shape) >= 1 << 63:  # even an empty tensor must have countable rows
            raise fail(f"{field} shape", f"{short(shape)} overflows 64 bits")
        bits = math.prod(shape) * DTYPES[dtype][1]
        if bits != 8 * (offsets[1] - offsets[0]):
            raise fail(f"{field} shape", f"{short(shape)} of {dtype} needs {short(bits / 8 if bits % 8 else bits // 8)} bytes, "
                       f"data_offsets give {offsets[1] - offsets[0]}")
        entries[sys.intern(name)] = Entry(file, dtype, tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])
    end, last = data_start, "header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            what = "overlaps" if entry.offset < end else "leaves a hole after"
            raise fail(f"tensor {short(name)} data_offsets",
                       f"start at {entry.offset - data_start}, which {what} {last} (end {end - data_start})")
        end, last = entry.offset + entry.nbytes, f"tensor {short(name)}"
    if end != file.size:
        raise fail("data", f"{file.size - end} bytes at the end belong to no tensor")
    return entries


# One record is a flat object: no nested braces outside strings. Parsing record by record keeps memory proportional to the header, which a
# general JSON parser does not (a header of "[[],[],..." would cost twenty times its size).
# The patterns are unrolled, so that they match in linear time and one step per string, not per character.
_SPACE = re.compile(r"[ \t\r\n]*")
_NAME = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_RECORD = re.compile(r'\{[^{}"]*(?:"[^"\\]*(?:\\.[^"\\]*)*"[^{}"]*)*\}')


def flat_records(text: str, fail: Any, *, limit: int) -> Iterable[tuple[str, dict[str, Any]]]:
    """(key, object) pairs of a JSON object whose values are flat objects of at most `limit` characters (metadata, which may be longer, is
    checked for form and then left out)."""

    def skip(position: int) -> int:
        return _SPACE.match(text, position).end()  # type: ignore[union-attr]

    position = skip(0)
    if not text.startswith("{", position):
        raise fail("header", "must be a JSON object")
    position = skip(position + 1)
    if text.startswith("}", position) and skip(position + 1) == len(text):
        return
    while True:
        key = _NAME.match(text, position)
        colon = skip(key.end()) if key else -1
        if key is None or not text.startswith(":", colon) or key.end() - position > _MAX_NAME:
            raise fail("header", f"malformed JSON at character {position}")
        start = skip(colon + 1)
        record = _RECORD.match(text, start)
        try:
            name = json.loads(key[0])
            if record is None or (record.end() - start > limit and name != "__metadata__"):
                raise fail(f"tensor {short(name)}", f"record at character {start} is not a flat object of at most {limit} characters")
            refuse_deep_nesting(record[0])
            value = {} if record.end() - start > limit else _decode_record(record[0])
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise fail("header", f"malformed JSON at character {position}: {short(str(error))}") from None
        yield name, value
        position = skip(record.end())
        if text.startswith("}", position) and skip(position + 1) == len(text):
            return
        if not text.startswith(",", position):
            raise fail("header", f"malformed JSON at character {position}")
        position = skip(position + 1)


def refuse_deep_nesting(text: str, limit: int = 200) -> None:
    """Raise ValueError for brackets nested deeper than `limit`.

    The parser recurses in C; a process that raised Python's recursion limit (compilers do) would overflow the stack instead of raising.
    """
    if text.count("[") + text.count("{") <= limit:
        return
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text):
        if token[0] in "[{":
            depth += 1
            if depth > limit:
                raise ValueError(f"nested deeper than {limit} at character {token.start()}")
        elif token[0] in "]}":
            depth -= 1


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} occurs twice")
    return value


_decode_record = json.JSONDecoder(object_pairs_hook=unique_pairs).decode  # json.loads would make a decoder for every record
