"""Fuzz the checkpoint readers: no crash, no hang, no over-allocation, nothing but CheckpointError on bad files.

    python tests/fuzz/fuzz_checkpoints.py --minutes 10      coverage-guided when atheris is installed, else structure-aware mutation
    python tests/fuzz/fuzz_checkpoints.py --replay FILE     one input again

An input is one byte that chooses the kind of file (safetensors, GGUF, index, config.json) and the file. Whatever opens is read: every
tensor, rows, slices, configuration. A finding is written to --out and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

try:
    import atheris
except ImportError:
    atheris = None

import numpy as np
import torch  # before the instrumented modules, so that its own code is left alone

if atheris is not None and "--plain" not in sys.argv:
    with atheris.instrument_imports(include=["llmcore.checkpoints", "llmcore.gguf"]):
        from llmcore import checkpoints, gguf
else:
    from llmcore import checkpoints, gguf

KINDS = ("safetensors", "gguf", "index", "config")
MAX_SECONDS = 10.0
# What parsing may take, beyond a constant: headers become Python objects, blocks of 2 bits become float32.
ALLOWED_BYTES = lambda size: 12_000_000 + 100 * size  # noqa: E731
INTERESTING = [0, 1, 2, 7, 8, 31, 32, 33, 255, 256, 65535, 65536, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 62,
               (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8]


class Finding(Exception):
    pass


def execute(data: bytes, folder: Path) -> str:
    """Run one input; the outcome ("read", or the error's field), or Finding."""
    if not data:
        return "empty"
    kind, body = KINDS[data[0] % 4], data[1:]
    if kind == "safetensors":
        path = folder / "model.safetensors"
        path.write_bytes(body)
    elif kind == "gguf":
        path = folder / "model.gguf"
        path.write_bytes(body)
    elif kind == "index":
        path = folder / "model.safetensors.index.json"
        path.write_bytes(body)
    else:
        path = folder / "scaled" / "model.safetensors"
        (folder / "scaled" / "config.json").write_bytes(body)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with checkpoints.CheckpointReader(path) as reader:
            for name in reader.names()[:64]:
                shape, _, _ = reader.shape(name), reader.dtype(name), reader.nbytes(name)
                _try(lambda name=name: reader.read(name))
                if shape:
                    _try(lambda name=name, n=shape[0]: reader.rows(name, [0, n - 1, 0] if n else []))
                    _try(lambda name=name, n=shape[0]: reader.slice(name, n // 2, n))
            _try(lambda: reader.config)
            for name in list(reader.huggingface_names())[:64]:
                _try(lambda name=name: reader.read(name))
                _try(lambda name=name: reader.slice(name, 0, reader.shape(name)[0]) if reader.shape(name) else None)
        outcome = "read"
    except checkpoints.CheckpointError as error:
        if str(folder) not in str(error) or len(str(error)) > 4000:
            raise Finding(f"message does not name the file or is {len(str(error))} long: {str(error)[:300]}") from error
        outcome = re.match(r"\W*(\w*)", str(error).split(": ", 1)[-1])[1]
    except Finding:
        raise
    except BaseException as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    seconds = time.perf_counter() - start
    if peak > ALLOWED_BYTES(len(data)):
        raise Finding(f"{peak} bytes allocated for an input of {len(data)}")
    if seconds > MAX_SECONDS:
        raise Finding(f"{seconds:.1f} s for an input of {len(data)} bytes")
    return outcome


def _try(action) -> None:
    try:
        action()
    except checkpoints.CheckpointError:
        pass
    except ValueError as error:
        if "rows [" not in str(error):
            raise


def seeds(folder: Path) -> list[bytes]:
    """Small valid files of every kind, so that mutation starts beyond the first check."""
    from safetensors.torch import save

    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(4, 6), "h": torch.randn(3).half(), "i": torch.arange(4),
               "b": torch.tensor([True]), "f.weight": torch.randn(4, 4).to(torch.float8_e4m3fn), "f.weight_scale": torch.ones(4, 1),
               "z": torch.zeros(0, 3), "s": torch.tensor(1.0)}
    out = [b"\0" + save({}), b"\0" + save(tensors, metadata={"format": "pt", "a": '{"b"}'})]
    for number, (_, block, size) in gguf.TYPES.items():
        out.append(b"\1" + gguf_file([("w", [block * 2, 2], number, size * 4)],
                                     [("general.architecture", "x"), ("n", 3), ("s", ["a", "bc"])]))
    llama = [("general.architecture", "llama"), ("llama.embedding_length", 4), ("llama.attention.head_count", 2),
             ("llama.block_count", 1), ("llama.attention.head_count_kv", 1), ("llama.feed_forward_length", 8),
             ("llama.context_length", 16), ("general.alignment", 32),
             ("llama.attention.layer_norm_rms_epsilon", 1e-5), ("tokenizer.ggml.tokens", ["a", "b"]),
             ("tokenizer.ggml.token_type", np.array([1, 3]))]
    out.append(b"\1" + gguf_file([("token_embd.weight", [4, 2], 0, 32), ("blk.0.attn_q.weight", [4, 8], 0, 128),
                                  ("blk.0.attn_k.weight", [4, 4], 1, 32)], llama))
    (folder / "shard-a.safetensors").write_bytes(save({"a": torch.ones(2), "b": torch.ones(3)}))
    (folder / "shard-b.safetensors").write_bytes(save({"c": torch.ones(2)}))
    index = {"metadata": {"total_size": 28},
             "weight_map": {"a": "shard-a.safetensors", "b": "shard-a.safetensors", "c": "shard-b.safetensors"}}
    out.append(b"\2" + json.dumps(index).encode())
    (folder / "scaled").mkdir(exist_ok=True)
    (folder / "scaled" / "model.safetensors").write_bytes(
        save({"a.weight": torch.randn(8, 6).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}))
    out.append(b"\3" + json.dumps({"model_type": "llama", "quantization_config": {"weight_block_size": [4, 3]}}).encode())
    return out


def gguf_file(tensors: list[tuple[str, list[int], int, int]], pairs: list[tuple[str, object]]) -> bytes:
    """tensors: (name, dims, type number, bytes of data); offsets are laid out one after the other."""
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    for key, value in pairs:
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(v) for v in value)
        elif isinstance(value, np.ndarray):
            out += struct.pack("<IIQ", 9, 5, value.size) + value.astype("<i4").tobytes()
        elif isinstance(value, float):
            out += struct.pack("<If", 6, value)
        else:
            out += struct.pack("<II", 4, value)
    offset, data = 0, b""
    for name, dims, number, nbytes in tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)
        padded = -(-nbytes // 32) * 32
        data += bytes(random.Random(nbytes).randbytes(padded))
        offset += padded
    return out + bytes(-len(out) % 32) + data


def mutate(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """One to four edits; safetensors and index headers are also edited as JSON with the length field kept right."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        choice = rng.randrange(9)
        if choice == 0 and len(out) > 1:
            out[rng.randrange(len(out))] = rng.randrange(256)
        elif choice == 1 and len(out) > 1:
            del out[rng.randrange(1, len(out)):]
        elif choice == 2:
            out += rng.randbytes(rng.choice([1, 8, 64, 4096]))
        elif choice == 3 and len(out) > 9:
            width = rng.choice([4, 8])
            at = rng.randrange(1, max(len(out) - width, 2))
            out[at:at + width] = (rng.choice(INTERESTING) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif choice == 4 and len(out) > 2:
            a, b = sorted((rng.randrange(1, len(out)), rng.randrange(1, len(out))))
            out[a:a] = out[a:b] * rng.choice([1, 1, 2, 50])
        elif choice == 5 and len(out) > 2:
            a, b = sorted((rng.randrange(1, len(out)), rng.randrange(1, len(out))))
            del out[a:b]
        elif choice == 6:
            other = rng.choice(pool)
            out = bytearray(out[:rng.randrange(1, len(out) + 1)] + other[rng.randrange(len(other)):])
        else:
            out = bytearray(_mutate_json(bytes(out), rng))
    return bytes(out[:200_000])


def _mutate_json(data: bytes, rng: random.Random) -> bytes:
    kind = KINDS[data[0] % 4] if data else "gguf"
    try:
        if kind == "safetensors":
            length = int.from_bytes(data[1:9], "little")
            header, rest = json.loads(data[9:9 + length]), data[9 + length:]
        elif kind in ("index", "config"):
            header, rest = json.loads(data[1:]), b""
        else:
            return data
        _edit(header, rng, 0)
        text = json.dumps(header).encode()
    except (ValueError, RecursionError, TypeError, OverflowError):
        return data
    return data[:1] + (struct.pack("<Q", len(text)) if kind == "safetensors" else b"") + text + rest


def _edit(value, rng: random.Random, depth: int) -> None:
    if depth > 20 or not isinstance(value, (dict, list)) or not value:
        return
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    odd = [rng.choice(INTERESTING), -1, 0.5, None, True, "", "F32", "F4", "BOOL", "C64", "F8_E5M2", "../x.safetensors", [], {}, [[]],
           "shard-b.safetensors", 10**rng.randint(1, 400), [rng.choice(INTERESTING)] * rng.randint(1, 70), "\ud800",
           "x" * rng.choice([1, 5000, 70000])]
    action = rng.randrange(5)
    if action <= 2:
        _edit(value[key], rng, depth + 1)
    if action == 2 and isinstance(value[key], int) and not isinstance(value[key], bool):
        value[key] += rng.choice([-8, -4, -1, 1, 4, 8])
    elif action == 3:
        value[key] = rng.choice(odd)
    elif action == 4 and isinstance(value, dict):
        value[str(rng.choice(odd))] = value.pop(key)
    elif action == 4:
        value.append(rng.choice(odd))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="mutation without coverage feedback, even when atheris is installed")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--out", type=Path, default=Path("fuzz-finding.bin"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    pool = seeds(folder)
    if options.replay:
        print(execute(options.replay.read_bytes(), folder))
        return 0
    # Whatever asks for a gigabyte more than now fails at once instead of swamping the machine.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("hang")))
    rng = random.Random(options.seed)
    state = {"executions": 0, "outcomes": {}, "start": time.monotonic(), "finding": None}

    def one(data: bytes) -> None:
        signal.setitimer(signal.ITIMER_REAL, 3 * MAX_SECONDS)
        try:
            outcome = execute(data, folder)
        except Finding as finding:
            options.out.write_bytes(data)
            state["finding"] = f"{finding} (input in {options.out})"
            report()
            os._exit(1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        state["executions"] += 1
        state["outcomes"][outcome] = state["outcomes"].get(outcome, 0) + 1
        if time.monotonic() - state["start"] > 60 * options.minutes:
            report()
            os._exit(0)

    def report() -> None:
        seconds = time.monotonic() - state["start"]
        engine = "atheris, coverage-guided" if guided else "structure-aware mutation"
        top = dict(sorted(state["outcomes"].items(), key=lambda item: -item[1])[:40])
        print(json.dumps({"engine": engine, "seconds": round(seconds), "executions": state["executions"], "finding": state["finding"],
                          "outcomes": top, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}), flush=True)

    guided = atheris is not None and not options.plain
    for data in pool:
        one(data)
    if not guided:
        corpus = list(pool)
        known = set(state["outcomes"])
        while True:
            data = mutate(rng.choice(corpus), rng, pool)
            one(data)
            if set(state["outcomes"]) != known:  # a field reached for the first time: keep the input to build on
                known = set(state["outcomes"])
                corpus.append(data)
    corpus_folder = folder / "corpus"
    corpus_folder.mkdir()
    for index, data in enumerate(pool):
        (corpus_folder / str(index)).write_bytes(data)

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        local = random.Random(seed)
        return (mutate(data or pool[0], local, pool) if local.random() < 0.5 else atheris.Mutate(data, max_size))[:max_size]

    arguments = [sys.argv[0], str(corpus_folder), f"-max_total_time={int(60 * options.minutes) + 60}", "-max_len=20000",
                 f"-seed={options.seed + 1}", "-rss_limit_mb=4096", "-verbosity=0"]
    atheris.Setup(arguments, one, custom_mutator=custom)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
