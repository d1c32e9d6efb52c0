"""The public functions against NumPy in float64, written down from the formulas alone, on a small grouped-query model on disk."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from llmcore.kernels import backends
from llmcore.kernels import invariants as kernels
from llmcore.methods import huref

from llmcore import files

BACKENDS = ("triton",) if backends.interpreting() else ("cpp", "torch", "reference")
D, H, G, DIM, F, V, K = 20, 6, 2, 5, 33, 300, 70
IDS = [(37 * i) % 211 for i in range(K)]


def _write(folder, seed, noise=0.0):
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 99)

    def draw(*shape, mean=0.0):
        return rng.standard_normal(shape) + mean + noise * other.standard_normal(shape)

    state = {"model.embed_tokens.weight": draw(V, D, mean=0.3)}
    for n in range(3):
        p = f"model.layers.{n}."
        state |= {p + "self_attn.q_proj.weight": draw(H * DIM, D, mean=0.2), p + "self_attn.k_proj.weight": draw(G * DIM, D, mean=0.2),
                  p + "self_attn.v_proj.weight": draw(G * DIM, D), p + "self_attn.o_proj.weight": draw(D, H * DIM),
                  p + "mlp.gate_proj.weight": draw(F, D), p + "mlp.up_proj.weight": draw(F, D), p + "mlp.down_proj.weight": draw(D, F),
                  p + "input_layernorm.weight": draw(D, mean=1.0), p + "post_attention_layernorm.weight": draw(D, mean=1.0)}
    folder.mkdir()
    files.write_safetensors(folder / "model.safetensors", {k: torch.from_numpy(v) for k, v in state.items()})
    files.write_json(folder / "config.json", {"model_type": "llama", "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G,
                                              "head_dim": DIM, "num_hidden_layers": 3, "vocab_size": V})
    return state


def _terms(state, layer, *, tile=False, hardened=False, ids=IDS):
    """M_qk, M_vo, M_ff (or M_up*) of section 4 and 8, one head at a time."""
    p, x = f"model.layers.{layer}.", state["model.embed_tokens.weight"][ids]
    w = {n: state[f"{p}self_attn.{n}_proj.weight"] for n in "qkvo"} | {n: state[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
    g1, g2 = (state[p + n + ".weight"] if hardened else np.ones(D) for n in ("input_layernorm", "post_attention_layernorm"))
    qk, vo = np.zeros((len(x), len(x))), np.zeros((len(x), len(x)))
    for h in range(H):
        g = h % G if tile else h // (H // G)
        head, group = slice(h * DIM, (h + 1) * DIM), slice(g * DIM, (g + 1) * DIM)
        qk += x @ (w["q"][head] * g1).T @ (w["k"][group] * g1) @ x.T
        vo += x @ (w["v"][group] * g1).T @ w["o"][:, head].T @ x.T
    inner = w["up"] * g2 if hardened else w["gate"] * w["up"]
    return [qk, vo, x @ inner.T @ w["down"].T @ x.T]


def _pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return (folder / "a", _write(folder / "a", 1)), (folder / "b", _write(folder / "b", 1, 0.7))


@pytest.mark.parametrize("tile", [False, True])
def test_terms_of_both_head_expansions_and_variants(pair, tile):
    path, state = pair[0]
    truth = [m for n in (1, 2) for m in _terms(state, n, tile=tile) + _terms(state, n, tile=tile, hardened=True)]
    found = huref.invariant_terms(path, tokens=IDS, K=K, terms=("paper", "hardened"), gqa="tile" if tile else "interleave")
    for ours, expected in zip(found.numpy(), truth, strict=True):
        assert np.abs(ours - expected).max() < 1e-10 * np.abs(expected).max()


def test_comparison_is_the_mean_of_channel_correlations(pair):
    (a, state_a), (b, state_b) = pair
    found = huref.compare(a, b, tokens=IDS, K=K, pcs=True)
    by = {(s.layer_a, s.name): s.correlation for s in found.per_channel}
    assert [(s.terms, s.name, s.layer_a, s.layer_b) for s in found.per_channel if s.terms == "paper"] == [
        ("paper", name, n, n) for n in (1, 2) for name in ("qk", "vo", "ff")]
    means = {False: [], True: []}
    for layer in (1, 2):
        for hardened, names in ((False, ("qk", "vo", "ff")), (True, ("qk*", "vo*", "up*"))):
            for name, x, y in zip(names, _terms(state_a, layer, hardened=hardened), _terms(state_b, layer, hardened=hardened), strict=True):
                assert abs(by[layer, name] - _pearson(x, y)) < 1e-6, name
                means[hardened].append(_pearson(x, y))
    assert abs(found.ics - np.mean(means[False])) < 1e-6
    assert abs(found.ics_hardened - np.mean(means[True])) < 1e-6
    flat = [np.concatenate([v.ravel() for v in s.values()]) for s in (state_a, state_b)]
    assert abs(found.pcs - flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])) < 1e-9
    assert found.verdict == ("same base" if max(found.ics, found.ics_hardened) >= 0.75 else "related")
    assert found.num_tokens == K
    assert found.skipped == []
    assert found.needed_bytes == 2 * 8 * (2 * (2 * H * DIM * D + 2 * G * DIM * D + 3 * F * D) + K * D)
    whole = sum(v.nbytes for s in (state_a, state_b) for v in s.values())  # read once more, for the parameter cosine
    assert found.needed_bytes <= found.bytes_read - whole <= found.needed_bytes + 6 * 8 * D * 4 + 20_000  # gains, headers, configurations
    # The null: rows of one side permuted, by the score's own standard deviations.
    assert abs(found.null_z - (max(found.ics, found.ics_hardened) - found.null_mean) / found.null_std) < 1e-9
    raw = huref.compare(a, b, tokens=IDS, K=K, normalize="none", terms="paper")
    cosines = [float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)) for n in (1, 2)
               for x, y in zip(_terms(state_a, n), _terms(state_b, n), strict=True)]
    assert abs(raw.ics - np.mean(cosines)) < 1e-6


def test_pooled_vector_is_the_mean_of_512_runs(pair):
    """C · K² entries in flat order, cut into 512 runs that cross channel borders, averaged and standardised."""
    path, state = pair[0]
    ids = list(range(20, 276))
    found = huref.fingerprint(path, tokens=ids, K=256)
    for hardened, terms in ((False, "paper"), (True, "hardened")):
        m = np.stack([t for n in (1, 2) for t in _terms(state, n, hardened=hardened, ids=ids)])
        for pool in ("published", "standardised"):
            values = m if pool == "published" else (m - m.mean((1, 2), keepdims=True)) / m.std((1, 2), keepdims=True, ddof=1)
            runs = values.reshape(512, -1).mean(1)
            expected = (runs - runs.mean()) / runs.std(ddof=1)
            assert np.abs(found.pooled(terms=terms, pool=pool).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_kernels_on_every_backend(backend):
    if reason := backends.unavailable("invariants", backend, "cpu"):
        pytest.skip(reason)
    rng = np.random.default_rng(4)
    for rows, depth_a, depth_b in ((3, 2, 1), (131, 97, 45), (290, 31, 300)):
        pa, qa, pb, qb = (rng.standard_normal((rows, d)) + 0.2 for d in (depth_a, depth_a, depth_b, depth_b))
        a, b = pa @ qa.T, pb @ qb.T
        truth = [a.sum(), b.sum(), (a * a).sum(), (b * b).sum(), (a * b).sum()]
        tensors = [torch.from_numpy(t) for t in (pa, qa, pb, qb)]
        for algorithm in kernels.ALGORITHMS:
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6))[backend == "triton":]:  # triton has no float64
                sums = kernels.invariant_sums(*(t.to(dtype) for t in tensors), algorithm=algorithm, backend=backend)
                found = [sums.sum_a, sums.sum_b, sums.dot_aa, sums.dot_bb, sums.dot_ab]
                scale = [math.sqrt(truth[2]) * rows, math.sqrt(truth[3]) * rows, truth[2], truth[3], math.sqrt(truth[2] * truth[3])]
                assert max(abs(x - y) / s for x, y, s in zip(found, truth, scale, strict=True)) < tolerance
                assert abs(sums.correlation() - _pearson(a, b)) < 10 * tolerance
        dtype, tolerance = (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-9)
        standard = (a - a.mean()) / a.std(ddof=1)
        ours = kernels.invariant_matrix(tensors[0].to(dtype), tensors[1].to(dtype), standardize=True, backend=backend).numpy()
        assert np.abs(ours - standard).max() < tolerance
        stored = kernels.stored_sums(*(torch.from_numpy(m).to(dtype) for m in (a, b)), backend=backend).numpy()
        assert np.abs(stored - truth).max() < tolerance * truth[2]


def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_sketch_by_its_definition(backend):
    """Entry (i, j) times s(i) s'(j) into bin (h(i) + h'(j)) mod b; hashes by splitmix64 in Python integers."""
    if reason := backends.unavailable("invariants", backend, "cpu"):
        pytest.skip(reason)
    rng, rows, depth, width, seed = np.random.default_rng(5), 41, 7, 24, 77
    left, right = (rng.standard_normal((rows, depth)) + 0.4 for _ in range(2))
    hashes = []
    for side in (1, 2):
        start = _mix64(((seed ^ side * 0x5851F42D4C957F2D) % 2**64 - 2**63) % 2**64)
        bits = [_mix64((start + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i in range(rows)]
        hashes.append(([(x & 0xFFFFFFFF) * width >> 32 for x in bits], [1 if x >> 62 & 1 else -1 for x in bits]))
    for center, normalize in ((True, True), (False, False)):
        m = left @ right.T
        m = m - m.mean() if center else m
        sketch = np.zeros(width)
        for i in range(rows):
            for j in range(rows):
                sketch[(hashes[0][0][i] + hashes[1][0][j]) % width] += hashes[0][1][i] * hashes[1][1][j] * m[i, j]
        sketch = sketch / np.linalg.norm(sketch) if normalize else sketch
        dtype, tolerance = (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-9)
        ours = kernels.tensor_sketch(*(torch.from_numpy(t).to(dtype) for t in (left, right)), width=width, seed=seed, center=center,
                                     normalize=normalize, backend=backend).numpy()
        assert np.abs(ours - sketch).max() < tolerance * max(1.0, np.abs(sketch).max())


@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter's run")
def test_triton_by_the_same_formulas():
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "triton and not same", __file__], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
