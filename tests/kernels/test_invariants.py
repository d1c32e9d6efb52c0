"""Invariant products: every algorithm and backend against float64, closed forms, planner, sketches, operators."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llmcore.kernels import backends
from llmcore.kernels.invariants import (
    ALGORITHMS,
    InvariantSums,
    invariant_correlation,
    invariant_matrix,
    invariant_matrix_reference,
    invariant_sums,
    invariant_sums_reference,
    permuted_dots,
    plan_sums,
    sketch_scores,
    tensor_sketch,
    tensor_sketch_reference,
)

# K, R_A, R_B: one, primes, one below and one above the tiles (96 rows, 256 columns, 256 deep), R > K, realistic
SHAPES = [(1, 1, 1), (2, 3, 1), (37, 5, 11), (95, 257, 96), (97, 64, 255), (257, 256, 15), (300, 192, 576)]
BACKENDS = ("cpp", "torch", "reference")


def _available(backend: str) -> str:
    reason = backends.unavailable("invariants", backend, "cpu")
    if reason:
        pytest.skip(reason)
    return backend


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return _available(request.param)


def _factors(seed: int, num_tokens: int, depth_a: int, depth_b: int, dtype=torch.float32, offset: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    left_a, right_a = (torch.randn(num_tokens, depth_a, generator=generator, dtype=torch.float64) + offset for _ in range(2))
    left_b, right_b = (torch.randn(num_tokens, depth_b, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(t.to(dtype) for t in (left_a, right_a, left_b, right_b))


def _close(ours: InvariantSums, truth: InvariantSums, tolerance: float) -> None:
    assert ours.n == truth.n
    scale_a, scale_b = math.sqrt(truth.dot_aa), math.sqrt(truth.dot_bb)
    for name, scale in (("sum_a", scale_a * truth.n**0.5), ("sum_b", scale_b * truth.n**0.5),
                        ("dot_aa", scale_a**2), ("dot_bb", scale_b**2), ("dot_ab", scale_a * scale_b)):
        error = abs(getattr(ours, name) - getattr(truth, name)) / scale
        assert error <= tolerance, f"{name}: {getattr(ours, name)!r}, truth {getattr(truth, name)!r}, relative error {error:.2e}"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_against_float64(shape, algorithm, backend):
    factors = _factors(1, *shape)
    truth = invariant_sums_reference(*(t.double() for t in factors))
    _close(invariant_sums(*factors, algorithm=algorithm, backend=backend), truth, 1e-6)
    _close(invariant_sums(*(t.double() for t in factors), algorithm=algorithm, backend=backend), truth, 1e-12)


def test_strided_and_half_factors(backend):
    left_a, right_a, left_b, right_b = _factors(2, 70, 20, 20)
    wide = torch.randn(70, 45)
    wide[:, 1:41:2] = left_a
    view, columns = wide[:, 1:41:2], right_a.T.contiguous().T
    truth = invariant_sums_reference(*(t.double() for t in (left_a, right_a, left_b, right_b)))
    for algorithm in ALGORITHMS:
        _close(invariant_sums(view, columns, left_b, right_b, algorithm=algorithm, backend=backend), truth, 1e-6)
    half = tuple(t.bfloat16() for t in (left_a, right_a, left_b, right_b))
    truth = invariant_sums_reference(*(t.double() for t in half))
    for algorithm in ALGORITHMS:
        _close(invariant_sums(*half, algorithm=algorithm, backend=backend), truth, 1e-6)


def test_correlation_is_pearson_of_the_matrices_and_algorithms_agree(backend):
    factors = _factors(3, 200, 40, 31)
    left = factors[0]
    other = left + 0.5 * torch.randn(200, 40, generator=torch.Generator().manual_seed(4))
    a, b = (x.double() @ factors[1].double().T for x in (left, other))
    pearson = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
    found = {name: invariant_correlation(left, factors[1], other, factors[1], algorithm=name, backend=backend) for name in ALGORITHMS}
    assert max(abs(value - pearson) for value in found.values()) < 1e-6, found
    assert abs(invariant_correlation(left, factors[1], other, factors[1], normalize="none", backend=backend) - cosine) < 1e-6
    assert abs(cosine - pearson) > 0.01, "the factors must have a common mean, or the two cannot be told apart"


def test_mixing_cancels_and_constants_have_no_correlation(backend):
    left, right, *_ = _factors(5, 150, 33, 1)
    # A condition number of 1e3: exact in the stored factors to 1e-4 of an entry or so, not to be squared by the algorithm.
    u, v = (torch.linalg.qr(torch.randn(33, 33, generator=torch.Generator().manual_seed(s), dtype=torch.float64))[0] for s in (6, 7))
    mixing = u @ torch.diag(torch.logspace(-1.5, 1.5, 33, dtype=torch.float64)) @ v
    inverse = torch.linalg.inv(mixing)
    mixed = (left.double() @ mixing).float(), (right.double() @ inverse.T).float()
    for algorithm in ALGORITHMS:
        assert abs(invariant_correlation(left, right, *mixed, algorithm=algorithm, backend=backend) - 1) < 1e-6
        assert abs(invariant_correlation(left, right, -3 * left, right, algorithm=algorithm, backend=backend) + 1) < 1e-6
        zero = torch.zeros_like(left)
        assert math.isnan(invariant_correlation(left, right, zero, right, algorithm=algorithm, backend=backend))
        ones = torch.ones_like(left)
        assert math.isnan(invariant_correlation(left, right, ones, ones, algorithm=algorithm, backend=backend))


def test_matrix(backend, error_rule):
    for shape in SHAPES:
        left, right, *_ = _factors(7, *shape)
        truth = invariant_matrix_reference(left.double(), right.double())
        error_rule("plain", invariant_matrix(left, right, backend=backend), truth, left @ right.T, atol=1e-5 * shape[1] ** 0.5)
        assert invariant_matrix(left.double(), right.double(), backend=backend).sub(truth).abs().max() < 1e-10
        if shape[0] < 2:
            continue
        truth = invariant_matrix_reference(left.double(), right.double(), standardize=True)
        standard = invariant_matrix(left, right, standardize=True, backend=backend)
        error_rule("standardised", standard, truth, invariant_matrix_reference(left, right, standardize=True), atol=3e-6)
        assert abs(standard.double().std().item() - 1) < 1e-6
        narrow = invariant_matrix(left, right, standardize=True, out_dtype=torch.bfloat16, backend=backend)
        assert narrow.dtype == torch.bfloat16
        assert (narrow.double() - truth).abs().max() <= truth.abs().max() * 2**-8
    with pytest.raises(ValueError, match="constant"):
        invariant_matrix(torch.ones(5, 2), torch.ones(5, 2), standardize=True, backend=backend)


def test_matrix_gradients(backend):
    left, right, *_ = (t.requires_grad_() for t in _factors(8, 7, 3, 2, torch.float64))
    for standardize in (False, True):
        assert torch.autograd.gradcheck(lambda x, y, s=standardize: invariant_matrix(x, y, standardize=s, backend=backend), (left, right))
    upstream = torch.randn(7, 7, dtype=torch.float64)
    out = invariant_matrix(left, right, standardize=True, backend=backend)
    expected = torch.autograd.grad(invariant_matrix_reference(left, right, standardize=True), (left, right), upstream)
    for _ in range(2):
        ours = torch.autograd.grad(out, (left, right), upstream, retain_graph=True)
        assert all((x - y).abs().max() < 1e-10 for x, y in zip(ours, expected, strict=True))


def test_operator_contract(backend):
    left_a, right_a, left_b, right_b = _factors(9, 12, 5, 4)
    scalar = torch.tensor(0.5, dtype=torch.float64)
    tracked = left_a.clone().requires_grad_()
    torch.library.opcheck(torch.ops.llmcore.invariant_product, (tracked, right_a, scalar, scalar, torch.float32, backend))
    for algorithm in ALGORITHMS:
        torch.library.opcheck(torch.ops.llmcore.invariant_sums, (left_a, right_a, left_b, right_b, algorithm, backend))
    torch.library.opcheck(torch.ops.llmcore.tensor_sketch, (left_a, right_a, 8, 1, True, True, backend))
    compiled = torch.compile(lambda x, y: invariant_matrix(x, y, standardize=True, backend=backend), fullgraph=True, backend="aot_eager")
    assert (compiled(left_a, right_a) - invariant_matrix_reference(left_a, right_a, standardize=True)).abs().max() < 1e-5


def test_threads_do_not_change_the_result():
    _available("cpp")
    factors = _factors(10, 700, 300, 90)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([invariant_sums(*factors, algorithm=name, backend="cpp") for name in ("factor", "stream")])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_sketch(backend):
    for num_tokens, depth, width in ((1, 1, 1), (37, 5, 16), (97, 300, 33)):
        left, right, *_ = _factors(11, num_tokens, depth, 1)
        for center, normalize in ((True, True), (False, False)):
            truth = tensor_sketch_reference(left.double(), right.double(), width=width, seed=5, center=center, normalize=normalize)
            ours = tensor_sketch(left, right, width=width, seed=5, center=center, normalize=normalize, backend=backend)
            assert (ours - truth).abs().max() <= 2e-6 * max(1.0, truth.abs().max().item())
    assert not torch.equal(tensor_sketch(left, right, width=33, seed=6, backend=backend), ours)


def test_sketch_hashes_never_change():
    """Stored fingerprints outlive versions: the numbers of one sketch, from the float64 reference of the first version."""
    left = torch.arange(12, dtype=torch.float64).view(6, 2).sin()
    found = tensor_sketch_reference(left, left.flip(0), width=5, seed=2024, center=False, normalize=False)
    golden = torch.tensor(GOLDEN_SKETCH, dtype=torch.float64)
    assert (found - golden).abs().max() < 1e-12, found.tolist()


GOLDEN_SKETCH = [0.9324768630691196, 2.5427604403169948, 1.6463909323495978, 2.4227982376708725, 0.3517388659190843]


def test_sketch_error_follows_its_formula():
    """Root-mean-square error of the estimated correlation over 24 seeds <= 1.5 (1 - c²) / sqrt(width)."""
    generator = torch.Generator().manual_seed(12)
    left, right = (torch.randn(512, 48, generator=generator) for _ in range(2))
    for noise in (0.2, 1.0, 30.0):
        other = left + noise * torch.randn(512, 48, generator=generator)
        truth = invariant_correlation(left, right, other, right)
        for width in (256, 1024):
            errors = [(tensor_sketch(left, right, width=width, seed=s) @ tensor_sketch(other, right, width=width, seed=s)).item() - truth
                      for s in range(24)]
            assert math.sqrt(sum(e * e for e in errors) / len(errors)) <= 1.5 * (1 - truth**2) / math.sqrt(width) + 1e-6


def test_sketch_scores():
    stored = torch.randn(37, 3 * 41).half()
    query = torch.randn(3 * 41)
    truth = (stored.double().view(37, 3, 41) * query.double().view(3, 41)).sum(2)
    assert (sketch_scores(stored, query, channels=3) - truth).abs().max() < 1e-4
    assert sketch_scores(stored[:0], query, channels=3).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_permuted_dots(dtype, backend, monkeypatch):
    monkeypatch.setenv("LLMCORE_BACKEND", backend)
    a, b = torch.randn(39, 2 * 39).to(dtype)[:, ::2], torch.randn(39, 39).to(dtype)
    orders = torch.stack([torch.arange(39), *(torch.randperm(39) for _ in range(4))])
    truth = torch.stack([(a.double() * b.double()[order][:, order]).sum() for order in orders])
    found = permuted_dots(a, b, orders)
    assert found.dtype == torch.float64
    assert (found - truth).abs().max() <= {torch.float64: 1e-12}.get(dtype, 1e-4)
    assert permuted_dots(a, b, orders[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"orders must lie in \[0, 39\), got 1 to 39"):
        permuted_dots(a, b, orders + 1)
    with pytest.raises(ValueError, match="a and b must be"):
        permuted_dots(a, b[:3], orders)


def test_nothing_of_size_k_squared(tmp_path):
    """K = 32,768: one stored matrix would be 4.3 GB; sums and sketch stay below 150 MB more than before."""
    _available("cpp")
    code = """
import resource, torch
from llmcore.kernels.invariants import invariant_sums, tensor_sketch
torch.set_num_threads(1)
left, right = torch.randn(32768, 24), torch.randn(32768, 24)
invariant_sums(left[:64], right[:64], left[:64], right[:64]), tensor_sketch(left[:64], right[:64], width=64, seed=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sums = invariant_sums(left, right, right, left)
sketch = tensor_sketch(left, right, width=1024, seed=0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(run.stdout) < 150e6


def test_planner_takes_the_cheapest_and_says_why():
    assert plan_sums(4096, 192, 192).algorithm == "factor"
    wide = plan_sums(512, 4096, 4096, memory_budget=1 << 30)
    assert wide.algorithm in ("stream", "direct")
    assert "512" in wide.reason
    assert "GFLOP" in wide.reason
    tight = plan_sums(32768, 20000, 20000, memory_budget=6 << 30)
    assert tight.algorithm == "stream"
    assert tight.reason.endswith("(direct would take more than the budget of 6442450944 bytes)")
    assert wide.seconds[wide.algorithm] == min(wide.seconds.values())
    assert wide.to_json()["peak_bytes"]["direct"] == 2 * 512 * 512 * 4


def test_errors_name_the_argument():
    good = torch.randn(4, 3)
    with pytest.raises(ValueError, match="right_a must be \\(4, 3\\)"):
        invariant_sums(good, good[:, :2], good, good)
    with pytest.raises(ValueError, match="left_b must have K = 4"):
        invariant_sums(good, good, good[:3], good[:3])
    with pytest.raises(ValueError, match="dtype"):
        invariant_sums(good, good, good.double(), good.double())
    with pytest.raises(ValueError, match="algorithm"):
        invariant_sums(good, good, good, good, algorithm="fast")
    with pytest.raises(ValueError, match="normalize"):
        invariant_correlation(good, good, good, good, normalize="row")
    with pytest.raises(TypeError, match="left"):
        invariant_matrix([1.0], good)
    with pytest.raises(ValueError, match="width"):
        tensor_sketch(good, good, width=0, seed=1)
    with pytest.raises(ValueError, match="seed"):
        tensor_sketch(good, good, width=4, seed=2**65)
    with pytest.raises(RuntimeError, match="float32"):
        invariant_sums(*[good.double()] * 4, backend="triton") if backends.interpreting() else _refuse_triton(good)


def _refuse_triton(good: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        invariant_sums(good, good, good, good, backend="triton")
    raise RuntimeError("float32")


@pytest.mark.skipif(backends.interpreting(), reason="this is the interpreter's run")
def test_triton_in_the_interpreter(in_the_interpreter):
    """The same comparisons in Triton's interpreter."""
    pytest.importorskip("triton")
    assert "skipped" not in in_the_interpreter(__file__, "-k", "interpreted")


@pytest.mark.skipif(not backends.interpreting(), reason="run by test_triton_in_the_interpreter")
def test_interpreted_kernels():
    for shape in ((1, 1, 1), (37, 5, 11), (97, 33, 64)):
        factors = _factors(13, *shape)
        truth = invariant_sums_reference(*(t.double() for t in factors))
        for algorithm in ALGORITHMS:
            _close(invariant_sums(*factors, algorithm=algorithm, backend="triton"), truth, 1e-6)
        half = tuple(t.half() for t in factors)
        _close(invariant_sums(*half, algorithm="stream", backend="triton"), invariant_sums_reference(*(t.double() for t in half)), 1e-6)
        if shape[0] > 1:
            truth_matrix = invariant_matrix_reference(factors[0].double(), factors[1].double(), standardize=True)
            assert (invariant_matrix(*factors[:2], standardize=True, backend="triton") - truth_matrix).abs().max() < 1e-5
        truth_sketch = tensor_sketch_reference(factors[0].double(), factors[1].double(), width=16, seed=1)
        assert (tensor_sketch(*factors[:2], width=16, seed=1, backend="triton") - truth_sketch).abs().max() < 1e-5
