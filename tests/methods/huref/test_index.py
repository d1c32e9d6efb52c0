"""The index: added one by one, killed and resumed, one bad checkpoint among good ones, queries and their error."""

from __future__ import annotations

import dataclasses
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmcore.methods import huref

from llmcore import files

ROOT = Path(__file__).parents[3]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 300, "model_type": "llama"}
SETTINGS = {"K": 128, "tokens": list(range(100, 228)), "width": 256}


def _write(folder: Path, seed: int, change: float = 0.0) -> Path:
    """A small llama checkpoint; `change` adds noise to the one of the same seed."""
    generator, other, h, w = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000), 32, 48
    shapes = {"model.embed_tokens.weight": (300, h)}
    for n in range(2):
        p = f"model.layers.{n}."
        shapes |= {f"{p}self_attn.{s}_proj.weight": (h if s in "qo" else h // 2, h) for s in "qkvo"}
        shapes |= {f"{p}mlp.gate_proj.weight": (w, h), f"{p}mlp.up_proj.weight": (w, h), f"{p}mlp.down_proj.weight": (h, w)}
    tensors = {k: torch.randn(s, generator=generator) + change * torch.randn(s, generator=other) for k, s in shapes.items()}
    folder.mkdir(parents=True)
    files.write_safetensors(folder / "model.safetensors", tensors)
    files.write_json(folder / "config.json", SHAPE)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    for seed in range(6):
        _write(folder / f"base{seed}", seed)
    _write(folder / "child2", 2, 0.05)
    (folder / "broken").mkdir()
    files.write_json(folder / "broken" / "config.json", SHAPE)
    (folder / "broken" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return folder


def test_one_bad_checkpoint_is_reported_and_does_not_stop_the_rest(zoo, tmp_path):
    index = huref.Index(tmp_path / "index", **SETTINGS)
    done = index.add_tree(zoo)
    assert len(done.added) == 7
    assert list(done.failed) == [str(zoo / "broken")]
    assert "broken" in done.failed[str(zoo / "broken")]
    assert list(huref.Index(tmp_path / "index").failed) == [str(zoo / "broken")], "the failure must be on disk"
    ranked = index.query(zoo / "child2", top=3)
    assert [Path(m.model).name for m in ranked[:2]] == ["child2", "base2"]
    assert ranked[0].verdict == ranked[1].verdict == "same base"
    assert ranked[2].score < 0.3
    again = huref.Index(tmp_path / "index").add_tree(zoo)
    assert (len(again.added), len(again.present)) == (0, 7)


def test_a_killed_run_is_resumed(zoo, tmp_path):
    """SIGKILL while the third model is added: what was written is whole, nothing is done twice, and the result is that of one run."""
    code = f"""
from llmcore.methods import huref
from llmcore.methods.huref import fingerprints
before, count = fingerprints.Fingerprint.save, 0
def slow(self, path):
    global count
    count += "conventions" not in str(path)
    if count == 3:
        print("third", flush=True)
        time.sleep(60)
    before(self, path)
fingerprints.Fingerprint.save = slow
huref.Index({str(tmp_path / "index")!r}, **{SETTINGS!r}).add_tree({str(zoo)!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "third\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (tmp_path / "index" / "models" / ".left.huref.safetensors.x.tmp").write_bytes(b"what a killed writer leaves")
    index = huref.Index(tmp_path / "index", **SETTINGS)
    assert len(index) == 2
    done = index.add_tree(zoo)
    assert (len(done.present), len(done.added), len(done.failed)) == (2, 5, 1)
    whole = huref.Index(tmp_path / "whole", **SETTINGS)
    whole.add_tree(zoo)
    for model in ("base3", "child2"):
        a, b = (i.query(zoo / model, top=7) for i in (index, whole))
        assert a == b


def test_a_query_ranks_all_entries_and_packs_once(zoo, tmp_path):
    index = huref.Index(tmp_path / "index", **SETTINGS)
    truth = huref.fingerprint(zoo / "base0", **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for n in range(40):
        mixed = torch.nn.functional.normalize(truth.sketches + n / 40 * torch.randn(truth.sketches.shape, generator=generator) / 16, dim=1)
        index.add(dataclasses.replace(truth, sketches=mixed), name=f"model {n}")
        paper = torch.tensor([c[0] == "paper" for c in truth.channels])
        dots = (mixed.half().double() * truth.sketches.double()).sum(1)
        scores[f"model {n}"] = max(dots[paper].mean().item(), dots[~paper].mean().item())
    found = index.query(truth, top=40)
    assert [m.model for m in found] == sorted(scores, key=scores.get, reverse=True)
    assert max(abs(m.score - scores[m.model]) for m in found) < 1e-5
    stamp = (tmp_path / "index" / "packed.npy").stat().st_mtime_ns
    assert huref.Index(tmp_path / "index").query(truth, top=5) == found[:5]
    assert (tmp_path / "index" / "packed.npy").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="width"):
        index.query(huref.fingerprint(zoo / "base0", **{**SETTINGS, "width": 128}))


def test_error_of_the_estimates_at_width_1024(base, copies):
    """Scores of six channels from sketches of width 1024 against the exact ones, over noisy copies and a random twin: rms at most 0.012."""
    errors = []
    others = [copies("noise", strength=s) for s in (0.1, 0.3, 1.0)] + [copies("random")]
    exact = [huref.compare(base, other, K=512, terms="paper").ics for other in others]
    for seed in range(3):
        first = huref.fingerprint(base, K=512, terms="paper", width=1024, seed=seed)
        errors += [huref.compare(first, other).ics - truth for other, truth in zip(others, exact, strict=True)]
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) <= 0.012, errors
