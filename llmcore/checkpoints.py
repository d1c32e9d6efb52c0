"""Read single tensors, rows and slices out of a checkpoint on disk without loading it.

`CheckpointReader` opens a safetensors file, a directory of shards with its index, or a GGUF file. Opening parses headers only; after that
each request reads the bytes it needs (positioned reads of at most 8 MB) and nothing else. For a 70B model in 16 bits two layers and 4,096
embedding rows are 3.5 GB of 138 GB.

Nothing in a file is believed. Header lengths, counts, shapes and offsets are checked against the size of the file before memory is taken;
overlaps, holes, duplicate names, shards that are missing or lie outside the directory, special files and pickles are refused with a
`CheckpointError` that names the file and the field. Memory for parsing is bounded by a small multiple of the header's bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmcore import gguf
from llmcore.files import CheckpointError, CountedFile, short
from llmcore.safetensors_header import DTYPES, MAX_HEADER, Entry, flat_records, read_header, refuse_deep_nesting, unique_pairs

__all__ = ["CheckpointError", "CheckpointReader", "MissingFile", "MissingTensor"]
_GGUF_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
                "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_SCALED = ("F8_E4M3", "F8_E5M2")
# Where quantisers put the multiplier of `<module>.weight`: W = stored * scale in all of them, the name with "inv" included.
_SCALE_NAMES = ("{0}_scale_inv", "{0}_scale", "{1}.scale_weight", "{0}.scale")
_MAX_JSON = 4_000_000  # config.json, and an index that is parsed as any JSON
_WASTE = 1 / 32  # bytes between wanted rows that may be read along, as a share of the wanted bytes
_CHUNK_BYTES = 1 << 20


class MissingFile(CheckpointError, FileNotFoundError):
    """A file that the path or the index names does not exist."""

    __str__ = ValueError.__str__


class MissingTensor(CheckpointError, KeyError):
    """A tensor name that the checkpoint does not hold."""

    __str__ = ValueError.__str__


class CheckpointReader:
    """Random access to the tensors of a checkpoint.

    Args:
        path: a directory (safetensors, single or sharded, or one .gguf), a .safetensors file, a .safetensors.index.json or a .gguf file.
        unscaled_fp8: what to do with an 8-bit float weight matrix that has no scale beside it: "error", or "one" to take the stored
            numbers as they are.

    Names are those of the file. A GGUF file of a llama-like model also answers to the Hugging Face names (`model.layers.0...`), with query
    and key rows in Hugging Face order; `huggingface_names()` lists them. Reads may come from several threads.

    Attributes: path, format ("safetensors" or "gguf"), bytes_read (everything that left the files, headers included), header_bytes.

    Example:
        with CheckpointReader("smollm2-dir") as reader:
            q = reader.read("model.layers.29.self_attn.q_proj.weight", dtype=torch.float32)
            rows = reader.rows("model.embed_tokens.weight", [5, 17, 5])
            print(reader.bytes_read)
    """

    def __init__(self, path: str | Path, *, unscaled_fp8: str = "error"):
        if unscaled_fp8 not in ("error", "one"):
            raise ValueError(f"unscaled_fp8 must be 'error' or 'one', got {unscaled_fp8!r}")
        self.path = Path(path).expanduser()
        self._unscaled_fp8 = unscaled_fp8
        self._files: list[CountedFile] = []
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        self._config: dict[str, Any] | None = None
        self.metadata: dict[str, Any] = {}
        self.format = "safetensors"
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        self.header_bytes = self.bytes_read

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self._aliases

    def close(self) -> None:
        """Close the files; what was read stays valid."""
        for file in self._files:
            file.close()

    @property
    def bytes_read(self) -> int:
        """Bytes that left the files so far, headers included."""
        return sum(file.bytes_read for file in self._files)

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json ({} when there is none), or the equivalent made from a GGUF file's metadata."""
        if self._config is None:
            self._config = self._read_config()
        return self._config

    def names(self) -> list[str]:
        """Names of all stored tensors, in the file's order."""
        return list(self._entries)

    def huggingface_names(self) -> dict[str, str]:
        """Hugging Face name -> stored name; the identity for safetensors."""
        return dict(self._aliases) if self.format == "gguf" else {name: name for name in self._entries}

    def shape(self, name: str) -> tuple[int, ...]:
        """Row-major shape, rows first (GGUF's reversed dimensions are turned)."""
        return self._entry(name)[1].shape

    def dtype(self, name: str) -> str:
        """Stored type as the file spells it: "F32", "BF16", "F8_E4M3", "Q4_1" ..."""
        return self._entry(name)[1].dtype

    def nbytes(self, name: str) -> int:
        """Stored bytes of the tensor, scales not counted."""
        return self._entry(name)[1].nbytes

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole tensor, on the CPU, in memory of its own.

        dtype None: the stored type where torch has it; float32 for quantised blocks and for 8-bit floats (multiplied by their scales).
        """
        stored, entry = self._entry(name)
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype or self._torch_dtype(entry))
        return self._rows(name, stored, entry, [(0, entry.shape[0] if entry.shape else 1)], None, dtype).reshape(entry.shape)

    def slice(self, name: str, start: int, stop: int, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows [start, stop) of the first dimension.

        out: memory of that shape and dtype which the rows are read into where stored order and dtype allow; the result may lie in it.
        """
        stored, entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise ValueError(f"{entry.file.path}: tensor {short(name)}: rows [{start}, {stop}) are not inside shape {entry.shape}")
        if not entry.nbytes:
            return torch.empty((stop - start, *entry.shape[1:]), dtype=dtype or self._torch_dtype(entry))
        if name in self._aliases and self._interleaved(stored):
            return self.rows(name, np.arange(start, stop), dtype=dtype)
        return self._rows(name, stored, entry, [(start, stop)], None, dtype, out)

    def rows(self, name: str, ids: Sequence[int] | np.ndarray | torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows `ids` of the first dimension in the order given (repeats allowed).

        Only these rows are read; rows that lie close are fetched in one request as long as what is read along stays below 1/32.
        """
        stored, entry = self._entry(name)
        wanted = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise TypeError(f"ids must be a 1-D sequence of integers, got {wanted.dtype} of shape {wanted.shape}")
        if not entry.shape:
            raise ValueError(f"{entry.file.path}: tensor {short(name)} is a scalar and has no rows")
        num_rows = entry.shape[0]
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= num_rows):
            raise ValueError(f"ids must lie in [0, {num_rows}) for tensor {short(name)} of {entry.file.path}, "
                             f"got {int(wanted.min())} to {int(wanted.max())}")
        wanted = wanted.astype(np.int64)
        if name in self._aliases and (heads := self._interleaved(stored)):
            wanted = gguf.huggingface_rows(wanted, num_rows, heads)
        unique, order = np.unique(wanted, return_inverse=True)
        spans = _spans(unique)
        starts = np.array([start for start, _ in spans], dtype=np.int64)
        begin = np.cumsum([0, *(stop - start for start, stop in spans)])[:-1]  # where each span starts among the rows that are read
        which = np.searchsorted(starts, unique, side="right") - 1
        positions = (begin[which] + unique - starts[which])[order] if unique.size else unique
        return self._rows(name, stored, entry, spans, positions, dtype)

    # What is below turns rows of bytes into values.

    def _rows(self, name: str, stored: str, entry: Entry, spans: list[tuple[int, int]], positions: np.ndarray | None,
              dtype: torch.dtype | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read the row spans, pick `positions` among the rows read (None: all, in order), scale, turn into `dtype`."""
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype or None, got {type(dtype).__name__}")
        native = self._native_dtype(entry)
        if native is None and self.format == "safetensors":
            raise CheckpointError(f"{entry.file.path}: tensor {short(stored)}: dtype {entry.dtype} cannot be read")
        scale = self._scale(stored, entry)
        target = torch.float32 if scale is not None or native is None else (dtype or native)
        values = _span_values(entry, spans, native, target, f"tensor {short(stored)}", out)
        if positions is None and name in self._aliases and (heads := self._interleaved(stored)):
            positions = gguf.huggingface_rows(np.arange(len(values)), len(values), heads)
        if positions is not None and not np.array_equal(positions, np.arange(len(values))):
            values = values[torch.from_numpy(positions)]
        if scale is not None:
            ids = np.concatenate([np.arange(start, stop) for start, stop in spans]) if spans else np.empty(0, dtype=np.int64)
            values = _apply_scale(values, scale, torch.from_numpy(ids if positions is None else ids[positions]), entry, self._block_shape(),
                                  f"{entry.file.path}: tensor {short(stored)}")
        return values if dtype is None else values.to(dtype)

    def _native_dtype(self, entry: Entry) -> torch.dtype | None:
        """The torch dtype of the stored bytes; None for blocks and for formats that torch lacks."""
        return _GGUF_DTYPES.get(entry.dtype) if self.format == "gguf" else DTYPES[entry.dtype][0]

    def _torch_dtype(self, entry: Entry) -> torch.dtype:
        return torch.float32 if entry.dtype in _SCALED else self._native_dtype(entry) or torch.float32

    def _interleaved(self, stored: str) -> int:
        """Heads of a rotary-interleaved tensor (0 for others); checked once against the rows it has."""
        heads = gguf.interleaved_heads(self.config.get("model_type", ""), stored, self.config)
        rows = self._entries[stored].shape[0] if self._entries[stored].shape else 0
        if heads and rows % (2 * heads):
            raise CheckpointError(f"{self.path}: tensor {short(stored)}: {rows} rows are not {heads} heads of even size")
        return heads

    def _scale(self, stored: str, entry: Entry) -> torch.Tensor | None:
        """The scale tensor of an 8-bit float weight, float32; None for everything else."""
        if entry.dtype not in _SCALED or self.format == "gguf":
            return None
        tried = [pattern.format(stored, stored.removesuffix(".weight")) for pattern in _SCALE_NAMES]
        for name in tried:
            if name in self._entries and self._entries[name].dtype not in _SCALED:
                return self.read(name, dtype=torch.float32)
        if len(entry.shape) < 2 or self._unscaled_fp8 == "one":
            return None
        raise CheckpointError(f"{entry.file.path}: tensor {short(stored)}: {entry.dtype} weights without a scale "
                              f"(looked for {', '.join(tried)}); pass unscaled_fp8='one' if the stored numbers are the weights")

    def _block_shape(self) -> tuple[int, int]:
        quantisation = self.config.get("quantization_config")
        block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
        if isinstance(block, list) and len(block) == 2 and all(type(b) is int and 0 < b < 1 << 31 for b in block):
            return block[0], block[1]
        return 128, 128

    def _entry(self, name: str) -> tuple[str, Entry]:
        stored = name if name in self._entries else self._aliases.get(name)
        if stored is None:
            raise MissingTensor(f"{self.path}: no tensor {short(name)} among {len(self._entries)}{_similar(name, self._entries)}")
        return stored, self._entries[stored]

    # What is below finds the files and parses headers.

    def _open(self) -> None:
        path = self.path
        if not path.exists():
            raise MissingFile(f"{path}: no such file or directory")
        if path.is_dir():
            self._open_directory(path)
        elif path.name.endswith(".index.json"):
            self._open_index(path)
        elif path.suffix == ".gguf":
            self._open_gguf(path)
        elif path.suffix == ".safetensors":
            self._add_safetensors(path, None)
        else:
            _refuse_pickle(path)
            raise CheckpointError(f"{path}: not a .safetensors, .safetensors.index.json or .gguf file")

    def _open_directory(self, folder: Path) -> None:
        present = sorted(p.name for p in folder.iterdir())
        tensors = [name for name in present if name.endswith(".safetensors")]
        indexes = [name for name in present if name.endswith(".safetensors.index.json")]
        ggufs = [name for name in present if name.endswith(".gguf")]
        if "model.safetensors" in tensors:
            self._add_safetensors(_inside(folder, "model.safetensors", folder), None)
        elif indexes:
            if len(indexes) > 1 and "model.safetensors.index.json" not in indexes:
                raise CheckpointError(f"{folder}: several indexes ({', '.join(indexes)}); pass one of them")
            self._open_index(_inside(folder, "model.safetensors.index.json" if len(indexes) > 1 else indexes[0], folder))
        elif "adapter_config.json" in present and tensors == ["adapter_model.safetensors"]:
            raise CheckpointError(f"{folder}: holds an adapter, not a model: give the base model too (the adapter's own tensors are in "
                                  f"{folder / 'adapter_model.safetensors'})")
        elif tensors:
            self._open_shards(folder, tensors)
        elif len(ggufs) == 1:
            self._open_gguf(_inside(folder, ggufs[0], folder))
        elif ggufs:
            raise CheckpointError(f"{folder}: {len(ggufs)} .gguf files; pass one of them")
        else:
            for name in present:
                _refuse_pickle(folder / name)
            raise MissingFile(f"{folder}: holds neither .safetensors nor .gguf files")

    def _open_shards(self, folder: Path, names: list[str]) -> None:
        """Shards without an index: one file, or a complete set numbered k-of-n."""
        if len(names) > 1:
            numbered = [re.fullmatch(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors", name) for name in names]
            first = numbered[0]
            if first is None or any(m is None or (m[1], m[3]) != (first[1], first[3]) for m in numbered):
                raise CheckpointError(f"{folder}: several .safetensors files that are no numbered set and have no index; pass one of them")
            have, total = {int(m[2]) for m in numbered if m}, int(first[3])
            if len(have) != len(names) or len(names) != total or have != set(range(1, total + 1)):
                missing = next((k for k in range(1, total + 1) if k not in have), None)
                first_missing = f"{first[1]}-{missing or 0:0{len(first[2])}d}-of-{first[3]}.safetensors"
                raise MissingFile(f"{folder}: {len(names)} of {total} shards" + (f", {first_missing} is missing" if missing else ""))
        for name in names:
            self._add_safetensors(_inside(folder, name, folder), None)

    def _open_index(self, path: Path) -> None:
        index = self._read_json(path, flat=True)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: weight_map: must be an object of tensor names to file names")
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if (not isinstance(file, str) or not file.endswith(".safetensors") or file != Path(file).name or not file.isprintable()
                    or "\\" in file):
                raise CheckpointError(f"{path}: weight_map[{short(name)}]: must be the name of a .safetensors file in the same directory, "
                                      f"got {short(file)}")
            shards.setdefault(file, []).append(name)
        for file, names in shards.items():
            if not _exists(path.parent / file):
                raise MissingFile(f"{path}: weight_map: shard {short(file)} is missing; it should hold {short(names[0])} "
                                  f"and {len(names) - 1} more")
            self._add_safetensors(_inside(path.parent, file, path.parent), set(names))

    def _add_safetensors(self, path: Path, wanted: set[str] | None) -> None:
        """Add a file's tensors: all, or those that the index assigns to it."""
        file = self._file(path)
        entries = read_header(file)
        if wanted is not None:
            if absent := sorted(wanted - entries.keys()):
                raise MissingTensor(f"{path}: tensor {short(absent[0])}: the index says it is in this shard, its header does not have it")
            entries = {name: entry for name, entry in entries.items() if name in wanted}
        for name in entries:
            if name in self._entries:
                raise CheckpointError(f"{path}: tensor {short(name)}: also in {self._entries[name].file.path}")
        self._entries.update(entries)

    def _open_gguf(self, path: Path) -> None:
        self.format = "gguf"
        file = self._file(path)
        header = gguf.read_header(file)
        self._header = header
        self.metadata = header.metadata
        self._entries = {t.name: Entry(file, t.type, t.shape, t.offset, t.nbytes) for t in header.tensors.values()}
        if header.metadata.get("general.architecture") in gguf.ARCHITECTURES:
            self._aliases = {alias: name for name in self._entries if (alias := gguf.huggingface_name(name))}

    def _file(self, path: Path) -> CountedFile:
        try:
            file = CountedFile(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
        self._files.append(file)
        return file

    def _read_config(self) -> dict[str, Any]:
        if self.format == "gguf":
            return gguf.huggingface_config(self._header, str(self._files[0].path))
        folder = self.path if self.path.is_dir() else self.path.parent
        if not (folder / "config.json").exists():
            return {}
        return self._read_json(_inside(folder, "config.json", folder))

    def _read_json(self, path: Path, *, flat: bool = False) -> dict[str, Any]:
        file = self._file(path)
        try:
            if file.size > (MAX_HEADER if flat else _MAX_JSON):
                raise CheckpointError(f"{path}: {file.size} bytes of JSON, at most {MAX_HEADER if flat else _MAX_JSON}")
            text = file.read(file.size, 0, "content").decode()
            if file.size > _MAX_JSON:  # the index of a model with very many tensors
                value = dict(flat_records(text, lambda field, problem: CheckpointError(f"{path}: {field}: {problem}"), limit=MAX_HEADER))
            else:
                refuse_deep_nesting(text)
                value = json.loads(text, object_pairs_hook=unique_pairs)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: not valid JSON: {short(str(error))}") from None
        finally:
            file.close()
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: must hold a JSON object")
        return value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that the file system cannot hold
        return False


def _inside(folder: Path, name: str, label: Path) -> Path:
    """`folder/name`, refused when it is a link that leads out of the folder (the hub cache's own blobs are allowed)."""
    path = folder / name
    real, home = path.resolve(), folder.resolve()
    if real.parent == home:
        return path
    # Layout of the hub cache: <repo>/snapshots/<revision>/<name> -> <repo>/blobs/<digest>.
    if home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs":
        return path
    raise CheckpointError(f"{label}: {name}: leads out of the directory, to {real}")


def _refuse_pickle(path: Path) -> None:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise CheckpointError(f"{path}: pickled weights can run code and are not read; "
                              "save the model with save_pretrained, which writes safetensors")


def _spans(unique: np.ndarray) -> list[tuple[int, int]]:
    """Ascending distinct rows -> half-open spans; the smallest gaps are closed while the rows read along stay below _WASTE."""
    if unique.size == 0:
        return []
    gaps = np.diff(unique) - 1
    inner = np.sort(gaps[gaps > 0])
    affordable = int(np.searchsorted(np.cumsum(inner), int(unique.size * _WASTE), side="right"))
    # Gaps strictly below the first one that does not fit are closed: ties are all left open, so the bound holds.
    threshold = int(inner[affordable]) if affordable < inner.size else int(gaps.max(initial=0)) + 1
    cuts = np.flatnonzero((gaps > 0) & (gaps >= threshold))
    starts, stops = np.concatenate([[0], cuts + 1]), np.concatenate([cuts, [unique.size - 1]])
    return [(int(unique[a]), int(unique[b]) + 1) for a, b in zip(starts, stops, strict=True)]


def _span_values(entry: Entry, spans: list[tuple[int, int]], native: torch.dtype | None, target: torch.dtype,
                 field: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """The rows of the spans, one after the other, as `target`. Peak memory: the result (`out` where it fits) and one chunk (or one row)."""
    row_shape = entry.shape[1:]
    row_bytes = entry.nbytes // max(entry.shape[0] if entry.shape else 1, 1)
    shape = (sum(stop - start for start, stop in spans), *row_shape)
    if out is None or out.dtype != target or out.shape != shape or not out.is_contiguous():
        out = torch.empty(shape, dtype=target)
    if not out.numel():
        return out
    if len(spans) > 1:
        for start, stop in spans:
            entry.file.announce(entry.offset + start * row_bytes, (stop - start) * row_bytes)
    direct: Any = out.view(-1).view(torch.uint8).numpy().data if native == target and native != torch.bool else None
    step = max(_CHUNK_BYTES // row_bytes, 1)
    chunk = None if direct is not None else np.empty(min(step, len(out)) * row_bytes, dtype=np.uint8)
    place = 0
    for start, stop in spans:
        if direct is not None:
            length = (stop - start) * row_bytes
            entry.file.read_into(direct[place * row_bytes:place * row_bytes + length], entry.offset + start * row_bytes, field)
            place += stop - start
            continue
        assert chunk is not None
        for row in range(start, stop, step):
            count = min(step, stop - row)
            raw = chunk[:count * row_bytes]
            entry.file.read_into(raw.data, entry.offset + row * row_bytes, field)
            if native is None:
                assert target == torch.float32
                gguf.dequantize(raw, entry.dtype, out[place:place + count].view(-1).numpy())
                place += count
                continue
            if native == torch.bool:
                part = torch.from_numpy(raw != 0)  # a byte other than 0 and 1 must not become a torch.bool as it stands
            else:
                part = torch.from_numpy(raw).view(native)
            out[place:place + count] = part.reshape(count, *row_shape)
            place += count
    return out


def _apply_scale(values: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor, entry: Entry, block: tuple[int, int],
                 label: str) -> torch.Tensor:
    """stored * scale for one scale per tensor, per row, or per block of rows and columns; `ids` are the row numbers of `values`."""
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    rows = entry.shape[0] if entry.shape else 1
    if scale.shape in ((rows,), (rows, 1)) and values.ndim >= 1:
        return values.mul_(scale.reshape(rows)[ids].reshape(-1, *[1] * (values.ndim - 1)))
    if values.ndim == 2 and scale.ndim == 2:
        expected = (-(-rows // block[0]), -(-entry.shape[1] // block[1]))
        if tuple(scale.shape) == expected:
            per_row = scale[ids // block[0]]
            for column in range(expected[1]):
                values[:, column * block[1]:(column + 1) * block[1]].mul_(per_row[:, column:column + 1])
            return values
    raise CheckpointError(f"{label}: scale of shape {tuple(scale.shape)} fits neither the tensor, nor its {rows} rows, "
                          f"nor blocks of {block}")


def _similar(name: str, names: Iterable[str]) -> str:
    tail = name.rsplit(".", 2)[-2:]
    close = next((other for other in names if other.rsplit(".", 2)[-2:] == tail), None)
    return f" (there is {short(close)})" if close else ""
