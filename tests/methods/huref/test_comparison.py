"""Acceptance on real copies of the embedded model on disk: who is matched, who is not, what is read, what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmcore.methods import huref
from llmcore.methods.huref import comparison, matching, opening
from llmcore.methods.huref.attacks import COVERED

from llmcore import files
from llmcore.checkpoints import CheckpointReader

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("attack", [*COVERED, "all"])
def test_covered_rewrites_keep_the_paper_terms(base, copies, attack):
    found = huref.compare(base, copies(attack), K=256)
    assert abs(found.ics - 1) < 1e-6, found.per_channel
    assert abs(found.ics_hardened - 1) < 1e-6, found.per_channel
    assert found.verdict == "same base"
    assert found.null_z > 20


def test_the_published_head_expansion_is_seen_to_fail(base, copies):
    found = huref.compare(base, copies("all"), K=256, gqa="tile", terms="paper")
    assert 0.3 < found.ics < 0.7
    assert huref.compare(base, base, K=256, gqa="tile", terms="paper").ics > 1 - 1e-9


def test_parameter_cosine_is_blind_where_the_terms_see(base, copies):
    found = huref.pcs(base, copies("all"))
    assert abs(found.value) < 0.01
    assert found.skipped == []
    same = huref.pcs(base, base, exclude=("norm", "embed"))
    assert abs(same.value - 1) < 1e-12
    assert {reason for *_, reason in same.skipped} == {"excluded"}


def test_hardened_terms_see_through_rotation_and_norm_shift(base, copies):
    for attack, low, high in (("rotation", 0.6, 0.78), ("norm_shift", 0.75, 0.93)):
        found = huref.compare(base, copies(attack), K=256)
        assert abs(found.ics_hardened - 1) < 1e-6, found.per_channel
        assert low < found.ics < high, found.ics
        assert found.verdict == "same base"


def test_noise_degrades_as_measured_and_a_random_twin_is_not_matched(base, copies):
    for strength, expected in ((0.1, 0.987), (0.3, 0.894), (1.0, 0.375)):
        assert abs(huref.compare(base, copies("noise", strength=strength), K=256).ics - expected) < 0.03
    twin = huref.compare(base, copies("random"), K=512)
    assert abs(twin.ics) < 0.03
    assert abs(twin.ics_hardened) < 0.03
    assert twin.verdict == "no evidence"
    assert abs(twin.null_z) < 6


def test_storage_formats(base, copies):
    for dtype, least in (("float16", 0.999999), ("bfloat16", 0.99999), ("float8_e4m3", 0.997)):
        assert huref.compare(base, copies("residual_permutation", dtype=dtype, num_shards=3), K=256).ics > least


def test_four_bit_gguf(base, four_bit):
    """Q4_0 matrices under the Q8_0 embedding that quantisers keep for a tied model score above 0.99. With the embedding in Q4_0 too
    the noise enters each entry twice more, X on either side, and most in the small rows of rare tokens: 0.984, hardened 0.987."""
    found = huref.compare(base, four_bit("Q4_0", "Q8_0"), K=512)
    assert found.ics > 0.99
    assert found.token_overlap["common"] > 48000
    assert found.verdict == "same base"
    pure = huref.compare(base, four_bit("Q4_0", "Q4_0"), K=512)
    assert 0.98 < pure.ics < pure.ics_hardened < found.ics
    assert pure.verdict == "same base"
    # The header of a GGUF file holds its tokenizer. Its pieces are those of the base, so that their kinds need not be read; alone, they
    # are, and say the same.
    with opening.open_model(base) as left, opening.open_model(four_bit("Q4_0", "Q8_0")) as right:
        assert right.vocabulary is left.vocabulary
        expected, with_base = left.vocabulary.strings, right.reader.bytes_read
    del left, right
    with opening.open_model(four_bit("Q4_0", "Q8_0")) as alone:
        assert alone.vocabulary.strings == expected
        assert alone.reader.bytes_read == with_base + 4 * len(expected)


def test_ics_is_the_mean_of_channel_correlations_and_the_cosine_of_standardised_terms(base, copies):
    other = copies("noise", strength=0.3)
    tokens = opening.resolve_tokens(None, opening.open_model(base)).last(128)
    found = huref.compare(base, other, K=128, tokens=tokens, terms="paper")
    a, b = (huref.invariant_terms(p, tokens=tokens, K=128) for p in (base, other))
    standard = [(x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True) for x in (a, b)]
    cosine = torch.nn.functional.cosine_similarity(standard[0].flatten(), standard[1].flatten(), dim=0).item()
    assert abs(found.ics - cosine) < 1e-6
    assert abs(sum(s.correlation for s in found.per_channel) / 6 - found.ics) < 1e-12
    assert [(s.layer_a, s.name) for s in found.per_channel] == [(n, c) for n in (28, 29) for c in ("qk", "vo", "ff")]
    for algorithm in ("factor", "stream", "direct"):
        assert abs(huref.compare(base, other, K=128, tokens=tokens, terms="paper", algorithm=algorithm).ics - found.ics) < 1e-6
    raw = huref.compare(base, other, K=128, tokens=tokens, terms="paper", normalize="none")
    plain = torch.stack([(x * y).sum() / x.norm() / y.norm() for x, y in zip(a, b, strict=True)]).mean().item()
    assert abs(raw.ics - plain) < 1e-6


def test_degenerate_channels_are_reported_and_left_out(base, copies):
    """Identity layers at the end have zero output weights: no correlation for vo and ff; matching layers finds the real ones."""
    longer = copies("identity_layers")
    found = huref.compare(base, longer, K=128)
    missing = [s for s in found.per_channel if math.isnan(s.correlation)]
    if missing:
        assert all(s.reason == "all zero in b" for s in missing)
        assert sum("left out of the mean" in n for n in found.notes) == len(missing)
        assert not math.isnan(found.ics)
    assert json.loads(json.dumps(found.to_json()))["ics"] == found.ics
    matched = huref.compare(base, longer, K=128, match_layers=True, terms="paper")
    assert matched.ics > 1 - 1e-6
    assert matched.notes[-1].startswith("layers matched")


def test_vocabulary_is_aligned_by_string(base, copies):
    extended = copies("vocabulary")
    found = huref.compare(base, extended, K=512)
    assert found.ics > 0.999
    assert found.token_overlap["dropped_a"] == 0
    with CheckpointReader(extended) as reader, CheckpointReader(base) as original:
        assert reader.shape("model.embed_tokens.weight")[0] > original.shape("model.embed_tokens.weight")[0]
    ids = opening.resolve_tokens(None, opening.open_model(base)).last(256)
    naive = [huref.invariant_terms(p, tokens=list(ids.ids), K=256, layers=[-1]).flatten(1) for p in (base, extended)]
    for x, y in zip(*naive, strict=True):  # channel by channel: their unlike means alone would correlate
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1].item()) < 0.2


def test_bytes_read_and_peak_memory(base, copies, four_bit):
    """At most 1.05 times the bytes of two layers and K rows on either side; the whole command below 300 MB, torch included."""
    found = huref.compare(base, copies("all"), K=512)
    with CheckpointReader(base) as reader:
        layer = sum(reader.nbytes(n) for n in reader.names() if n.startswith("model.layers.29.") and "norm" not in n)
    table = 2 * (2 * layer + 512 * 576 * 4)
    assert found.needed_bytes == table
    assert found.bytes_read <= 1.05 * table
    quantised = huref.compare(base, four_bit("Q4_0", "Q8_0"), K=512)
    assert quantised.bytes_read <= 1.05 * quantised.needed_bytes
    # VmHWM, not ru_maxrss: the latter starts, after a fork, at the size of the process that runs the tests.
    code = ("import sys; from llmcore import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass\n"
            "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1], file=sys.stderr)")
    run = subprocess.run([sys.executable, "-c", code, "huref", "compare", str(base), str(copies("all")), "--json"], capture_output=True,
                         text=True, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert json.loads(run.stdout)["verdict"] == "same base"
    assert int(run.stderr.split()[-1]) * 1024 < 300e6


def test_adapter_is_merged_as_it_is_read(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "lonely")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    files.write_json(tmp_path / "lonely" / "adapter_config.json", {**settings, "base_model_name_or_path": "nowhere/base"})
    with pytest.raises(ValueError, match="give the base"):
        huref.compare(base, tmp_path / "lonely")
    found = huref.compare(base, tmp_path / "lonely", K=256, base_b=base)
    assert 0.9 < found.ics < 0.99999
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(base / name, merged / name)
    from safetensors.torch import load_file

    state, low = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [n for n in low if n.endswith("lora_A.weight")]:
        state[name.removeprefix("base_model.model.").replace(".lora_A", "")] += 2.0 * low[name.replace("lora_A", "lora_B")] @ low[name]
    files.write_safetensors(merged / "model.safetensors", state)
    assert abs(huref.compare(merged, adapter, K=256).ics - 1) < 1e-6


def test_compare_many_survives_a_bad_checkpoint(base, copies, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((base / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    paths = [base, copies("all"), broken, copies("random"), copies("vocabulary")]
    found = huref.compare_many(paths, K=128)
    assert list(found.errors) == [str(broken)]
    assert abs(found.scores[0][1] - 1) < 1e-5
    assert abs(found.scores_hardened[0][4] - 1) < 1e-3
    assert abs(found.scores[0][3]) < 0.1
    assert all(math.isnan(x) for x in found.scores[2])
    pair = huref.compare(base, copies("noise", strength=0.3), K=128, terms="paper")
    listed = opening.resolve_tokens(None, opening.open_model(base)).last(128)
    both = huref.compare_many([base, copies("noise", strength=0.3)], K=128, tokens=listed, max_memory=1 << 20)
    assert abs(both.scores[0][1] - pair.ics) < 1e-5
    found.picture(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def _write_sparse(folder, shapes, used=()):
    """A BF16 file of these shapes: holes, and random numbers in the tensors that are used."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text, path = json.dumps(header).encode(), folder / "model.safetensors"
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        start = out.tell()
        out.truncate(start + offset)
        generator = torch.Generator().manual_seed(1)
        for name in used:
            out.seek(start + header[name]["data_offsets"][0])
            out.write(torch.randn(shapes[name], generator=generator).bfloat16().view(torch.uint8).numpy().tobytes())
    return path


def test_memory_stays_within_max_memory(tmp_path):
    """A layer of 105 MB in 16 bits, 210 MB in float32, fingerprinted within 64 MB: the peak of a fresh process over its imports."""
    hidden, width = 1024, 16384
    p = "model.layers.0."
    shapes = {"model.embed_tokens.weight": (4096, hidden), **{f"{p}self_attn.{s}_proj.weight": (hidden, hidden) for s in "qkvo"},
              f"{p}mlp.gate_proj.weight": (width, hidden), f"{p}mlp.up_proj.weight": (width, hidden),
              f"{p}mlp.down_proj.weight": (hidden, width)}
    _write_sparse(tmp_path, shapes)
    files.write_json(tmp_path / "config.json", {"model_type": "llama", "hidden_size": hidden, "num_attention_heads": 8,
                                                "num_hidden_layers": 1, "vocab_size": 4096})
    budget = 64 << 20
    assert budget / 2 < huref.plan(tmp_path, K=256, max_memory=budget).peak_bytes <= budget
    (tmp_path / "ids").write_text("\n".join(map(str, range(256))))
    code = ("import torch; torch.set_num_threads(1); from llmcore import cli; from llmcore.commands import huref as command\n"
            "from llmcore.methods import huref; torch.randn(512, 512) @ torch.randn(512, 512)\n"
            "peak = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]) * 1024\n"
            "before = peak()\ntry:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\nprint(peak() - before)")
    run = subprocess.run([sys.executable, "-c", code, "huref", "fingerprint", str(tmp_path), "-o", str(tmp_path / "f"), "-K", "256",
                          "--tokens", str(tmp_path / "ids"), "--max-memory", "64M"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout.split()[-1]) < budget + 8e6
    with pytest.raises(ValueError, match=r"max_memory = 33554432 bytes is too little.* K = \d+ fits"):
        huref.fingerprint(tmp_path, K=256, tokens=list(range(256)), max_memory=32 << 20)


def test_pooled_fingerprint_of_many_tokens_has_nothing_of_size_k_squared(tmp_path):
    """K = 32,768: one matrix would be 4.3 GB; the whole fingerprint with its pooled vectors stays below 250 MB over the imports."""
    hidden, width, p = 32, 48, "model.layers.0."
    shapes = {"model.embed_tokens.weight": (40000, hidden), **{f"{p}self_attn.{s}_proj.weight": (hidden, hidden) for s in "qkvo"},
              f"{p}mlp.gate_proj.weight": (width, hidden), f"{p}mlp.up_proj.weight": (width, hidden),
              f"{p}mlp.down_proj.weight": (hidden, width)}
    _write_sparse(tmp_path, shapes, tuple(shapes))
    files.write_json(tmp_path / "config.json", {"model_type": "llama", "hidden_size": hidden, "num_attention_heads": 4,
                                                "num_hidden_layers": 1, "vocab_size": 40000})
    code = ("import torch; torch.set_num_threads(1); from llmcore.methods import huref; torch.randn(512, 512) @ torch.randn(512, 512)\n"
            "peak = lambda: int(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1]) * 1024\n"
            f"before = peak(); f = huref.fingerprint({str(tmp_path)!r}, K=32768, tokens=list(range(32768)))\n"
            "assert f.pooled().shape == f.pooled(terms='hardened', pool='published').shape == (512,); print(peak() - before)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < 250e6


def test_sparse_checkpoint_of_fifty_gigabytes(tmp_path):
    """Only headers and what is used are read: thousands of narrow layers and a huge head that is never touched."""
    hidden, width, vocab, layers = 64, 96, 4096, 3000
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (24_000_000, 1024)}
    for n in range(layers):
        p = f"model.layers.{n}."
        shapes |= {f"{p}self_attn.{s}_proj.weight": (hidden, hidden) for s in "qkvo"}
        shapes |= {f"{p}mlp.gate_proj.weight": (width, hidden), f"{p}mlp.up_proj.weight": (width, hidden),
                   f"{p}mlp.down_proj.weight": (hidden, width), f"{p}input_layernorm.weight": (hidden,),
                   f"{p}post_attention_layernorm.weight": (hidden,)}
    last = tuple(f"model.layers.{n}." for n in (layers - 2, layers - 1))
    path = _write_sparse(tmp_path, shapes, ("model.embed_tokens.weight", *(n for n in shapes if n.startswith(last))))
    files.write_json(tmp_path / "config.json", {"model_type": "llama", "hidden_size": hidden, "num_attention_heads": 4,
                                                "num_hidden_layers": layers, "vocab_size": vocab})
    assert path.stat().st_size > 49e9
    found = huref.compare(tmp_path, tmp_path, tokens=list(range(1000, 1512)))
    assert abs(found.ics - 1) < 1e-9
    assert found.bytes_read < 30e6  # two headers of 4 MB, parsed, and half a megabyte of weights
    plan = huref.plan(tmp_path, K=512)
    assert plan.read_bytes < 1e6
    assert plan.total_bytes > 49e9


def test_command_line(base, copies, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "llmcore", "huref", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)

    same = run("compare", base, copies("rotation"), "--json", "--quick")
    assert same.returncode == 0, same.stderr
    assert json.loads(same.stdout)["verdict"] == "same base"
    other = run("compare", base, copies("random"))
    assert other.returncode == 2
    assert other.stdout.startswith("no evidence: ICS")
    missing = run("compare", base, tmp_path / "nothing")
    assert missing.returncode == 3
    assert "no such file" in missing.stderr
    assert run("plan", base, "-K", "4096", "--max-memory", "500M").returncode == 0


def test_verdicts_and_errors(base):
    found = [comparison.verdict_of(x) for x in (0.9, 0.75, 0.5, 0.10, 0.05)]
    assert found == ["same base", "same base", "related", "related", "no evidence"]
    for options, words in (({"gqa": "other"}, "gqa"), ({"ff": "other"}, "ff"), ({"terms": "other"}, "terms"), ({"K": 1}, "at least 2"),
                           ({"compat": "old"}, "compat"), ({"layers": [99]}, "layers"), ({"max_memory": 5}, "max_memory")):
        with pytest.raises(ValueError, match=words):
            huref.compare(base, base, **options)


def test_monotone_alignment():
    grid = torch.eye(5)[[0, 1, 3, 4]]
    assert matching.monotone_alignment(grid) == [(0, 0), (1, 1), (2, 3), (3, 4)]
