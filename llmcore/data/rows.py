"""Rows of preference, unpaired and instruction data from files, datasets or dictionaries, each checked and named."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = {
    "preference": "chosen, rejected and optionally prompt",
    "unpaired": "prompt, completion and label (true = desirable)",
    "instruction": "messages, or prompt and completion, or instruction (with input) and output, or text",
}
ASSISTANT = "\n\nAssistant:"

Text = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example before tokenisation: `completions` is (chosen, rejected) or (completion,); id is "file:line"."""

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    desirable: bool | None = None


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
        limit = common_prefix(chosen, rejected)
        turn = chosen.rfind(ASSISTANT, 0, limit)
        if turn >= 0:
            return turn + len(ASSISTANT)
    cut = common_prefix(chosen, rejected)
    # A space that ends the shared text belongs to the completions: tokenisers attach it to the word that follows.
    if isinstance(chosen, str) and 0 < cut < max(len(chosen), len(rejected)) and chosen[cut - 1] == " ":
        cut -= 1
    # Identical sides share everything; keeping the last message as the completion leaves something to score.
    if not isinstance(chosen, str) and cut == len(chosen) == len(rejected) and cut > 1:
        cut -= 1
    return cut


def common_prefix(a: Sequence[Any] | np.ndarray, b: Sequence[Any] | np.ndarray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if isinstance(a, np.ndarray):
        differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
        return int(differs[0]) if differs.size else n
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n
