"""CheckpointReader: right values from every layout, only the bytes asked for, and errors that name file and field for anything hostile."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from llmcore import gguf
from llmcore.checkpoints import CheckpointError, CheckpointReader, MissingFile, MissingTensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"t.{str(d).removeprefix('torch.')}": (torch.randn(7, 5, generator=generator) * 3).abs().to(d) for d in DTYPES}
    return made | {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "cube": torch.randn(3, 4, 5, generator=generator)}


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and _bytes(a).equal(_bytes(b))


def _sharded(folder, tensors, parts=3):
    names, weight_map = list(tensors), {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        save_file({n: tensors[n] for n in names[part::parts]}, folder / file)
        weight_map |= dict.fromkeys(names[part::parts], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weight_map


def test_every_dtype_single_and_sharded(tmp_path):
    tensors = _tensors()
    (single := tmp_path / "single").mkdir()
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt", "note": 'braces {"in"} text'})
    (shards := tmp_path / "shards").mkdir()
    _sharded(shards, tensors)
    for path in (single, single / "model.safetensors", shards, shards / "model.safetensors.index.json"):
        with CheckpointReader(path, unscaled_fp8="one") as reader:
            assert sorted(reader.names()) == sorted(tensors)
            for name, expected in tensors.items():
                assert reader.shape(name) == tuple(expected.shape)
                assert _same(reader.read(name), expected), name
                if expected.ndim and len(expected):
                    assert _same(reader.rows(name, [2, 0, 2]), torch.stack([expected[2], expected[0], expected[2]])), name
                    assert _same(reader.slice(name, 1, 3), expected[1:3]), name
            assert reader.read("t.bfloat16", dtype=torch.float32).equal(tensors["t.bfloat16"].float())
            assert "cube" in reader
            assert reader.dtype("t.bfloat16") == "BF16"


def test_reads_only_what_is_asked(tmp_path):
    weights = torch.randn(5000, 64)
    save_file({"embed": weights, "other": torch.randn(1000, 1000)}, tmp_path / "model.safetensors")
    ids = torch.randperm(5000)[:700]
    with CheckpointReader(tmp_path) as reader:
        assert reader.bytes_read == reader.header_bytes < 1000
        assert reader.rows("embed", ids).equal(weights[ids])
        used = reader.bytes_read - reader.header_bytes
        assert 700 * 256 <= used <= 700 * 256 * 33 / 32
        before = reader.bytes_read
        reader.rows("embed", np.arange(100, 300))
        reader.slice("embed", 10, 20)
        assert reader.bytes_read - before == 210 * 256
        assert reader.rows("embed", []).shape == (0, 64)


def test_sparse_fifty_gigabytes(tmp_path):
    """A file with a huge head that nobody asks for: opening and reading cost what is read."""
    rows, width = 200_000, 65_536  # 52 GB in float32
    header = {"head": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}
    head = rows * width * 4
    header |= {f"layers.{i}": {"dtype": "F32", "shape": [8, 8], "data_offsets": [head + i * 256, head + (i + 1) * 256]}
               for i in range(3000)}
    raw = json.dumps(header).encode()
    values = torch.randn(8, 8)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + rows * width * 4 + 3000 * 256)
        file.seek(8 + len(raw) + rows * width * 4 + 2999 * 256)
        file.write(values.numpy().tobytes())
    with CheckpointReader(tmp_path) as reader:
        assert reader.read("layers.2999").equal(values)
        assert reader.rows("head", [rows - 1]).abs().sum() == 0
        assert reader.bytes_read == reader.header_bytes + 256 + width * 4


def test_fp8_scales(tmp_path):
    base = torch.randn(300, 200) * 5
    stored = base.to(torch.float8_e4m3fn)
    block, row, one = torch.rand(3, 2) + 0.5, torch.rand(300, 1) + 0.5, torch.tensor(0.37)
    save_file({"a.weight": stored, "a.weight_scale_inv": block, "b.weight": stored.clone(), "b.weight_scale": row,
               "c.weight": stored.clone(), "c.weight_scale": one, "d.weight": stored.clone(), "e.weight": stored.clone(),
               "e.weight_scale": torch.rand(7)},
              tmp_path / "model.safetensors")
    full = {"a.weight": block.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200], "b.weight": row, "c.weight": one}
    ids = [299, 0, 128, 127, 128]
    with CheckpointReader(tmp_path) as reader:
        for name, scale in full.items():
            expected = stored.float() * scale
            assert reader.read(name).equal(expected)
            assert reader.rows(name, ids).equal(expected[ids])
            memory = torch.full((40, 200), torch.nan)
            assert reader.slice(name, 100, 140, out=memory).equal(expected[100:140])
            assert memory.equal(expected[100:140])
            assert reader.slice(name, 0, 39, out=memory).equal(expected[:39])  # another shape: in memory of its own
            assert memory.equal(expected[100:140])
        with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'd.weight': F8_E4M3 weights without a scale"):
            reader.read("d.weight")
        with pytest.raises(CheckpointError, match=r"scale of shape \(7,\) fits neither"):
            reader.read("e.weight")
    with CheckpointReader(tmp_path, unscaled_fp8="one") as reader:
        assert _same(reader.read("d.weight"), stored)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"weight_block_size": [100, 100]}}))
    with CheckpointReader(tmp_path) as reader:
        assert reader.read("a.weight").equal(stored.float() * block.repeat_interleave(100, 0).repeat_interleave(100, 1))


def test_embedded_gguf_by_both_names(smollm2):
    from llmcore.models import _embedded_gguf

    state = smollm2.model.state_dict()
    with CheckpointReader(_embedded_gguf()) as reader:
        assert reader.format == "gguf"
        assert reader.config["num_key_value_heads"] == 3
        assert reader.dtype("blk.0.attn_q.weight") == "Q4_1"
        assert reader.shape("token_embd.weight") == (49152, 576)
        names = reader.huggingface_names()
        assert set(names) == set(state) - {"lm_head.weight"}
        for name in ("model.layers.29.self_attn.q_proj.weight", "model.layers.3.self_attn.k_proj.weight",
                     "model.layers.0.mlp.down_proj.weight"):
            assert reader.read(name).equal(state[name])
            assert reader.rows(name, [5, 190, 33]).equal(state[name][[5, 190, 33]])
            memory = torch.empty(40, state[name].shape[1])
            assert reader.slice(name, 30, 70).equal(state[name][30:70])
            assert reader.slice(name, 30, 70, out=memory).equal(state[name][30:70])
        stored = reader.read("blk.29.attn_q.weight")  # as the file has it: rotary pairs side by side
        assert stored[1].equal(state["model.layers.29.self_attn.q_proj.weight"][32])
        before = reader.bytes_read
        ids = list(range(45000, 45512))
        assert reader.rows("model.embed_tokens.weight", ids).equal(state["model.embed_tokens.weight"][ids])
        assert reader.bytes_read - before == 512 * 612


def test_empty_tensors_with_countless_rows_cost_nothing(tmp_path):
    """A row count is not bounded by the file when rows have no bytes."""
    rows = 1 << 62
    (tmp_path / "model.safetensors").write_bytes(_safetensors({"a": _f32([rows, 0], 0, 0), "b": {"dtype": "F8_E4M3", "shape": [rows, 0],
                                                               "data_offsets": [0, 0]}, "b_scale": _f32([], 0, 4)}, 4))
    with CheckpointReader(tmp_path) as reader:
        for name in "ab":
            assert reader.read(name).shape == (rows, 0)
            assert reader.slice(name, 5, rows).shape == (rows - 5, 0)
            assert reader.rows(name, [rows - 1, 0]).shape == (2, 0)


def test_threads_read_the_same(tmp_path):
    weights = torch.randn(4000, 256)
    save_file({"w": weights}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        results: list[bool] = []
        threads = [threading.Thread(target=lambda: results.append(reader.read("w").equal(weights))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 8
        assert reader.bytes_read == reader.header_bytes + 8 * weights.numel() * 4


def test_wrong_requests(tmp_path):
    save_file({"model.layers.0.q.weight": torch.zeros(4, 4), "scalar": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        with pytest.raises(MissingTensor, match=r"no tensor 'layers.0.q.weight' among 2 \(there is 'model.layers.0.q.weight'\)"):
            reader.read("layers.0.q.weight")
        with pytest.raises(KeyError):
            reader.shape("nothing")
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 4\).* got -1 to 4"):
            reader.rows("model.layers.0.q.weight", [4, -1])
        with pytest.raises(TypeError, match="ids must be a 1-D sequence of integers"):
            reader.rows("model.layers.0.q.weight", [0.5])
        with pytest.raises(ValueError, match="is a scalar"):
            reader.rows("scalar", [0])
        with pytest.raises(ValueError, match=r"rows \[2, 9\)"):
            reader.slice("model.layers.0.q.weight", 2, 9)
        with pytest.raises(TypeError, match="dtype must be"):
            reader.read("scalar", dtype="float32")


def _safetensors(header: object, data: int = 0, *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def _f32(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


HOSTILE = {
    "empty": (b"", "header length: the file has 0 bytes"),
    "length beyond file": (_safetensors({}, length=1 << 20), "header length: 1048576 bytes, at most 2"),
    "length 2**63": (_safetensors({}, length=(1 << 64) - 1), "header length: 18446744073709551615"),
    "not json": (_safetensors(b"hello"), "header: must be a JSON object"),
    "not utf-8": (_safetensors(b'{"\xff":1}'), "header: not UTF-8"),
    "unclosed": (_safetensors(b'{"a":{"dtype":"F32"'), "record at character 5 is not a flat object"),
    "trailing": (_safetensors(b'{"__metadata__":{}}x'), "malformed JSON at character 18"),
    "nested": (_safetensors(b'{"a":' + b'{"x":' * 3 + b"1" + b"}" * 4), "is not a flat object"),
    "deep array": (_safetensors(b'{"a":{"shape":' + b"[" * 9000 + b"]" * 7000 + b"}}"), "malformed JSON|not a flat object"),
    "long name": (_safetensors(b'{"' + b"a" * 70000 + b'":{}}'), "malformed JSON at character 1"),
    "list": (_safetensors([1]), "header: must be a JSON object"),
    "missing key": (_safetensors({"a": {"dtype": "F32", "shape": [1]}}, 4), "tensor 'a': must have dtype, shape and data_offsets"),
    "unknown dtype": (_safetensors({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, 4),
                      "tensor 'a' dtype: 'Q9' is not one of"),
    "negative shape": (_safetensors({"a": _f32([-1], 0, 4)}, 4), "tensor 'a' shape: must be"),
    "boolean shape": (_safetensors({"a": _f32([True], 0, 4)}, 4), "tensor 'a' shape: must be"),
    "float shape": (_safetensors({"a": _f32([1.0], 0, 4)}, 4), "tensor 'a' shape: must be"),
    "huge shape": (_safetensors({"a": _f32([1 << 40, 1 << 40], 0, 4)}, 4), "tensor 'a' shape: .* overflows 64 bits"),
    "large shape": (_safetensors({"a": _f32([1 << 20, 1 << 20], 0, 4)}, 4), "tensor 'a' shape: .* needs 4398046511104 bytes"),
    "overflowing empty shape": (_safetensors({"a": _f32([1 << 32, 1 << 32, 0], 0, 0)}), "tensor 'a' shape: .* overflows 64 bits"),
    "beyond the data": (_safetensors({"a": _f32([2], 0, 8)}, 4),
                        r"tensor 'a' data_offsets: end at 8, the file holds 4 bytes of data \(truncated"),
    "reversed": (_safetensors({"a": _f32([1], 8, 4)}, 8), "tensor 'a' data_offsets: must be two ascending"),
    "overlap": (_safetensors({"a": _f32([2], 0, 8), "b": _f32([2], 4, 12)}, 12),
                "tensor 'b' data_offsets: start at 4, which overlaps tensor 'a'"),
    "hole": (_safetensors({"a": _f32([1], 0, 4), "b": _f32([1], 8, 12)}, 12),
             "tensor 'b' data_offsets: start at 8, which leaves a hole after"),
    "tail": (_safetensors({"a": _f32([1], 0, 4)}, 12), "data: 8 bytes at the end belong to no tensor"),
    "twice": (_safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', 2),
              "tensor 'a': occurs twice"),
    "key twice": (_safetensors(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1), "key 'dtype' occurs twice"),
    "metadata not text": (_safetensors({"__metadata__": {"a": 1}}), "__metadata__: must be an object of strings"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(tmp_path, case):
    raw, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 4_000_000 + 20 * len(raw)
    assert len(str(caught.value)) < 1000


def test_hostile_directories(tmp_path):
    def fresh(name):
        folder = tmp_path / name
        folder.mkdir()
        return folder, _sharded(folder, {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)})

    folder, _ = fresh("missing")
    os.remove(folder / "model-00002-of-00003.safetensors")
    with pytest.raises(MissingFile, match=r"index.json: weight_map: shard 'model-00002-of-00003.safetensors' is missing; it should"):
        CheckpointReader(folder)
    os.remove(folder / "model.safetensors.index.json")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards, model-00002-of-00003.safetensors is missing"):
        CheckpointReader(folder)

    folder, weight_map = fresh("index")
    index = folder / "model.safetensors.index.json"
    for entry, message in ((("a", "../missing/model-00001-of-00003.safetensors"), "in the same directory"),
                           (("a", "/etc/passwd"), "in the same directory"),
                           (("z", "model-00001-of-00003.safetensors"), "tensor 'z': the index says"), (("a", 3), "in the same directory")):
        index.write_text(json.dumps({"weight_map": weight_map | {entry[0]: entry[1]}}))
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(folder)
    # A name that no file system holds, found by fuzzing: it must be an error of ours, not an OSError.
    for bad in ("x" * 5000 + ".safetensors", "a\ud800.safetensors", "a\0.safetensors"):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(CheckpointError, match="weight_map"):
            CheckpointReader(folder)
    for text, message in (("[]", "must hold a JSON object"), ("{", "not valid JSON"),
                          ('{"weight_map": 3}', "weight_map: must be an object"),
                          ("[" * 100_000, "not valid JSON"), ('{"a": 1, "a": 2}', "key 'a' occurs twice")):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            CheckpointReader(folder)

    folder, weight_map = fresh("links")
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / weight_map["a"], outside)
    (folder / weight_map["a"]).symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors: leads out of the directory"):
        CheckpointReader(folder)

    folder, weight_map = fresh("twice")
    save_file({"b": torch.zeros(2)}, folder / weight_map["a"])
    os.remove(folder / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"tensor 'b': also in .*model-00001"):
        CheckpointReader(folder)

    folder, weight_map = fresh("pipe")
    os.remove(folder / weight_map["c"])
    os.mkfifo(folder / weight_map["c"])
    with pytest.raises(CheckpointError, match="not a regular file"):
        CheckpointReader(folder)

    (folder := tmp_path / "pickle").mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: pickled weights can run code"):
        CheckpointReader(folder)
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        CheckpointReader(folder / "pytorch_model.bin")
    (folder := tmp_path / "adapter").mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapter, not a model: give the base model too"):
        CheckpointReader(folder)
    with pytest.raises(FileNotFoundError):
        CheckpointReader(tmp_path / "absent")


def test_hub_cache_links_are_followed(tmp_path):
    (snapshot := tmp_path / "models--a--b" / "snapshots" / "rev").mkdir(parents=True)
    (blobs := tmp_path / "models--a--b" / "blobs").mkdir()
    save_file({"a": torch.ones(3)}, blobs / "digest")
    (snapshot / "model.safetensors").symlink_to("../../blobs/digest")
    with CheckpointReader(snapshot) as reader:
        assert reader.read("a").equal(torch.ones(3))


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    with CheckpointReader(tmp_path) as reader:
        os.truncate(path, 50_000)
        with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'a': truncated"):
            reader.read("a")


def _gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _gguf(tensors, *, pairs=b"", num_pairs=0, data=b"", version=3, num_tensors=None) -> bytes:
    """tensors: (name, dims, type number, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if num_tensors is None else num_tensors, num_pairs) + pairs
    for name, dims, kind, offset in tensors:
        out += _gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + bytes(-len(out) % 32) + data


HOSTILE_GGUF = {
    "magic": (b"GGML" + bytes(40), "magic: not a GGUF file"),
    "version": (_gguf([], version=9), "version: 9 is not supported"),
    "tensor count": (_gguf([], num_tensors=1 << 60), "tensor count: 1152921504606846976 entries cannot fit"),
    "string length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(60),
                      "metadata key 0: 4611686018427387904 bytes long, at most 65535"),
    "array length": (_gguf([], num_pairs=1, pairs=_gguf_string("k") + struct.pack("<IIQ", 9, 0, 1 << 61)),
                     "metadata 'k': needs 2305843009213693952 bytes"),
    "long array": (_gguf([], num_pairs=1, pairs=_gguf_string("k") + struct.pack("<IIQ", 9, 5, 5000) + bytes(100)),
                   "metadata 'k': needs 20000 bytes at offset 49, the file has 160"),
    "strings": (_gguf([], num_pairs=1, pairs=_gguf_string("k") + struct.pack("<IIQ", 9, 8, 1 << 61)),
                "metadata 'k': 2305843009213693952 strings cannot fit"),
    "nested arrays": (_gguf([], num_pairs=1, pairs=_gguf_string("k") + struct.pack("<IIQ", 9, 9, 1)),
                      "metadata 'k': arrays of value type 9"),
    # Found by fuzzing: a key of kilobytes must not come back as a message of kilobytes.
    "long key": (_gguf([], num_pairs=1, pairs=_gguf_string("k" * 9000) + struct.pack("<IQ", 77, 1)), "metadata 'kkk.*: unknown value type"),
    "value type": (_gguf([], num_pairs=1, pairs=_gguf_string("k") + struct.pack("<IQ", 77, 1)), "metadata 'k': unknown value type 77"),
    "key twice": (_gguf([], num_pairs=2, pairs=(_gguf_string("k") + struct.pack("<II", 4, 1)) * 2), "metadata 'k': occurs twice"),
    "alignment": (_gguf([], num_pairs=1, pairs=_gguf_string("general.alignment") + struct.pack("<II", 4, 0)),
                  "'general.alignment': must be a positive"),
    "dimensions": (_gguf([("a", [1] * 5, 0, 0)]), "tensor 'a' dimension count: 5, at most 4"),
    "overflow": (_gguf([("a", [1 << 40, 1 << 40], 0, 0)]), "tensor 'a': dimensions .* overflow 64 bits"),
    "huge": (_gguf([("a", [1 << 20, 1 << 20], 0, 0)]), "tensor 'a': 4398046511104 bytes at 96 end beyond"),
    "type": (_gguf([("a", [256], 16, 0)]), r"tensor 'a' type: IQ2_XXS \(number 16\) cannot be de-quantised"),
    "half block": (_gguf([("a", [33], 8, 0)], data=bytes(64)), "tensor 'a': rows of 33 weights are not whole Q8_0 blocks of 32"),
    "unaligned": (_gguf([("a", [1], 0, 4)], data=bytes(64)), "tensor 'a' offset: 4 is not a multiple of the alignment 32"),
    "overlap": (_gguf([("a", [16], 0, 0), ("b", [16], 0, 32)], data=bytes(96)), "tensor 'b' offset: .* overlaps tensor 'a'"),
    "twice": (_gguf([("a", [8], 0, 0), ("a", [8], 0, 32)], data=bytes(96)), "tensor 'a': occurs twice"),
    "truncated": (_gguf([("a", [64], 0, 0)], data=bytes(64)), "tensor 'a': 256 bytes at 64 end beyond the file's 128 bytes"),
}


@pytest.mark.parametrize("case", HOSTILE_GGUF)
def test_hostile_gguf(tmp_path, case):
    raw, message = HOSTILE_GGUF[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 4_000_000 + 20 * len(raw)
    assert len(str(caught.value)) < 1000


def test_long_arrays_of_gguf_metadata_stay_in_the_file(tmp_path):
    """A vocabulary has an int32 kind and a float32 score for each token: passed over, read when asked for, where they lie."""
    kinds = np.arange(30_000, dtype="<i4")
    texts = [f"token {i} é" for i in range(5_000)]
    pairs = _gguf_string("kinds") + struct.pack("<IIQ", 9, 5, len(kinds)) + kinds.tobytes()
    pairs += _gguf_string("texts") + struct.pack("<IIQ", 9, 8, len(texts)) + b"".join(map(_gguf_string, texts))
    path = tmp_path / "m.gguf"
    path.write_bytes(_gguf([("w", [8], 0, 0)], num_pairs=2, pairs=pairs, data=bytes(32)))
    with CheckpointReader(path) as reader:
        assert reader.metadata["texts"] == texts
        assert reader.header_bytes < len(pairs) - kinds.nbytes + 40_000  # two windows past what was needed
        assert np.array_equal(np.asarray(reader.metadata["kinds"]), kinds)
        assert reader.bytes_read == reader.header_bytes + kinds.nbytes


@pytest.mark.parametrize("cut", [gguf._cut_strings, pytest.param(getattr(gguf._native(), "gguf_strings", None), id="compiled")])
def test_strings_are_cut_out_of_a_window(cut):
    if cut is None:
        pytest.skip("llmcore._native was not built")
    window = bytearray(b"".join(map(_gguf_string, ["a", "", "ü" * 300, "b"])))
    assert cut(window, 0, 9) == (["a", "", "ü" * 300, "b"], len(window))
    assert cut(window, 9, 2) == (["", "ü" * 300], len(window) - 9)
    for end in range(len(window) - 8, len(window)):  # the last one is not whole: neither its length nor its byte may be read
        assert cut(window[:end], 17, 9) == (["ü" * 300], len(window) - 9)
    assert cut(window, len(window) + 5, 1) == ([], len(window) + 5)
    assert cut(struct.pack("<Q", (1 << 64) - 8) + bytes(32), 0, 1) == ([], 0)
    with pytest.raises(UnicodeDecodeError):
        cut(bytearray(_gguf_string(b"\xff")), 0, 1)


QUANTISED = sorted(gguf._NUMPY)


def _blocks(type_name: str, rows: int, seed: int) -> np.ndarray:
    """Random bytes: every bit pattern of a block is valid, scales that are inf or NaN included."""
    return np.random.default_rng(seed).integers(0, 256, rows * gguf.BLOCKS[type_name][1], dtype=np.uint8)


def test_compiled_blocks_are_used_where_they_were_built():
    if gguf._native() is None:
        pytest.skip("llmcore._native was not built")
    raw, out = _blocks("Q4_K", 2, seed=0), np.empty(512, dtype=np.float32)
    gguf._native().gguf_dequantize(raw, "Q4_K", out)
    assert np.array_equal(out, gguf.dequantize_numpy(raw, "Q4_K"), equal_nan=True)
    with pytest.raises(ValueError, match="raw must be 1-D and whole Q4_K blocks of 144 bytes, got 287"):
        gguf._native().gguf_dequantize(raw[:-1], "Q4_K", out)
    with pytest.raises(ValueError, match="out must be 1-D float32 with 512 elements, got 511"):
        gguf._native().gguf_dequantize(raw, "Q4_K", out[:-1])
    with pytest.raises(ValueError, match="type_name F32 is not a block format"):
        gguf._native().gguf_dequantize(raw, "F32", out)


@pytest.mark.parametrize("type_name", QUANTISED)
def test_blocks_equal_the_gguf_package_bit_for_bit(type_name):
    theirs = pytest.importorskip("gguf", reason="the independent de-quantiser")
    raw = _blocks(type_name, 37, seed=3)
    with np.errstate(all="ignore"):
        expected = theirs.dequantize(raw.reshape(1, -1), theirs.GGMLQuantizationType[type_name]).reshape(-1)
    for ours in (gguf.dequantize_numpy(raw, type_name), gguf.dequantize(raw, type_name)):
        assert ours.dtype == np.float32
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(ours), nan)
        assert np.array_equal(ours[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert nan.sum() < expected.size / 2


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_K", "F16", "BF16", "F32", "I16"])
def test_gguf_file_of_each_kind(tmp_path, type_name):
    block, size = gguf.BLOCKS[type_name]
    number = next(k for k, v in gguf.TYPES.items() if v[0] == type_name)
    raw = _blocks(type_name, 6, seed=1)
    (tmp_path / "m.gguf").write_bytes(_gguf([("w", [block * 2, 3], number, 0)], data=raw.tobytes()))
    with CheckpointReader(tmp_path / "m.gguf") as reader:
        assert (reader.shape("w"), reader.dtype("w"), reader.nbytes("w")) == ((3, block * 2), type_name, 6 * size)
        whole = reader.read("w")
        assert np.array_equal(whole.float().numpy().reshape(-1), gguf.dequantize_numpy(raw, type_name), equal_nan=True)
        assert _same(reader.rows("w", [2, 0]), whole[[2, 0]])
        assert reader.huggingface_names() == {}


@settings(max_examples=150)
@given(st.data())
def test_damaged_files_never_do_worse_than_an_error(data):
    """Short form of tests/fuzz/fuzz_checkpoints.py: bytes of a valid file replaced, cut or doubled give a value or a CheckpointError."""
    with tempfile.TemporaryDirectory() as folder:
        is_gguf = data.draw(st.booleans())
        path = Path(folder) / ("m.gguf" if is_gguf else "m.safetensors")
        if is_gguf:
            raw = bytearray(_gguf([("w", [64, 2], 2, 0), ("v", [8], 0, 96)], data=bytes(128)))
        else:
            raw = bytearray(save({"w": torch.ones(4, 6), "f.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
                                  "f.weight_scale": torch.ones(2)}))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(raw) - 1))
            match data.draw(st.sampled_from(["byte", "word", "cut", "double"])):
                case "byte":
                    raw[at] = data.draw(st.integers(0, 255))
                case "word":
                    word = data.draw(st.sampled_from([0, 1, 255, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]))
                    raw[at:at + 8] = word.to_bytes(8, "little")
                case "cut":
                    del raw[max(at, 1):]
                case "double":
                    raw[at:at] = raw[at:at + 64]
        path.write_bytes(raw)
        message = str(path)
        try:
            with CheckpointReader(path) as reader:
                for name in reader.names():
                    with contextlib.suppress(CheckpointError):
                        assert reader.read(name).shape == reader.shape(name)
        except CheckpointError as error:
            message = str(error)
        assert str(path) in message


def test_a_reader_left_open_at_exit_says_nothing(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    code = f"from llmcore.checkpoints import CheckpointReader; r = CheckpointReader({str(tmp_path)!r}); print(r.names())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (run.stdout, run.stderr) == ("['a']\n", "")
