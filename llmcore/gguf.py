"""GGUF files: header parsing that trusts nothing, tensor names, and block de-quantisation.

A GGUF file is a header (metadata pairs, then one record per tensor: name, dimensions, type, offset) followed by aligned tensor data.
Quantised types store rows of blocks: 32 or 256 weights share one or more half-precision scales. `dequantize` turns raw blocks into
float32, in the compiled module when it is there and with NumPy otherwise; both round after every operation (no fused multiply-add), so
they agree bit for bit with each other and with the format's reference.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from typing import Any

import numpy as np

from llmcore.files import CheckpointError, CountedFile, short

# type number -> (name, weights per block, bytes per block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}
BLOCKS = {name: (weights, size) for name, weights, size in TYPES.values()}
# Known types whose codebooks are not built in: refused by name, never misread.
UNSUPPORTED = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M",
               34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WIDTHS = {code: struct.calcsize("<" + code) for code in _SCALARS.values()}
_U64 = struct.Struct("<Q")
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 65535


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor record: row-major shape (the file stores it reversed), block type, absolute byte range."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class StoredArray:
    """A long numeric array of the metadata that stays in the file until `numpy.asarray` asks for it; the file must be open then."""

    def __init__(self, file: CountedFile, offset: int, count: int, dtype: np.dtype, field: str):
        self._file, self._offset, self._count, self._dtype, self._field = file, offset, count, dtype, field

    def __len__(self) -> int:
        return self._count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raw = self._file.read(self._count * self._dtype.itemsize, self._offset, self._field)
        found = np.frombuffer(raw, dtype=self._dtype)
        return found if dtype is None else found.astype(dtype)


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Metadata (numeric arrays as NumPy arrays, long ones as StoredArray, string arrays as lists), tensors by name, bytes of the header."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    nbytes: int


class _Cursor:
    """Reads little-endian values through a window; every length is checked against what is left before memory is taken."""

    WINDOW = 1 << 14  # what is read past the header is for nothing
    LONG = 1 << 14  # bytes of a numeric array beyond which it is passed over: kinds and scores of a vocabulary are not always needed

    def __init__(self, file: CountedFile):
        self.file, self.size, self.position = file, file.size, 0
        self.window, self.start = bytearray(), 0

    def fail(self, field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {field}: {problem}")

    def take(self, count: int, field: str) -> bytearray:
        if count > self.size - self.position:
            raise self.fail(field, f"needs {count} bytes at offset {self.position}, the file has {self.size}")
        begin = self.position - self.start
        if begin + count > len(self.window):
            rest = self.window[begin:]
            offset = self.position + len(rest)
            length = min(max(count - len(rest), self.WINDOW), self.size - offset)
            self.window, self.start, begin = rest + self.file.read(length, offset, field), self.position, 0
        self.position += count
        return self.window[begin:begin + count]

    def scalar(self, code: str, field: str) -> Any:
        return struct.unpack("<" + code, self.take(_WIDTHS[code], field))[0]

    def string(self, field: str, limit: int | None = None) -> str:
        length = _U64.unpack(self.take(8, field))[0]
        if limit is not None and length > limit:
            raise self.fail(field, f"{length} bytes long, at most {limit}")
        raw = self.take(length, field)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.fail(field, "not UTF-8") from None

    def strings(self, count: int, field: str) -> list[str]:
        """A vocabulary is 50,000 of them: those that lie whole in the window are cut out of it, the others go through `string`."""
        native = _native()
        cut = native.gguf_strings if native is not None else _cut_strings
        found: list[str] = []
        while len(found) < count:
            try:
                whole, at = cut(self.window, self.position - self.start, count - len(found))
            except UnicodeDecodeError:
                raise self.fail(field, "not UTF-8") from None
            found += whole
            self.position = self.start + at
            if len(found) < count:
                found.append(self.string(field))
        return found

    def value(self, kind: int, field: str) -> Any:
        if kind == 8:
            return self.string(field)
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], field)
        if kind != 9:
            raise self.fail(field, f"unknown value type {kind}")
        inner, count = self.scalar("I", f"{field} element type"), self.scalar("Q", f"{field} length")
        if inner == 8:
            if count > (self.size - self.position) // 8:
                raise self.fail(field, f"{count} strings cannot fit in the remaining {self.size - self.position} bytes")
            return self.strings(count, field)
        if inner not in _SCALARS:
            raise self.fail(field, f"arrays of value type {inner} are not supported")
        item = np.dtype("<" + _SCALARS[inner])
        if count * item.itemsize <= self.LONG:
            return np.frombuffer(self.take(count * item.itemsize, field), dtype=item)
        if count * item.itemsize > self.size - self.position:
            raise self.fail(field, f"needs {count * item.itemsize} bytes at offset {self.position}, the file has {self.size}")
        self.position += count * item.itemsize
        return StoredArray(self.file, self.position - count * item.itemsize, count, item, field)


def _cut_strings(window: bytearray, at: int, count: int) -> tuple[list[str], int]:
    """The whole strings of window[at:], at most `count`, and the place behind them; compiled as `llmcore._native.gguf_strings`."""
    found: list[str] = []
    while len(found) < count and at + 8 <= len(window):
        stop = at + 8 + _U64.unpack_from(window, at)[0]
        if stop > len(window):
            break
        found.append(window[at + 8:stop].decode())
        at = stop
    return found, at


def read_header(file: CountedFile) -> GGUFHeader:
    """Parse the header of a GGUF file. CheckpointError names the file and the field that is wrong."""
    cursor, size = _Cursor(file), file.size
    if cursor.take(4, "magic") != b"GGUF":
        raise cursor.fail("magic", "not a GGUF file")
    version = cursor.scalar("I", "version")
    if version not in (2, 3):
        raise cursor.fail("version", f"{version} is not supported (2 and 3 are; big-endian files are not)")
    num_tensors, num_pairs = cursor.scalar("Q", "tensor count"), cursor.scalar("Q", "metadata count")
    # A tensor record takes at least 8 (name length) + 4 (dimension count) + 4 (type) + 8 (offset) bytes, a pair at least 8 + 4 + 1.
    for field, count, least in (("tensor count", num_tensors, 24), ("metadata count", num_pairs, 13)):
        if count > size // least:
            raise cursor.fail(field, f"{count} entries cannot fit in a file of {size} bytes")
    metadata: dict[str, Any] = {}
    for index in range(num_pairs):
        key = cursor.string(f"metadata key {index}", _MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"metadata {short(key)}", "occurs twice")
        metadata[key] = cursor.value(cursor.scalar("I", f"metadata {short(key)} type"), f"metadata {short(key)}")
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment <= 0 or alignment % 8:
        raise cursor.fail("metadata 'general.alignment'", f"must be a positive multiple of 8, got {short(alignment)}")

    records: dict[str, tuple[list[int], int, int]] = {}
    for index in range(num_tensors):
        name = cursor.string(f"tensor name {index}", _MAX_NAME_BYTES)
        if name in records:
            raise cursor.fail(f"tensor {short(name)}", "occurs twice")
        num_dims = cursor.scalar("I", f"tensor {short(name)} dimension count")
        if num_dims > _MAX_DIMENSIONS:
            raise cursor.fail(f"tensor {short(name)} dimension count", f"{num_dims}, at most {_MAX_DIMENSIONS}")
        dims = [cursor.scalar("Q", f"tensor {short(name)} dimension {axis}") for axis in range(num_dims)]
        records[name] = dims, cursor.scalar("I", f"tensor {short(name)} type"), cursor.scalar("Q", f"tensor {short(name)} offset")
    data_start = -(-cursor.position // alignment) * alignment

    tensors: dict[str, GGUFTensor] = {}
    for name, (dims, kind, offset) in records.items():
        if kind not in TYPES:
            raise cursor.fail(f"tensor {short(name)} type", f"{UNSUPPORTED.get(kind, 'unknown')} (number {kind}) cannot be de-quantised "
                              f"here; supported: {', '.join(BLOCKS)}")
        type_name, block, block_bytes = TYPES[kind]
        if (dims[0] if dims else 1) % block:
            raise cursor.fail(f"tensor {short(name)}",
                              f"rows of {dims[0] if dims else 1} weights are not whole {type_name} blocks of {block}")
        if math.prod(max(dim, 1) for dim in dims) >= 1 << 63:
            raise cursor.fail(f"tensor {short(name)}", f"dimensions {dims} overflow 64 bits")
        nbytes = math.prod(dims) // block * block_bytes
        if offset % alignment:
            raise cursor.fail(f"tensor {short(name)} offset", f"{offset} is not a multiple of the alignment {alignment}")
        if data_start + offset + nbytes > size:
            raise cursor.fail(f"tensor {short(name)}",
                              f"{nbytes} bytes at {data_start + offset} end beyond the file's {size} bytes")
        tensors[name] = GGUFTensor(name, type_name, tuple(reversed(dims)), data_start + offset, nbytes)
    end, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.nbytes and tensor.offset < end:
            raise cursor.fail(f"tensor {short(tensor.name)} offset", f"{tensor.offset} overlaps tensor {short(last)}, which ends at {end}")
        if tensor.nbytes:
            end, last = tensor.offset + tensor.nbytes, tensor.name
    return GGUFHeader(metadata, tensors, cursor.position)


# Block de-quantisation with NumPy. Each function takes blocks (n, bytes per block) uint8 and returns (n, weights per block) float32.
# Low nibbles hold the first half of a group, high nibbles the second half.

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def _half(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, start:start + 2]).view(np.float16).astype(np.float32)


def _nibbles(raw: np.ndarray, half: int) -> np.ndarray:
    """(n, bytes) -> (n, 2 bytes): groups of `half` bytes give `half` low nibbles, then `half` high ones."""
    groups = raw.reshape(len(raw), -1, 1, half)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(raw), -1)


def _bit_planes(raw: np.ndarray, group: int, bits: int) -> np.ndarray:
    """(n, bytes) -> (n, bytes * 8 / bits): plane j of a group of `group` bytes holds bits [j * bits, (j + 1) * bits) of each byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return ((raw.reshape(len(raw), -1, 1, group) >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _fifth_bits(raw: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * (_nibbles(b[:, 2:], 16).astype(np.int8) - np.int8(8)).astype(np.float32)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * _nibbles(b[:, 4:], 16).astype(np.float32) + _half(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * ((_nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])).astype(np.int8) - np.int8(16)).astype(np.float32)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * (_nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])).astype(np.float32) + _half(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _half(b, 0) * _IQ4_VALUES[_nibbles(b[:, 2:], 16)]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    high = np.ascontiguousarray(b[:, 2:4]).view("<u2")
    low = _nibbles_in_order(b[:, 4:8])
    scales = (low | (((high >> np.arange(0, 16, 2, dtype=np.uint16)) & 3) << 4).astype(np.uint8)).astype(np.int16) - 32
    d = _half(b, 0) * scales.astype(np.float32)
    return (d[:, :, None] * _IQ4_VALUES[_nibbles(b[:, 8:], 16)].reshape(len(b), 8, 32)).reshape(len(b), 256)


def _nibbles_in_order(raw: np.ndarray) -> np.ndarray:
    """Low nibble, then high nibble, of each byte in turn."""
    return np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), -1)


def _k_scales(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The twelve bytes of Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima."""
    d, m, md = raw[:, 0:4], raw[:, 4:8], raw[:, 8:12]
    scale = np.concatenate([d & 63, (md & 15) | ((d >> 2) & 48)], axis=1)
    minimum = np.concatenate([m & 63, (md >> 4) | ((m >> 2) & 48)], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _q2_k(b: np.ndarray) -> np.ndarray:
    scales = b[:, :16]
    d = _half(b, 80) * (scales & 15).astype(np.float32)
    m = _half(b, 82) * (scales >> 4).astype(np.float32)
    q = _bit_planes(b[:, 16:80], 32, 2).reshape(len(b), 16, 16).astype(np.float32)
    return (d[:, :, None] * q - m[:, :, None]).reshape(len(b), 256)


def _q3_k(b: np.ndarray) -> np.ndarray:
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = _bit_planes(packed[:, 8:], 4, 2)
    d = _half(b, 108) * ((low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)).astype(np.float32)
    # The high bit is stored inverted: set means "do not subtract 4".
    q = _bit_planes(b[:, 32:96], 32, 2).astype(np.int8) - ((_bit_planes(b[:, :32], 32, 1) ^ 1) << 2).astype(np.int8)
    return (d[:, :, None] * q.reshape(len(b), 16, 16).astype(np.float32)).reshape(len(b), 256)


def _q4_k(b: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(b[:, 4:16])
    q = _nibbles(b[:, 16:], 32).reshape(len(b), 8, 32).astype(np.float32)
    return ((_half(b, 0) * scale)[:, :, None] * q - (_half(b, 2) * minimum)[:, :, None]).reshape(len(b), 256)


def _q5_k(b: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(b[:, 4:16])
    q = (_nibbles(b[:, 48:], 32) | (_bit_planes(b[:, 16:48], 32, 1) << np.uint8(4))).reshape(len(b), 8, 32).astype(np.float32)
    return ((_half(b, 0) * scale)[:, :, None] * q - (_half(b, 2) * minimum)[:, :, None]).reshape(len(b), 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    q = (_nibbles(b[:, :128], 64) | (_bit_planes(b[:, 128:192], 32, 2) << np.uint8(4))).astype(np.int8) - np.int8(32)
    d = _half(b, 208) * np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (d[:, :, None] * q.reshape(len(b), 16, 16).astype(np.float32)).reshape(len(b), 256)


_NUMPY = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
          "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs}
_CHUNK_WEIGHTS = 1 << 20  # NumPy temporaries stay below about 16 MB whatever the tensor


def dequantize_numpy(raw: np.ndarray, type_name: str) -> np.ndarray:
    """Raw blocks (bytes,) uint8 of one GGUF type to float32 (weights,), with NumPy alone."""
    block, size = _check_blocks(raw, type_name)
    if type_name == "F32":
        return raw.view("<f4").astype(np.float32)
    if type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type_name not in _NUMPY:
        return raw.view({"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}[type_name]).astype(np.float32)
    blocks = raw.reshape(-1, size)
    out = np.empty((len(blocks), block), dtype=np.float32)
    step = _CHUNK_WEIGHTS // block
    with np.errstate(invalid="ignore", over="ignore"):  # scales that are inf or NaN in the file come out as such
        for start in range(0, len(blocks), step):
            out[start:start + step] = _NUMPY[type_name](blocks[start:start + step])
    return out.reshape(-1)


def dequantize(raw: np.ndarray, type_name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Raw blocks (bytes,) uint8 of one GGUF type to float32 (weights,), into `out` when given.

    Compiled when `llmcore._native` is there, NumPy otherwise; the results are the same bit for bit.
    """
    block, size = _check_blocks(raw, type_name)
    if out is None:
        out = np.empty(raw.size // size * block, dtype=np.float32)
    native = _native()
    if native is not None and type_name in _NUMPY:
        native.gguf_dequantize(np.ascontiguousarray(raw), type_name, out)
    else:
        out[:] = dequantize_numpy(raw, type_name)
    return out


def _check_blocks(raw: np.ndarray, type_name: str) -> tuple[int, int]:
    if type_name not in BLOCKS:
        raise ValueError(f"type_name must be one of {', '.join(BLOCKS)}, got {type_name!r}")
    block, size = BLOCKS[type_name]
    if raw.dtype != np.uint8 or raw.ndim != 1 or raw.size % size:
        raise ValueError(f"raw must be 1-D uint8 and whole {type_name} blocks of {size} bytes, got {raw.dtype} of shape {raw.shape}")
    return block, size


@functools.cache
def _native() -> Any:
    """The compiled module, None when it was not built."""
    import torch  # noqa: F401  the compiled modules find their libraries through it

    try:
        from llmcore import _native as module  # type: ignore[attr-defined]
    except ImportError:
        return None
    return module if hasattr(module, "gguf_strings") else None  # an older build lacks it


# From GGUF names to Hugging Face names.
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # verified against transformers' own loading; anything else is refused by name
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
_LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
          "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
          "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def huggingface_name(name: str) -> str | None:
    """Hugging Face name of a tensor of a llama-like GGUF file, None for a name outside the vocabulary."""
    if name in _TOP:
        return _TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in _LAYER and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return None


def interleaved_heads(architecture: str, name: str, config: dict[str, Any]) -> int:
    """Number of heads whose rows this tensor stores rotary-interleaved (0: rows are in Hugging Face order).

    llama files keep row 2j + i of a head where Hugging Face keeps row i * head_dim / 2 + j (i = 0, 1), for queries and keys alike.
    """
    if architecture != "llama" or (".attn_q." not in name and ".attn_k." not in name):
        return 0
    return config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]


def huggingface_rows(rows: np.ndarray, num_rows: int, num_heads: int) -> np.ndarray:
    """Rows of the stored tensor that hold the given Hugging Face rows of a head-interleaved tensor with `num_rows` rows."""
    head_dim = num_rows // num_heads
    head, inner = rows // head_dim, rows % head_dim
    return head * head_dim + 2 * (inner % (head_dim // 2)) + inner // (head_dim // 2)


def huggingface_config(header: GGUFHeader, label: str) -> dict[str, Any]:
    """The `config.json` of a GGUF file of a supported architecture. CheckpointError names the metadata that is missing or odd."""
    meta = header.metadata
    architecture = meta.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"{label}: metadata 'general.architecture': {short(architecture)} is not supported, "
                         f"{', '.join(ARCHITECTURES)} are; save the model as safetensors and pass that directory")

    def get(key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        value: Any = meta.get(f"{architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or not 0 < value < 1 << 62:
            raise CheckpointError(f"{label}: metadata '{architecture}.{key}': expected a positive {kind.__name__}, got {short(value)}")
        # Single-precision metadata such as 9.999999747378752e-06 is written as the number it stands for, 1e-05.
        return float(str(np.float32(value))) if kind is float else value

    if meta.get(f"{architecture}.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in header.tensors:
        raise CheckpointError(f"{label}: metadata '{architecture}.rope.scaling.type': scaled rotary positions are not supported")
    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{label}: tensor 'token_embd.weight' is missing")
    if len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        raise CheckpointError(f"{label}: tensor 'token_embd.weight': shape {embedding.shape} does not end in embedding_length {hidden}")
    head_dim = get("attention.key_length", int, max(hidden // heads, 1))
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[architecture]],
        "model_type": architecture, "hidden_size": hidden, "num_hidden_layers": get("block_count", int), "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads), "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length", int), "vocab_size": embedding.shape[0],
        "max_position_embeddings": get("context_length", int), "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": get("rope.freq_base", float, 10000.0), "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in header.tensors,
    }
    for key, source in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("pad_token_id", "padding_token_id")):
        if isinstance(value := meta.get(f"tokenizer.ggml.{source}"), int):
            config[key] = value
    return config
