"""HuRef beside the published way, the three algorithms of the invariant sums, an index of 10,000 sketches, checkpoints larger than memory.

    python bench/bench_huref.py compare|planner|index|large|formats|rewrites [--save]

compare    SmolLM2 against a disguised copy at K = 512, 2048, 4096. The published way loads both models in float32 with transformers, forms
           the K x K matrix of each of the six channels in the published order (heads expanded, correctly interleaved), standardises it
           and takes the cosine. Each run is a process of its own with warm file caches, the ways in turn; seconds leave imports out,
           and of the published way the token list, which it is given; ours reads both tokenizers and aligns them. Peak is the whole
           process (VmHWM). Ours computes the paper's six channels and, in a second row, the hardened six with them.
planner    invariant_sums by factor, stream and direct at channel shapes of SmolLM2 and Llama-3-8B; the planner's choice against the best.
index      one query of 10,000 stored sketches; error of the estimated correlations at b = 1024.
large      sparse files shaped like Llama-2-70B and Llama-3.1-405B (real headers, weights are holes: zeros of full cost) fingerprinted at
           K = 512 under --max-memory, against the bytes and the arithmetic that this requires at the machine's own rates.
formats    `llmcore huref compare`: the embedded model against itself and against copies of it, by wall time with start-up.
rewrites   every rewrite of the whole embedded model on disk: change of the logits, parameter cosine, scores and channels at K = 256.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]

import harness  # noqa: E402
import torch  # noqa: E402

SIZES = (512, 2048, 4096)
# channel, R of either side
CHANNELS = {"SmolLM2 qk, vo": 192, "SmolLM2 ff": 576, "Llama-3-8B qk, vo": 1024, "Llama-3-8B ff": 4096}
WAYS = ("published", "llmcore", "llmcore, both variants")
LARGE = {
    "Llama-2-70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
                    "intermediate_size": 28672, "vocab_size": 32000},
    "Llama-3.1-405B": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
                       "intermediate_size": 53248, "vocab_size": 128256},
}  # fmt: skip


def published(a: Path, b: Path, ids: list[int]) -> float:
    """Both models whole in float32, K x K for every channel, standardised, one cosine."""
    from transformers import AutoModelForCausalLM

    features = []
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (a, b)]
    for path, model in zip((a, b), models, strict=True):
        state = model.state_dict()
        config = json.loads((path / "config.json").read_text())
        repeat, dim = config["num_attention_heads"] // config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
        x = state["model.embed_tokens.weight"][ids]
        channels = []
        for layer in (config["num_hidden_layers"] - 2, config["num_hidden_layers"] - 1):
            w = {n: state[f"model.layers.{layer}.{n}.weight"] for n in (
                *(f"self_attn.{s}_proj" for s in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}
            expand = [w[f"self_attn.{s}_proj"].view(-1, dim, x.shape[1]).repeat_interleave(repeat, 0).flatten(0, 1) for s in "kv"]
            channels += [x @ w["self_attn.q_proj"].T @ expand[0] @ x.T, x @ expand[1].T @ w["self_attn.o_proj"].T @ x.T,
                         x @ (w["mlp.gate_proj"] * w["mlp.up_proj"]).T @ w["mlp.down_proj"].T @ x.T]
        stacked = torch.stack(channels)
        for m in stacked:
            m.copy_((m - m.mean()) / m.std())
        features.append(stacked.flatten())
    return float(torch.nn.functional.cosine_similarity(features[0], features[1], dim=0))


def _token_ids(path: Path, count: int) -> list[int]:
    from llmcore.methods.huref.opening import open_model, resolve_tokens

    with open_model(path) as model:
        return list(resolve_tokens(None, model).last(count).ids)


def run_way(way: str, a: Path, b: Path, num_tokens: int) -> dict[str, Any]:
    """One comparison inside a process of its own (called with `_way` on the command line): seconds, peak bytes, score."""
    from llmcore.methods import huref

    ids = None
    if way == "published":
        from transformers import AutoModelForCausalLM  # noqa: F401  its import is outside the time, as ours is

        ids = _token_ids(a, num_tokens)
    begin = time.perf_counter()
    if way == "published":
        assert ids is not None
        score = published(a, b, ids)
    else:
        score = huref.compare(a, b, K=num_tokens, terms="paper" if way == "llmcore" else ("paper", "hardened")).ics
    return {"seconds": time.perf_counter() - begin, "peak_bytes": harness._status("VmHWM"), "score": score}


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def bench_compare(rounds: int) -> dict[str, Any]:
    from llmcore.methods.huref import attacks

    from llmcore.models import embedded_path

    base = embedded_path()
    shapes = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        attacks.apply(base, copy, ["all"], seed=0)
        for num_tokens in SIZES:
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for turn in range(rounds + 1):  # the first round warms the file cache
                for way in WAYS:
                    found = json.loads(_python(__file__, "_way", way, str(base), str(copy), str(num_tokens)))
                    # The float32 cosine of 100 million entries is itself off by 2 % at K = 4096 (1.023, beyond what a cosine can be).
                    if abs(found["score"] - 1) > (5e-2 if way == "published" else 1e-6):
                        raise RuntimeError(f"{way}: score {found['score']} of a disguised copy; no times for a wrong result")
                    if turn:
                        runs[way].append(found)
            rows = {way: {"seconds": statistics.median(r["seconds"] for r in found), "seconds_all": [r["seconds"] for r in found],
                          "peak_bytes": max(r["peak_bytes"] for r in found), "score": found[0]["score"]} for way, found in runs.items()}
            shapes.append({"K": num_tokens, "rows": rows,
                           "speed_up": rows["published"]["seconds"] / rows["llmcore"]["seconds"],
                           "memory_ratio": rows["published"]["peak_bytes"] / rows["llmcore"]["peak_bytes"]})
            print(num_tokens, rows, flush=True)
    return {"shapes": shapes, "rounds": rounds}


def bench_planner(rounds: int) -> dict[str, Any]:
    from llmcore.kernels.invariants import ALGORITHMS, invariant_sums, measure_rates, plan_sums

    rates = measure_rates()
    shapes = []
    cases = [(k, name, r, r) for name, r in CHANNELS.items() for k in SIZES if not (r == 4096 and k == 4096)]
    cases += [(2048, "SmolLM2 against Llama-3-8B qk, vo", 192, 1024), (512, "SmolLM2 against Llama-3-8B ff", 576, 4096)]
    for num_tokens, name, depth_a, depth_b in cases:
        generator = torch.Generator().manual_seed(num_tokens)
        pair = [torch.randn(num_tokens, d, generator=generator) for d in (depth_a, depth_a, depth_b, depth_b)]
        values = {how: invariant_sums(*pair, algorithm=how).correlation() for how in ALGORITHMS}
        if max(values.values()) - min(values.values()) > 1e-6:
            raise RuntimeError(f"{name} K = {num_tokens}: {values}; no times for results that differ")
        steps = {how: functools.partial(invariant_sums, *pair, algorithm=how) for how in ALGORITHMS}
        rows = harness.interleaved(steps, rounds=rounds, slow_rounds=2)
        best = min(row["median_ms"] for row in rows.values())
        entry = {"K": num_tokens, "channel": name, "depths": [depth_a, depth_b], "rows": rows,
                 "largest_difference": max(values.values()) - min(values.values())}
        for label, given in (("measured", rates), ("table", None)):
            plan = plan_sums(num_tokens, depth_a, depth_b, rates=given)
            entry[label] = {"choice": plan.algorithm, "over_best": rows[plan.algorithm]["median_ms"] / best,
                            "estimate_ms": {how: 1e3 * s for how, s in plan.seconds.items()}}
        shapes.append(entry)
        print(num_tokens, name, {how: round(row["median_ms"], 2) for how, row in rows.items()}, entry["measured"], flush=True)
    return {"shapes": shapes, "rates": rates}


def bench_index(count: int, rounds: int) -> dict[str, Any]:
    from llmcore.kernels.invariants import tensor_sketch
    from llmcore.methods import huref
    from llmcore.methods.huref import fingerprints
    from safetensors.torch import save_file

    from llmcore.models import embedded_path

    found = huref.fingerprint(embedded_path(), K=512)
    results: dict[str, Any] = {"models": count, "width": found.header["width"]}
    for terms in ("paper", "hardened"), ("paper",):
        picked = [i for i, c in enumerate(found.channels) if c[0] in terms]
        header = {**found.header, "terms": list(terms)}
        asked = fingerprints.Fingerprint(found.sketches[picked], found.row_sums[picked], found.squares[picked],
                                         tuple(found.channels[i] for i in picked), found.tokens, header)
        with tempfile.TemporaryDirectory() as folder:
            index = huref.Index(folder)
            index.add(asked, name="the model itself")
            generator = torch.Generator().manual_seed(1)
            template = json.dumps({**asked.to_json(), "model": "%s"})
            for n in range(count - 1):  # entries as Index.add writes them, without a flush to disk for each
                sketches = torch.nn.functional.normalize(torch.randn(asked.sketches.shape, generator=generator), dim=1)
                metadata = {"llmcore_huref": template.replace("%s", f"model {n}"), "tokens": json.dumps({"ids": [0, 1]})}
                save_file({"sketches": sketches, "row_sums": asked.row_sums, "squares": asked.squares},
                          str(index._file(f"model {n}")), metadata=metadata)
            begin = time.perf_counter()
            first = index.query(asked, top=10)
            packing = time.perf_counter() - begin
            assert first[0].model == "the model itself", first[0]
            begin = time.perf_counter()
            huref.Index(folder).query(asked, top=10)
            opening = time.perf_counter() - begin
            rows = harness.interleaved({"query": lambda index=index, asked=asked: index.query(asked, top=10)}, rounds=rounds)
            stored = index._pack()[0]
            results[f"{len(picked)} channels"] = {**rows["query"], "stored_bytes": stored.numel() * 2, "pack_seconds": packing,
                                                  "first_query_of_a_packed_index_seconds": opening, "entries": len(index)}
            print(len(picked), "channels", results[f"{len(picked)} channels"], flush=True)
    # Error of one channel's estimate at the spec's K = 2048, correlations from near 1 to 0.
    generator = torch.Generator().manual_seed(2)
    left, right = (torch.randn(2048, 192, generator=generator) for _ in range(2))
    errors = {}
    from llmcore.kernels.invariants import invariant_correlation

    for noise in (0.1, 0.3, 1.0, 1e6):
        other = left + noise * torch.randn(2048, 192, generator=generator)
        truth = invariant_correlation(left, right, other, right)
        for channels in (1, 6):
            estimates = []
            for seed in range(24):
                means = [(tensor_sketch(left, right, width=1024, seed=100 * seed + c)
                          @ tensor_sketch(other, right, width=1024, seed=100 * seed + c)).item() for c in range(channels)]
                estimates.append(statistics.fmean(means) - truth)
            rms = math.sqrt(statistics.fmean(e * e for e in estimates))
            errors[f"{channels} channel{'s' * (channels > 1)}, correlation {truth:.3f}"] = rms
    results["rms_error"] = errors
    print(errors, flush=True)
    return results


def write_sparse(folder: Path, shape: dict[str, int]) -> int:
    """A llama checkpoint in BF16 shards of whole layers whose data are holes; returns the bytes that it claims."""
    hidden, width, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    inner = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    shards = [{"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)}]
    for n in range(shape["num_hidden_layers"]):
        p = f"model.layers.{n}."
        shards.append({f"{p}self_attn.q_proj.weight": (hidden, hidden), f"{p}self_attn.k_proj.weight": (inner, hidden),
                       f"{p}self_attn.v_proj.weight": (inner, hidden), f"{p}self_attn.o_proj.weight": (hidden, hidden),
                       f"{p}mlp.gate_proj.weight": (width, hidden), f"{p}mlp.up_proj.weight": (width, hidden),
                       f"{p}mlp.down_proj.weight": (hidden, width), f"{p}input_layernorm.weight": (hidden,),
                       f"{p}post_attention_layernorm.weight": (hidden,)})
    total, weight_map = 0, {}
    for i, tensors in enumerate(shards):
        file = folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, size in tensors.items():
            count = 2 * math.prod(size)
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + count]}
            offset += count
        text = json.dumps(header).encode()
        with open(file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + offset)
        weight_map |= dict.fromkeys(tensors, file.name)
        total += offset
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **shape}))
    return total


def run_large(folder: Path, num_tokens: int, max_memory: int) -> dict[str, Any]:
    """Fingerprint in a process of its own (`_large`): seconds, bytes, arithmetic, peak above what imports take."""
    from llmcore.methods import huref
    from llmcore.methods.huref.opening import give_back_blocks

    give_back_blocks()  # as the command line does
    torch.randn(512, 512) @ torch.randn(512, 512)
    before = harness._status("VmHWM")
    planned = huref.plan(folder, K=num_tokens, max_memory=max_memory)
    begin = time.perf_counter()
    found = huref.fingerprint(folder, tokens=list(range(1000, 1000 + num_tokens)), K=num_tokens, max_memory=max_memory)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "bytes_read": found.header["bytes_read"], "gflop": (planned.chain_flops + planned.sum_flops) / 1e9,
            "planned_bytes": planned.read_bytes, "planned_peak_bytes": planned.peak_bytes, "max_memory": max_memory,
            "peak_bytes": harness._status("VmHWM"), "peak_over_imports": harness._status("VmHWM") - before}


def bench_large(num_tokens: int, max_memory: int) -> dict[str, Any]:
    models = {}
    gemm = harness.gemm_step(num_tokens, 4096, 8192, torch.float32)
    for name, shape in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            total = write_sparse(Path(folder), shape)
            on_disk = sum(f.stat().st_blocks * 512 for f in Path(folder).iterdir())
            before = harness.interleaved({"product": gemm}, rounds=5)["product"]["median_ms"]
            found = json.loads(_python(__file__, "_large", folder, str(num_tokens), str(max_memory)))
            after = harness.interleaved({"product": gemm}, rounds=5)["product"]["median_ms"]
            block = bytearray(8 << 20)
            shard = next(Path(folder).glob("model-00002*"))
            begin, done = time.perf_counter(), 0
            with open(shard, "rb", buffering=0) as source:
                while (count := source.readinto(block)) and done < 1 << 30:
                    done += count
            read_rate = done / (time.perf_counter() - begin)
        rate = 2.0 * num_tokens * 4096 * 8192 / (statistics.fmean([before, after]) / 1e3)
        floor = max(found["gflop"] * 1e9 / rate, found["bytes_read"] / read_rate)
        models[name] = {**found, "total_bytes": total, "bytes_on_disk": on_disk, "gemm_gflops": rate / 1e9,
                        "gflops": found["gflop"] / found["seconds"], "read_bytes_per_second": read_rate,
                        "arithmetic_seconds": found["gflop"] * 1e9 / rate, "read_seconds": found["bytes_read"] / read_rate,
                        "over_floor": found["seconds"] / floor}
        print(name, models[name], flush=True)
    return {"K": num_tokens, "models": models}


def bench_formats(copies: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Each copy on the command line, as it is typed; the peak in runs of its own, which report it on the way out."""
    from llmcore.models import embedded_path

    base = embedded_path()
    wrapper = ("import sys; from llmcore import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\n"
               "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1], file=sys.stderr)")
    # As in a user's shell: the first round leaves compiled modules behind. Importing torch is a process of its own, for comparison.
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}, "HF_HUB_OFFLINE": "1"}
    rows, all_alone = {}, []
    for name, path in copies.items():
        seconds, alone, peaks = [], [], []
        for turn in range(rounds + 1):  # in turns: the machine's speed drifts by a third within minutes
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch"], check=True, env=environment)
            middle = time.perf_counter()
            command = ["huref", "compare", str(base), str(path), "--json"]
            done = subprocess.run([sys.executable, "-m", "llmcore", *command], capture_output=True, text=True, cwd=ROOT, env=environment)
            if turn:
                alone.append(middle - begin)
                seconds.append(time.perf_counter() - middle)
            weighed = subprocess.run([sys.executable, "-c", wrapper, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
            peaks.append(int(weighed.stderr.split()[-1]) * 1024)
        all_alone += alone
        found = json.loads(done.stdout)
        rows[name] = {
            **{key: found[key] for key in ("ics", "ics_hardened", "verdict", "bytes_read")}, "seconds": statistics.median(seconds),
            "over_import_torch": statistics.median(s / t for s, t in zip(seconds, alone, strict=True)),
            "peak_bytes": max(peaks), "read_over_table": found["bytes_read"] / found["needed_bytes"],
        }  # fmt: skip
        print(name, rows[name], flush=True)
    return {"K": 512, "rows": rows, "import_torch_seconds": statistics.median(all_alone)}


def bench_rewrites() -> dict[str, Any]:
    """No times: values only."""
    from llmcore.methods import huref
    from llmcore.methods.huref import attacks

    from llmcore.models import load_model

    original = load_model("smollm2", device="cpu", dtype=torch.float32)
    cases: list[tuple[str, list[str], float | None]] = [(name, [name], None) for name in (*attacks.COVERED, "all")]
    cases += [(name, [name], None) for name in ("rotation", "norm_shift")]
    cases += [("all, rotation, norm_shift", ["all", "rotation", "norm_shift"], None)]
    cases += [(f"noise {e}", ["noise"], e) for e in (0.02, 0.1, 0.3, 1.0)] + [("random", ["random"], None)]
    rows = {}
    for name, listed, strength in cases:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            lossless = attacks.apply("smollm2", copy, listed, seed=0, strength=strength).lossless
            found = huref.compare(original.path, copy, K=256, pcs=True)
            tiled = huref.compare(original.path, copy, K=256, gqa="tile", terms="paper").ics
            change = attacks.logit_change(original, copy)
            rows[name] = {
                "lossless": lossless, "logit_change": change.max_abs, "logit_std": change.std, "pcs": found.pcs, "ics": found.ics,
                "ics_hardened": found.ics_hardened, "ics_tiled": tiled, "verdict": found.verdict,
                "per_channel": [s.correlation for s in found.per_channel if s.terms == "paper"],
            }  # fmt: skip
            print(name, rows[name], flush=True)
    return {"K": 256, "rewrites": rows}


def _rewrites_table(rows: dict[str, Any]) -> str:
    lines = ["| rewrite | largest logit change | PCS | ICS paper | qk vo ff of either layer | published head order | ICS hardened |",
             "|---|---:|---:|---:|---|---:|---:|"]
    for name, r in rows.items():
        channels = " ".join(f"{c:.3f}" for c in r["per_channel"])
        lines.append(f"| {name} | {r['logit_change']:.1e} | {r['pcs']:.3f} | {r['ics']:.7f} | {channels} | {r['ics_tiled']:.3f} "
                     f"| {r['ics_hardened']:.7f} |")
    spread = next(iter(rows.values()))["logit_std"]
    return "\n".join(lines) + f"\n\nStandard deviation of the logits {spread:.2f}; K = 256, float32 storage."


def markdown(content: dict[str, Any]) -> str:
    """The table of one result file."""
    if "rewrites" in content:
        return _rewrites_table(content["rewrites"])
    if "rows" in content:
        lines = ["| the embedded model against | ICS paper | hardened | verdict | seconds with start-up | over `import torch` | peak MB "
                 "| read / table |",
                 "|---|---:|---:|---|---:|---:|---:|---:|"]
        lines += [f"| {name} | {r['ics']:.5f} | {r['ics_hardened']:.5f} | {r['verdict']} | {r['seconds']:.2f} "
                  f"| {r['over_import_torch']:.2f}x | {r['peak_bytes'] / 1e6:.0f} | {r['read_over_table']:.3f} |"
                  for name, r in content["rows"].items()]
        alone = content.get("import_torch_seconds")
        return "\n".join(lines) + (f"\n\n`import torch` alone: {alone:.2f} seconds, measured in turns with the commands." if alone else "")
    if "models" in content and isinstance(content["models"], dict):
        lines = ["| shape | file GB | read GB | GFLOP | seconds | arithmetic alone | reading alone | GFLOP/s | peak MB (budget) |",
                 "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        lines += [f"| {name} | {m['total_bytes'] / 1e9:.0f} | {m['bytes_read'] / 1e9:.2f} | {m['gflop']:.0f} | {m['seconds']:.1f} "
                  f"| {m['arithmetic_seconds']:.1f} | {m['read_seconds']:.1f} | {m['gflops']:.0f} of {m['gemm_gflops']:.0f} "
                  f"| {m['peak_bytes'] / 1e6:.0f} ({m['max_memory'] / 1e6:.0f} beyond imports) |" for name, m in content["models"].items()]
        return "\n".join(lines)
    if "models" in content:
        parts = [name for name in content if name.endswith("channels")]
        lines = ["| sketches | stored MB | query ms [p20, p80] | first query of a packed index s |", "|---|---:|---:|---:|"]
        lines += [f"| {content[p]['entries']} x {p} | {content[p]['stored_bytes'] / 1e6:.0f} | {content[p]['median_ms']:.1f} "
                  f"[{content[p]['p20_ms']:.1f}, {content[p]['p80_ms']:.1f}] | {content[p]['first_query_of_a_packed_index_seconds']:.2f} |"
                  for p in parts]
        errors = "; ".join(f"{name}: {value:.4f}" for name, value in content["rms_error"].items())
        return "\n".join(lines) + f"\n\nRoot-mean-square error at b = {content['width']}: {errors}."
    if "rates" in content:
        lines = ["| K | channel (R) | factor ms | stream ms | direct ms | choice, measured rates | over best | choice, table | over best |",
                 "|---:|---|---:|---:|---:|---|---:|---|---:|"]
        for s in content["shapes"]:
            times = " | ".join(f"{s['rows'][how]['median_ms']:.2f}" for how in ("factor", "stream", "direct"))
            depths = " and ".join(str(d) for d in dict.fromkeys(s["depths"]))
            lines.append(f"| {s['K']} | {s['channel']} ({depths}) | {times} | {s['measured']['choice']} | {s['measured']['over_best']:.2f} "
                         f"| {s['table']['choice']} | {s['table']['over_best']:.2f} |")
        return "\n".join(lines)
    lines = ["| K | way | score of the copy | seconds | peak MB of the process | published / this |", "|---:|---|---:|---:|---:|---|"]
    for s in content["shapes"]:
        slow = s["rows"]["published"]
        for way, row in s["rows"].items():
            ratio = f"{slow['seconds'] / row['seconds']:.1f}x time, {slow['peak_bytes'] / row['peak_bytes']:.1f}x memory"
            lines.append(f"| {s['K']} | {way} | {row['score']:.6f} | {row['seconds']:.2f} | {row['peak_bytes'] / 1e6:.0f} | {ratio} |")
    return "\n".join(lines)


def test_planner_small():
    assert bench_planner(1)["shapes"]


def main() -> None:
    if sys.argv[1:2] == ["_way"]:
        _, _, way, a, b, num_tokens = sys.argv
        print(json.dumps(run_way(way, Path(a), Path(b), int(num_tokens))))
        return
    if sys.argv[1:2] == ["_large"]:
        _, _, folder, num_tokens, max_memory = sys.argv
        print(json.dumps(run_large(Path(folder), int(num_tokens), int(max_memory))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("compare", "planner", "index", "large", "formats", "rewrites"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000, help="sketches in the index")
    parser.add_argument("--tokens", type=int, default=512, help="K of the large shapes")
    parser.add_argument("--max-memory", type=int, default=1 << 30)
    parser.add_argument("--copy", action="append", default=[], metavar="NAME=PATH", help="copies of the embedded model, for formats")
    parser.add_argument("--save", action="store_true", help="write bench/results/<device>/huref_<part>.json")
    given = parser.parse_args()
    if given.part == "compare":
        content = bench_compare(given.rounds)
    elif given.part == "planner":
        content = bench_planner(given.rounds)
    elif given.part == "index":
        content = bench_index(given.count, 15)
    elif given.part == "large":
        content = bench_large(given.tokens, given.max_memory)
    elif given.part == "rewrites":
        content = bench_rewrites()
    else:
        content = bench_formats({name: Path(path) for name, _, path in (text.partition("=") for text in given.copy)}, given.rounds)
    print(markdown(content))
    if given.save:
        print(harness.save(f"huref_{given.part}", content))


if __name__ == "__main__":
    main()
