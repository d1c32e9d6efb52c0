"""Zeroth-order kernels: the generator against published vectors and an independent one, every backend against float64, moments, errors."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from llmcore.kernels import backends, zeroth_order
from llmcore.kernels.zeroth_order import (
    direction_gram,
    directions,
    perturb_embeddings,
    philox,
    query_seeds,
    sample_uniforms,
    zeroth_order_gradient,
)

INTERPRETING = backends.interpreting()
CPU_BACKENDS = [name for name in ("reference", "torch", "cpp", "triton") if backends.unavailable("zeroth_order", name, "cpu") is None]
# (B, P, T, D): one of each, primes, below and above a vector, a realistic one
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 2, 33), (3, 2, 4, 129), (1, 10, 30, 576)]
WIDTH = {"gaussian": 1, "sphere": 1, "antithetic": 2, "orthogonal": 1}


def _numpy_philox(seed: int, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 on Python integers, written from the paper's definition and sharing nothing with the kernels."""
    c, k0, k1 = list(counter), seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def _numpy_row(seed: int, j: int, dim: int) -> np.ndarray:
    values = []
    for b in range((dim + 3) // 4):
        u = [(x + 0.5) * 2.0**-32 for x in _numpy_philox(seed, (b, j, 0, 0x47434431))]
        for a, c in ((u[0], u[1]), (u[2], u[3])):
            radius = math.sqrt(-2 * math.log(a))
            values += [radius * math.cos(2 * math.pi * c), radius * math.sin(2 * math.pi * c)]
    return np.array(values[:dim])


@pytest.mark.skipif(INTERPRETING or importlib.util.find_spec("triton") is None, reason="needs triton; already in the interpreter")
def test_triton_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__, "-k", "triton")


@pytest.mark.parametrize(("key", "counter", "expected"), [
    # the generator authors' known-answer vectors
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(key, counter, expected):
    seed = torch.tensor(key - 2**64 if key >= 2**63 else key)
    assert tuple(int(word) for word in philox(seed, *[torch.tensor(c) for c in counter])) == expected
    assert tuple(_numpy_philox(key, counter)) == expected


def test_query_seeds_and_sample_uniforms_follow_their_definition():
    query = 0xDEADBEEF12345678 - 2**64
    x = _numpy_philox(13, (0x12345678, 0xDEADBEEF, 0, 0x47435131))
    assert int(query_seeds(13, torch.tensor([query]))[0]) & (2**64 - 1) == x[1] * 2**32 + x[0]
    steps, samples = torch.tensor([0, 15])[:, None], torch.tensor([0, 9, 65535])
    drawn = sample_uniforms(13, steps=steps, rows=torch.tensor(3), samples=samples, query_ids=torch.tensor(7))
    for i, step in enumerate((0, 15)):
        for k, sample in enumerate((0, 9, 65535)):
            x = _numpy_philox(13, (step, 3 * 2**16 + sample, 7, 0x47435331))
            assert drawn[i, k].item() == ((x[0] * 2**20 + x[1] // 2**12) + 0.5) * 2.0**-52
    assert drawn.dtype == torch.float64


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 31, 257])
def test_directions_equal_an_independent_generator(backend, dim):
    seeds = [13, 2**63 + 5, 2**64 - 1]
    ours = directions(seeds, 3, dim, dtype=torch.float64, backend=backend)
    rtol, atol = (0, 2e-6) if backend == "triton" else (1e-13, 1e-15)  # GPU rows are formed in float32
    for s, seed in enumerate(seeds):
        for j in range(3):
            np.testing.assert_allclose(ours[s, j].numpy(), _numpy_row(seed, j, dim), rtol=rtol, atol=atol)
    # float32 rows are the float64 ones rounded once; a last-bit difference of libm may move a tie
    single = directions(seeds, 3, dim, backend=backend)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), ours, rtol=6.1e-8, atol=0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_kinds(backend):
    gaussian = directions(5, 6, 37, dtype=torch.float64, backend=backend)
    sphere = directions(5, 6, 37, kind="sphere", dtype=torch.float64, backend=backend)
    rtol = 2e-7 if backend == "triton" else 1e-13
    torch.testing.assert_close(sphere, gaussian * math.sqrt(37) / gaussian.norm(dim=-1, keepdim=True), rtol=rtol, atol=0)
    antithetic = directions(5, 6, 37, kind="antithetic", backend=backend)
    assert torch.equal(antithetic[:, :3], gaussian[:, :3].float())
    assert torch.equal(antithetic[:, 3:], -antithetic[:, :3])
    orthogonal = directions(5, 6, 37, kind="orthogonal", dtype=torch.float64, backend=backend)[0]
    torch.testing.assert_close(orthogonal @ orthogonal.T, 37 * torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-11)
    source = directions(5, 6, 37, dtype=torch.float64, backend="reference")[0]
    r = torch.linalg.solve(orthogonal @ orthogonal.T, orthogonal @ source.T)  # Q' A: upper triangular, positive diagonal
    torch.testing.assert_close(r, r.triu(), rtol=0, atol=1e-11)
    assert (r.diagonal() > 0).all()
    assert directions([1, 2], 0, 4, backend=backend).shape == (2, 0, 4)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_perturbation(backend, dtype, shape):
    batch, num_directions, length, dim = shape
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(batch, length, dim, generator=generator).to(dtype)
    mask = torch.rand(batch, length, generator=generator) < 0.6
    mask[:, 0] = True
    seeds = torch.arange(batch) + 40
    out = perturb_embeddings(embeddings, mask, seeds=seeds, num_directions=num_directions, smoothing=0.02, backend=backend)
    shift = 0.02 * directions(seeds, num_directions, dim, backend=backend).double()[:, :, None, :]
    truth = embeddings.double()[:, None] + mask[:, None, :, None] * shift
    resolution = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert ((out.double() - truth).abs() <= resolution * (truth.abs() + shift.abs())).all()
    untouched = (~mask)[:, None, :, None].expand_as(out)
    assert torch.equal(out[untouched], embeddings[:, None].expand_as(out)[untouched]), "rows outside the mask must be copied bit for bit"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", zeroth_order.KINDS)
def test_out_is_written_in_place_and_alone(backend, kind):
    """A strided slice of the model's input buffer, a non-contiguous source, one shared seed; nothing outside the slice changes."""
    num_directions = 2 * WIDTH[kind]
    source = torch.randn(2, 10, 19)[:, ::2]
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    buffer = torch.full((2, num_directions + 2, 5, 21), 7.0)
    result = perturb_embeddings(source, mask, seeds=9, num_directions=num_directions, smoothing=0.5, kind=kind,
                                out=buffer[:, 1:-1, :, 1:20], backend=backend)
    assert result.data_ptr() == buffer[:, 1:-1, :, 1:20].data_ptr()
    shift = directions(9, num_directions, 19, kind=kind, backend="reference")[:, :, None, :]
    expected = source[:, None] + 0.5 * mask[:, None, :, None] * shift
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)
    buffer[:, 1:-1, :, 1:20] = 7.0
    assert (buffer == 7.0).all()


def test_a_large_output_goes_around_the_caches_with_the_same_bits():
    """Above the streaming threshold, with a row length that is no multiple of the streamed piece, beside a small call."""
    embeddings, mask = torch.randn(1, 70, 1036), torch.ones(1, 70, dtype=torch.bool)
    mask[:, :3] = False
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        source = embeddings.to(dtype)
        large = perturb_embeddings(source, mask, seeds=5, num_directions=64, smoothing=0.02)
        for t in (0, 3, 69):
            small = perturb_embeddings(source[:, t : t + 1], torch.tensor([[True]]), seeds=5, num_directions=64, smoothing=0.02)
            expected = small if mask[0, t] else source[:, None, t : t + 1].expand_as(small)
            assert torch.equal(large[:, :, t : t + 1], expected)


def test_no_broadcast_copy_is_made():
    """Peak extra memory of the call in a fresh process: the output is given, so only the P·D table may appear."""
    code = """
import resource, torch
from llmcore.kernels.zeroth_order import perturb_embeddings
e, m, out = torch.zeros(1, 512, 2048), torch.ones(1, 512, dtype=torch.bool), torch.zeros(1, 10, 512, 2048)
perturb_embeddings(e[:, :2], m[:, :2], seeds=1, num_directions=10, smoothing=0.1, out=out[:, :, :2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
perturb_embeddings(e, m, seeds=2, num_directions=10, smoothing=0.1, out=out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[2])
    assert int(run.stdout) < 16 * 1024, f"{run.stdout} KiB beyond the 40 MiB output"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_cuda_source_compiles(tmp_path):
    import torch.utils.cpp_extension as extension

    root = Path(__file__).resolve().parents[2]
    includes = [f"-I{path}" for path in (root / "csrc", *extension.include_paths())]
    command = ["nvcc", "-c", "-std=c++20", "-arch=sm_90", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA=1", "-Xptxas", "-v",
               *includes,
               str(root / "csrc/cuda/zeroth_order.cu"), "-o", str(tmp_path / "zeroth_order.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    spills = [line for line in run.stderr.splitlines() if "spill" in line and "0 bytes spill stores, 0 bytes spill loads" not in line]
    assert not spills, spills


def test_perturbation_does_not_depend_on_the_batch():
    embeddings, mask = torch.randn(4, 6, 50), torch.ones(4, 6, dtype=torch.bool)
    seeds = query_seeds(13, torch.arange(4))
    together = perturb_embeddings(embeddings, mask, seeds=seeds, num_directions=3, smoothing=0.1)
    for b in range(4):
        alone = perturb_embeddings(embeddings[b : b + 1], mask[b : b + 1], seeds=seeds[b : b + 1], num_directions=3, smoothing=0.1)
        assert torch.equal(together[b : b + 1], alone)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("kind", zeroth_order.KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (2, 5, 1030), (4, 3, 576)])
def test_norm_and_gradient(backend, kind, shape):
    batch, num_directions, dim = shape[0], shape[1] * WIDTH[kind], shape[2]
    generator = torch.Generator().manual_seed(1)
    losses, base = torch.rand(batch, num_directions, generator=generator).double(), torch.rand(batch, generator=generator).double()
    if kind == "orthogonal" and num_directions > dim:
        pytest.skip("more directions than dimensions is an error, tested below")
    for seeds in (torch.arange(batch) + 2**40, 13):
        table = directions(seeds, num_directions, dim, kind=kind, backend=backend)
        truth = zeroth_order.zeroth_order_gradient_reference(losses, base, table, 0.02)
        arguments = {"smoothing": 0.02, "seeds": seeds, "dim": dim, "kind": kind, "backend": backend}
        result = zeroth_order_gradient(losses, base, return_gradient=True, **arguments)
        torch.testing.assert_close(result.norm, truth.norm(dim=1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.gradient, truth, rtol=1e-10, atol=1e-10)
        bare = zeroth_order_gradient(losses, base, **arguments)
        assert bare.gradient is None
        torch.testing.assert_close(bare.norm, result.norm, rtol=1e-12, atol=1e-13)
        given = zeroth_order_gradient(losses, base, smoothing=0.02, directions=table if table.shape[0] > 1 else table[0], backend=backend)
        torch.testing.assert_close(given.norm, result.norm, rtol=1e-10, atol=1e-12)


def test_estimator_on_a_linear_function():
    """F(E) = <s, mean shift>: v_j = mu <s, u_j> exactly, so orthogonal directions in full number return s itself."""
    dim = 24
    slope = torch.randn(dim, dtype=torch.float64)
    rows = directions(7, dim, dim, kind="orthogonal").double()[0]
    result = zeroth_order_gradient((0.02 * rows @ slope)[None], torch.zeros(1, dtype=torch.float64), smoothing=0.02, seeds=7, dim=dim,
                                   kind="orthogonal", return_gradient=True)
    torch.testing.assert_close(result.gradient[0], slope, rtol=0, atol=1e-6)  # float32 rows are orthogonal to 1e-7


def _logistic(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("loss", [
    lambda x, a: x @ a, lambda x, a: (x @ a) ** 2 + x @ x, lambda x, a: _logistic(x @ a),
    lambda x, a: np.floor(10 * _logistic(9 * x @ a)) / 10,
], ids=["linear", "quadratic", "logistic", "lattice"])
def test_estimator_on_known_functions(backend, loss):
    """F of one common shift of the user's rows, in float64, with rows of the independent generator: 1/(P mu) sum_j v_j u_j to 1e-10."""
    dim, num_directions, mu, seed = 29, 6, 0.02, 2**40 + 7
    rng = np.random.default_rng(2)
    at, slope = rng.normal(size=dim), rng.normal(size=dim)
    rows = np.stack([_numpy_row(seed, j, dim) for j in range(num_directions)]).astype(np.float32).astype(np.float64)
    if backend == "triton":  # formed in float32 on the device: the rows that are really added count
        ours = directions(seed, num_directions, dim, backend=backend)[0].double().numpy()
        np.testing.assert_allclose(ours, rows, rtol=0, atol=2e-6)
        rows = ours
    base, values = loss(at, slope), np.array([loss(at + mu * row, slope) for row in rows])
    truth = ((values - base)[:, None] * rows).sum(0) / (num_directions * mu)
    result = zeroth_order_gradient(torch.from_numpy(values)[None], torch.tensor([base], dtype=torch.float64), smoothing=mu, seeds=[seed],
                                   dim=dim, return_gradient=True, backend=backend)
    np.testing.assert_allclose(result.gradient[0].numpy(), truth, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(result.norm.item(), np.linalg.norm(truth), rtol=1e-10)


def test_second_moment_of_a_flat_landscape():
    """Counts of refusals at p = 0.2 everywhere: E|g|² = 2 d p (1-p) / (P N mu²), over 20,000 draws with a seed each, within 5 %."""
    draws, num_directions, samples, dim, mu, p = 20_000, 10, 10, 64, 0.02, 0.2
    generator = np.random.default_rng(0)
    counts = torch.from_numpy(generator.binomial(samples, p, size=(draws, num_directions + 1)))
    result = zeroth_order_gradient(counts[:, 1:], counts[:, 0], smoothing=mu, seeds=torch.arange(draws), dim=dim)
    expected = 2 * dim * p * (1 - p) / (num_directions * samples * mu**2)
    assert (result.norm / samples).square().mean().item() == pytest.approx(expected, rel=0.05)


def test_moments_of_the_directions():
    rows = directions(torch.arange(64), 8, 1000)
    assert abs(rows.mean().item()) < 5 / math.sqrt(rows.numel())
    assert rows.var().item() == pytest.approx(1, abs=0.01)
    assert (rows.double() ** 4).mean().item() == pytest.approx(3, abs=0.06)
    flat = rows.flatten(0, 1).double()
    correlation = flat @ flat.T / 1000 - torch.diag((flat**2).mean(1))
    assert correlation.abs().max().item() < 6.5 / math.sqrt(1000), "rows of different seeds or numbers are independent"


def test_shared_gram_matches_the_rows_that_are_added():
    rows = directions(13, 10, 300)[0].double()
    torch.testing.assert_close(direction_gram(13, 10, 300)[0], rows @ rows.T, rtol=1e-13, atol=1e-11)
    gram = direction_gram(13, 10, 300)
    gram.zero_()  # a caller's change must not reach the cache
    assert direction_gram(13, 10, 300).abs().sum() > 0


def test_gradient_flows_to_the_embeddings():
    embeddings = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda e: perturb_embeddings(e, mask, seeds=3, num_directions=2, smoothing=0.1), (embeddings,))


def test_operators_and_compilation():
    embeddings, mask, seeds = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2])
    torch.library.opcheck(zeroth_order._perturb_op, (embeddings.clone().requires_grad_(), mask, seeds, 2, 0.1, "gaussian", "torch"))
    torch.library.opcheck(zeroth_order._combine_op, (seeds, torch.randn(2, 3).double(), 5, "gaussian", True, "torch"))

    @torch.compile(fullgraph=True, backend="eager")
    def step(e, m, s):
        shifted = perturb_embeddings(e, m, seeds=s, num_directions=4, smoothing=0.1)
        return zeroth_order_gradient(shifted.sum((2, 3)), e.sum((1, 2)), smoothing=0.1, seeds=s, dim=e.shape[2]).norm

    plain = perturb_embeddings(embeddings, mask, seeds=seeds, num_directions=4, smoothing=0.1)
    expected = zeroth_order_gradient(plain.sum((2, 3)), embeddings.sum((1, 2)), smoothing=0.1, seeds=seeds, dim=5).norm
    torch.testing.assert_close(step(embeddings, mask, seeds), expected)


@pytest.mark.parametrize(("change", "error", "name"), [
    ({"smoothing": 0.0}, ValueError, "smoothing"), ({"smoothing": float("nan")}, ValueError, "smoothing"),
    ({"smoothing": float("inf")}, ValueError, "smoothing"), ({"num_directions": -1}, ValueError, "num_directions"),
    ({"kind": "normal"}, ValueError, "kind"), ({"kind": "antithetic", "num_directions": 3}, ValueError, "num_directions"),
    ({"kind": "orthogonal", "num_directions": 8}, ValueError, "num_directions"), ({"seeds": [1, 2, 3]}, ValueError, "seeds"),
    ({"seeds": 2**64}, ValueError, "seeds"), ({"seeds": torch.ones(2)}, ValueError, "seeds"),
    ({"token_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "token_mask"),
    ({"token_mask": torch.ones(2, 3)}, TypeError, "token_mask"),
    ({"token_mask": torch.tensor([[True] * 3, [False] * 3])}, ValueError, "token_mask"),
    ({"embeddings": torch.ones(2, 3, 5, dtype=torch.int64)}, TypeError, "embeddings"),
    ({"embeddings": torch.ones(6, 5)}, ValueError, "embeddings"),
    ({"out": torch.empty(2, 2, 3, 5, dtype=torch.bfloat16)}, ValueError, "out"), ({"out": torch.empty(2, 2, 3, 4)}, ValueError, "out"),
    ({"out": torch.empty(2, 2, 5, 3).transpose(2, 3)}, ValueError, "out"), ({"backend": "nothing"}, ValueError, "backend"),
])
def test_bad_arguments(change, error, name):
    arguments = {"embeddings": torch.randn(2, 3, 5), "token_mask": torch.ones(2, 3, dtype=torch.bool), "seeds": 1, "num_directions": 2,
                 "smoothing": 0.1, **change}
    with pytest.raises(error, match=name):
        perturb_embeddings(arguments.pop("embeddings"), arguments.pop("token_mask"), **arguments)


@pytest.mark.parametrize(("change", "name"), [
    ({"perturbed_losses": torch.rand(2)}, "perturbed_losses"), ({"perturbed_losses": torch.rand(2, 0)}, "perturbed_losses"),
    ({"base_losses": torch.rand(3)}, "base_losses"), ({"seeds": None}, "seeds"), ({"directions": torch.rand(3, 5)}, "seeds"),
    ({"dim": None}, "dim"), ({"smoothing": -1.0}, "smoothing"), ({"seeds": None, "directions": torch.rand(2, 5)}, "directions"),
])
def test_bad_gradient_arguments(change, name):
    arguments = {"perturbed_losses": torch.rand(2, 3), "base_losses": torch.rand(2), "smoothing": 0.1, "seeds": 1, "dim": 5, **change}
    with pytest.raises(ValueError, match=name):
        zeroth_order_gradient(arguments.pop("perturbed_losses"), arguments.pop("base_losses"), **arguments)
