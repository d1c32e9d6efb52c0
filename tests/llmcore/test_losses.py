"""Every loss: value and four gradients against float64 autograd of formulas written here, and against TRL and Liger."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llmcore.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    KTO,
    LOSS_NAMES,
    ORPO,
    RDPO,
    SFT,
    APOZeroUnpaired,
    Combine,
    DiscoPOP,
    DPONorm,
    Hinge,
    IPOMean,
    IPOSum,
    PairLoss,
    Robust,
    SimPO,
    SLiC,
    kto_baseline,
    ld_logps,
    ld_weights,
    loss_from_name,
    wpo_weights,
)


def l(x):  # noqa: E743
    return torch.logaddexp(torch.zeros_like(x), -x)


def log_odds(mean):
    mean = mean.clamp(max=-1e-7)
    return mean - torch.log(-torch.expm1(mean))


def xlogy_kl(x, eps):
    q = torch.sigmoid(x)
    p = torch.sigmoid(-x)
    return q * (-l(x) - math.log(1 - eps)) + p * (-l(-x) - math.log(eps))


def by_rank(upper, lower, b, eps):
    x = b * (upper.sort().values - lower.sort().values)
    return (1 - eps) * l(x) + eps * l(-x)


def discopop(x, tau):
    mu = torch.sigmoid(x / tau)
    return l(x) * torch.sigmoid(-x / tau) + torch.exp(-x.clamp(min=-80)) * mu


# batch loss from (lw, ll, rw, rl, nw, nl); d = Delta
TRUTH = {
    "dpo": lambda w, k, rw, rk, n, m, beta=0.1: l(beta * (w - rw - k + rk)).mean(),
    "cdpo": lambda w, k, rw, rk, n, m, beta=0.1, label_smoothing=0.1: (
        (1 - label_smoothing) * l(beta * (w - rw - k + rk)) + label_smoothing * l(-beta * (w - rw - k + rk))
    ).mean(),
    "robust": lambda w, k, rw, rk, n, m, beta=0.1, label_smoothing=0.1: (
        ((1 - label_smoothing) * l(beta * (w - rw - k + rk)) - label_smoothing * l(-beta * (w - rw - k + rk))) / (1 - 2 * label_smoothing)
    ).mean(),
    "ipo_sum": lambda w, k, rw, rk, n, m, beta=0.1: ((w - rw - k + rk - 1 / (2 * beta)) ** 2).mean(),
    "ipo_mean": lambda w, k, rw, rk, n, m, beta=0.1: (((w - rw) / n - (k - rk) / m - 1 / (2 * beta)) ** 2).mean(),
    "daa_square": lambda w, k, rw, rk, n, m, beta=0.1: ((beta * (w - rw - k + rk) - 1) ** 2).mean(),
    "hinge": lambda w, k, rw, rk, n, m, beta=0.1: F.relu(1 - beta * (w - rw - k + rk)).mean(),
    "slic_hf": lambda w, k, rw, rk, n, m, delta=1.0, lam=0.1: (F.relu(delta - w + k) - lam * w).mean(),
    "rdpo": lambda w, k, rw, rk, n, m, beta=0.1, alpha=0.01: l(beta * (w - rw - k + rk) - alpha * (n - m)).mean(),
    "dpo_norm": lambda w, k, rw, rk, n, m, beta=0.1: l(beta * ((w - rw) / n - (k - rk) / m)).mean(),
    "simpo": lambda w, k, rw, rk, n, m, beta=2.0, gamma=0.5, label_smoothing=0.0: (
        (1 - label_smoothing) * l(beta * (w / n - k / m) - gamma) + label_smoothing * l(gamma - beta * (w / n - k / m))
    ).mean(),
    "cpo": lambda w, k, rw, rk, n, m, beta=0.1, alpha=1.0, label_smoothing=0.0: (
        ((1 - label_smoothing) * l(beta * (w - k)) + label_smoothing * l(-beta * (w - k))).mean() - alpha * w.sum() / n.sum()
    ),
    "orpo": lambda w, k, rw, rk, n, m, beta=0.1: beta * l(log_odds(w / n) - log_odds(k / m)).mean() - w.sum() / n.sum(),
    "exo_pair": lambda w, k, rw, rk, n, m, beta=0.1, label_smoothing=1e-3: xlogy_kl(beta * (w - rw - k + rk), label_smoothing).mean(),
    "nca_pair": lambda w, k, rw, rk, n, m, beta=0.1: (l(beta * (w - rw)) + 0.5 * l(-beta * (w - rw)) + 0.5 * l(-beta * (k - rk))).mean(),
    "bco_pair": lambda w, k, rw, rk, n, m, beta=0.1: (l(beta * (w - rw)) + l(-beta * (k - rk))).mean(),
    "sppo_hard": lambda w, k, rw, rk, n, m, beta=0.1: ((w - rw - 0.5 / beta) ** 2 + (k - rk + 0.5 / beta) ** 2).mean(),
    "apo_zero": lambda w, k, rw, rk, n, m, beta=0.1: (torch.sigmoid(-beta * (w - rw)) + torch.sigmoid(beta * (k - rk))).mean(),
    "apo_down": lambda w, k, rw, rk, n, m, beta=0.1: (torch.sigmoid(beta * (w - rw)) + torch.sigmoid(-beta * (w - rw - k + rk))).mean(),
    "discopop": lambda w, k, rw, rk, n, m, beta=0.1, tau=0.05: discopop(beta * (w - rw - k + rk), tau).mean(),
    "aot": lambda w, k, rw, rk, n, m, beta=0.1, label_smoothing=0.0: by_rank(w - k, rw - rk, beta, label_smoothing).mean(),
    "aot_unpaired": lambda w, k, rw, rk, n, m, beta=0.1, label_smoothing=0.0: by_rank(w - rw, k - rk, beta, label_smoothing).mean(),
    "sft": lambda w, k, rw, rk, n, m: -w.sum() / n.sum(),
    "kto": lambda w, k, rw, rk, n, m, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0: (
        (desirable_weight * torch.sigmoid(-beta * (w - rw)).sum() + undesirable_weight * torch.sigmoid(beta * (k - rk)).sum()) / 2 / len(w)
    ),
}
TRUTH["apo_zero_unpaired"] = TRUTH["kto"]
OPTIONS = [(name, {}) for name in TRUTH] + [
    ("dpo", {"beta": 0.5}),
    ("cdpo", {"label_smoothing": 0.3, "beta": 0.3}),
    ("robust", {"label_smoothing": 0.45}),
    ("ipo_sum", {"beta": 0.01}),
    ("hinge", {"beta": 1.0}),
    ("slic_hf", {"delta": 3.0, "lam": 0.0}),
    ("rdpo", {"alpha": 0.0}),
    ("rdpo", {"alpha": -0.2}),
    ("simpo", {"beta": 10.0, "gamma": 3.0, "label_smoothing": 0.2}),
    ("cpo", {"alpha": 0.0, "label_smoothing": 0.2}),
    ("orpo", {"beta": 2.0}),
    ("exo_pair", {"label_smoothing": 0.2}),
    ("discopop", {"tau": 0.5}),
    ("aot", {"label_smoothing": 0.1}),
    ("aot_unpaired", {"label_smoothing": 0.1}),
    ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.7, "beta": 0.4}),
]


def _pairs(dtype=torch.float64):
    """Ordinary pairs, ties, policy == reference, margins of +-1800 nats, one-token and near-certain completions."""
    generator = torch.Generator().manual_seed(7)
    w, k, rw, rk = (-40 * torch.rand(12, dtype=torch.float64, generator=generator) - 1 for _ in range(4))
    n, m = (torch.randint(2, 40, (12,), generator=generator) for _ in range(2))
    k[1], rk[1], m[1] = w[1], rw[1], n[1]  # tie
    rw[2], rk[2] = w[2], k[2]  # policy == reference
    w[3], k[3], rw[3], rk[3] = -5.0, -905.0, -905.0, -5.0  # margin +1800
    w[4], k[4], rw[4], rk[4] = -905.0, -5.0, -5.0, -905.0  # margin -1800
    n[5], m[6] = 1, 1
    w[7], k[8] = -1e-5, -2e-4  # near-certain
    return [t.to(dtype) for t in (w, k, rw, rk)], (n, m)


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=lambda v: v if isinstance(v, str) else ",".join(f"{k}={x}" for k, x in v.items())
)
def test_value_and_four_gradients_match_float64_autograd(name, options):
    logps, (n, m) = _pairs()
    ours = [t.clone().requires_grad_() for t in logps]
    theirs = [t.clone().requires_grad_() for t in logps]
    out = loss_from_name(name, **options)(*ours, n, m)
    truth = TRUTH[name](*theirs, n.double(), m.double(), **options)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=1e-13)
    out.loss.backward()
    truth.backward()
    for label, a, b in zip(("lw", "ll", "rw", "rl"), ours, theirs, strict=True):
        expected = torch.zeros_like(a) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad, expected, rtol=1e-12, atol=1e-14, msg=lambda text, label=label: f"{name} {label}: {text}")
    torch.testing.assert_close(out.grad_w, ours[0].grad, rtol=1e-15, atol=0)
    torch.testing.assert_close(out.grad_l, ours[1].grad, rtol=1e-15, atol=0)
    assert all(torch.isfinite(t).all() for t in (out.per_pair, out.coef_w, out.coef_l))
    if not out.name.startswith(("kto", "apo_zero_unpaired", "sft")):
        torch.testing.assert_close(out.coef_w / len(n), out.grad_w, rtol=0, atol=1e-18)
        torch.testing.assert_close(out.per_pair.mean(), out.loss)
    beta = options.get("beta", getattr(loss_from_name(name), "beta", 1.0))
    torch.testing.assert_close(out.rewards[0], beta * (logps[0] - logps[2]))


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_float32_follows_float64_and_upstream_gradients_reach_each_pair(name):
    logps, (n, m) = _pairs(torch.float32)
    loss = loss_from_name(name)
    exact = loss(*(t.double() for t in logps), n, m)
    inputs = [t.requires_grad_() for t in logps]
    out = loss(*inputs, n, m)
    assert out.per_pair.dtype == out.coef_w.dtype == torch.float32
    torch.testing.assert_close(out.per_pair.double(), exact.per_pair, rtol=3e-5, atol=2e-5)
    if not loss.batch_level and not loss.unpaired and name != "sft":
        upstream = torch.linspace(-1, 2, len(n))
        out.per_pair.backward(upstream)
        torch.testing.assert_close(inputs[0].grad, upstream * out.coef_w)
        torch.testing.assert_close(inputs[1].grad, upstream * out.coef_l)


def test_policy_equal_to_reference_gives_ln2_to_the_last_bit():
    logp = -torch.rand(9, dtype=torch.float32) * 300
    out = DPO(beta=0.1)(logp, logp * 2, logp, logp * 2)
    ln2 = torch.tensor(math.log(2.0), dtype=torch.float32)
    assert torch.equal(out.per_pair, ln2.expand(9))
    assert torch.equal(out.rewards_chosen, torch.zeros(9))
    assert torch.equal(out.coef_w, torch.full((9,), -0.05))


def test_equal_sequences_have_opposite_coefficients():
    logps, (n, _) = _pairs()
    for name in LOSS_NAMES:
        loss = loss_from_name(name)
        if getattr(loss, "margin_only", False):
            out = loss(logps[0], logps[0], logps[2], logps[2], n, n)
            assert torch.equal(out.coef_w, -out.coef_l), name


def test_orpo_at_certainty_is_finite_and_counted():
    zero, n = torch.zeros(3, requires_grad=True), torch.tensor([1, 5, 9])
    rejected = torch.tensor([-3.0, 0.0, -1e-9], requires_grad=True)
    out = ORPO()(zero, rejected, None, None, n, n)
    out.loss.backward()
    assert out.clamped == 3
    assert all(torch.isfinite(t).all() for t in (out.per_pair, zero.grad, rejected.grad))


def test_discopop_exponent_is_clamped_and_counted():
    low = torch.tensor([-5000.0, -700.0])
    out = DiscoPOP(beta=1.0, tau=1e3)(low, torch.zeros(2), torch.zeros(2), torch.zeros(2))
    assert out.clamped == 2
    assert torch.isfinite(out.per_pair).all()
    assert torch.isfinite(out.coef_w).all()


@pytest.mark.parametrize("loss_class", [DPO, DPONorm, Hinge, IPOSum, IPOMean, EXO, Robust, DiscoPOP])
@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 2.0), ("alpha", 1.0)])
def test_f_divergences(loss_class, divergence, alpha):
    logps, (n, m) = _pairs()
    scores = {
        "forward_kl": lambda r: 1 - torch.exp((-r).clamp(max=80)),
        "js": lambda r: math.log(2) - l(r),
        "alpha": lambda r: r if alpha == 1 else (torch.exp(((alpha - 1) * r).clamp(max=80)) - 1) / (alpha - 1),
    }
    ours = [t.clone().requires_grad_() for t in logps]
    theirs = [t.clone().requires_grad_() for t in logps]
    loss = loss_class(divergence=divergence, alpha=alpha)
    w, k, rw, rk = theirs
    zero = torch.zeros_like(rw)
    truth = TRUTH[loss_class().name](scores[divergence](w - rw), scores[divergence](k - rk), zero, zero, n.double(), m.double())
    out = loss(*ours, n, m)
    torch.testing.assert_close(out.loss, truth, rtol=1e-11, atol=1e-12)
    out.loss.backward()
    truth.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
    extreme = divergence == "forward_kl" or (divergence == "alpha" and alpha != 1)
    assert (out.clamped > 0) == (extreme or loss_class is DiscoPOP)


@pytest.mark.parametrize("z0", [0.0, 3.7])
def test_kto_unequal_lists_class_weights_and_baseline(z0):
    generator = torch.Generator().manual_seed(1)
    w, rw = (torch.randn(5, dtype=torch.float64, generator=generator) * 9 for _ in range(2))
    k, rk = (torch.randn(2, dtype=torch.float64, generator=generator) * 9 for _ in range(2))
    w.requires_grad_()
    k.requires_grad_()
    out = KTO(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5)(w, k, rw, rk, z0=torch.tensor(z0, dtype=torch.float64))
    truth = (1.5 * (1 - torch.sigmoid(0.2 * (w - rw - z0))).sum() + 0.5 * (1 - torch.sigmoid(0.2 * (z0 - k + rk))).sum()) / 7
    torch.testing.assert_close(out.loss, truth, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(out.loss, (w, k)), torch.autograd.grad(truth, (w, k)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.grad_w * 7, out.coef_w)


def test_kto_with_one_empty_list_is_finite():
    w, none = torch.randn(3, requires_grad=True), torch.zeros(0)
    out = KTO()(w, none, torch.zeros(3), none)
    out.loss.backward()
    assert torch.isfinite(w.grad).all()
    assert out.per_pair.shape == (3,)


def test_kto_baseline_averages_then_clamps():
    assert kto_baseline(torch.tensor([3.0, -1.0]), torch.zeros(2)) == 1.0
    assert kto_baseline(torch.tensor([-3.0, 1.0]), torch.zeros(2)) == 0.0
    assert kto_baseline(torch.zeros(0), torch.zeros(0)) == 0.0


def test_combination_adds_values_and_gradients_with_each_terms_own_normaliser():
    logps, (n, m) = _pairs()
    ours = [t.clone().requires_grad_() for t in logps]
    theirs = [t.clone().requires_grad_() for t in logps]
    out = Combine([(DPO(), 0.8), (BCO(), 0.2), (SFT(), 1.0)])(*ours, n, m)
    arguments = (*theirs, n.double(), m.double())
    truth = 0.8 * TRUTH["dpo"](*arguments) + 0.2 * TRUTH["bco_pair"](*arguments) + TRUTH["sft"](*arguments)
    torch.testing.assert_close(out.loss, truth, rtol=1e-13, atol=0)
    out.loss.backward()
    truth.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(out.coef_w / len(n), out.grad_w)
    torch.testing.assert_close(out.per_pair.mean(), out.loss)


def test_nll_over_all_tokens_takes_its_own_sums():
    logps, (n, m) = _pairs()
    full, count = (logps[0] - 11).requires_grad_(), n + 6
    out = CPO(alpha=0.5, nll_over="all")(*logps, n, m, nll_logp=full, nll_count=count)
    bare = CPO(alpha=0.0)(*logps, n, m)
    torch.testing.assert_close(out.loss, bare.loss - 0.5 * full.sum() / count.sum())
    torch.testing.assert_close(torch.autograd.grad(out.loss, full)[0], torch.full_like(full, -0.5 / float(count.sum())))
    torch.testing.assert_close(out.grad_w, bare.grad_w)


def test_weights_divide_by_the_number_of_pairs():
    logps, (n, m) = _pairs()
    weights = torch.linspace(0.1, 2.0, len(n), dtype=torch.float64)
    plain, weighted = DPO()(*logps, n, m), DPO()(*logps, n, m, weights=weights)
    torch.testing.assert_close(weighted.loss, (plain.per_pair * weights).sum() / len(n))
    torch.testing.assert_close(weighted.coef_w, plain.coef_w * weights)


def test_wpo_and_ld_helpers_against_loops():
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor([3, 5, 4, 2])
    logp, sq = (-torch.rand(14, dtype=torch.float64, generator=generator) for _ in range(2))
    rows = logp.split(counts.tolist())
    ratio = [(a - b).mean() for a, b in zip(rows, sq.split(counts.tolist()), strict=True)]
    torch.testing.assert_close(wpo_weights(logp, sq, counts), torch.stack([(ratio[0] + ratio[2]).exp(), (ratio[1] + ratio[3]).exp()]))
    shared = [3, 2, 3, 2]
    expected = torch.stack([r[:s].sum() + 0.3 * r[s:].sum() for r, s in zip(rows, shared, strict=True)])
    torch.testing.assert_close(ld_logps(logp, counts, 0.3), expected)
    assert torch.equal(ld_weights(counts, 1.0), torch.ones(14))


BAD = [
    ("dpo", {"beta": 0.0}),
    ("dpo", {"beta": -1.0}),
    ("dpo", {"beta": math.nan}),
    ("dpo", {"beta": True}),
    ("dpo", {"beta": "0.1"}),
    ("dpo", {"label_smoothing": 0.1}),
    ("hinge", {"label_smoothing": 0.1}),
    ("ipo_sum", {"label_smoothing": 0.1}),
    ("ipo_mean", {"label_smoothing": 0.1}),
    ("cdpo", {"label_smoothing": 0.0}),
    ("cdpo", {"label_smoothing": -0.1}),
    ("robust", {"label_smoothing": 0.5}),
    ("robust", {"label_smoothing": 0.7}),
    ("exo_pair", {"label_smoothing": 0.0}),
    ("simpo", {"gamma": math.inf}),
    ("rdpo", {"alpha": math.nan}),
    ("cpo", {"alpha": -1.0}),
    ("slic_hf", {"lam": -0.1}),
    ("slic_hf", {"beta": 0.1}),
    ("discopop", {"tau": 0.0}),
    ("kto", {"desirable_weight": -1.0}),
    ("dpo", {"divergence": "chi2"}),
    ("nca_pair", {"divergence": "js"}),
    ("rdpo", {"divergence": "js"}),
    ("orpo", {"nll_over": "prompt"}),
    ("ipo", {}),
    ("sigmoid_please", {}),
    ("sft", {"beta": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), BAD, ids=str)
def test_constructor_errors(name, options):
    with pytest.raises(ValueError, match=r"beta|label_smoothing|gamma|alpha|lam|tau|weight|divergence|nll_over|ipo_mean|loss name"):
        loss_from_name(name, **options)


def test_ipo_is_explained():
    with pytest.raises(ValueError, match=r"ipo_sum.*ipo_mean"):
        loss_from_name("ipo")


def test_a_loss_without_its_terms_cannot_be_made():
    for base, missing in ((PairLoss, "_terms"), (type(DPO()).__mro__[1], "_of_margin")):
        with pytest.raises(TypeError, match=missing):
            base()


def test_combination_errors():
    for terms, match in (
        ([], "at least one"),
        ([(DPO(), -0.1)], ">= 0"),
        ([(DPO(), 1.0), (DPO(beta=0.2), 1.0)], "once"),
        ([(KTO(), 1.0)], "paired"),
        ([DPO()], "paired"),
    ):
        with pytest.raises(ValueError, match=match):
            Combine(terms)


def test_call_errors():
    x, n = torch.zeros(3), torch.ones(3)
    cases = [
        (lambda: DPO()(x, x), ValueError, "rw and rl"),
        (lambda: KTO()(x, x, None, None), ValueError, "rw and rl"),
        (lambda: DPO()(x, x[:2], x, x), ValueError, "ll must be"),
        (lambda: DPO()([0.0], x, x, x), TypeError, "lw must be a tensor"),
        (lambda: IPOMean()(x, x, x, x), ValueError, "nw and nl"),
        (lambda: SFT()(x, x), ValueError, "nw and nl"),
        (lambda: AOT()(x, x, x, x, weights=n), ValueError, "WPO"),
        (lambda: CPO(nll_over="all")(x, x, None, None, n, n), ValueError, "nll_logp"),
        (lambda: DPO()(x, x, x, x, nll_logp=x, nll_count=n), ValueError, "nll_logp"),
        (lambda: APOZeroUnpaired()(x, x, x, x, z0=1.0), ValueError, "z0"),
        (lambda: ld_weights(torch.tensor([3, 4]), 1.5), ValueError, "alpha"),
        (lambda: ld_weights(torch.tensor([3, 4, 5]), 0.5, torch.tensor([[0, 1], [0, 2]])), ValueError, "exactly one pair"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()


def test_no_pairs_give_a_zero_loss_connected_to_the_graph():
    empty = torch.zeros(0, requires_grad=True)
    for name in LOSS_NAMES:
        out = loss_from_name(name)(empty, empty, empty, empty, torch.zeros(0), torch.zeros(0))
        assert out.loss.item() == 0.0, name
        assert out.loss.requires_grad


def test_second_derivatives_are_refused_not_zero():
    logps, (n, m) = _pairs()
    w = logps[0].requires_grad_()
    (grad,) = torch.autograd.grad(DPO()(w, *logps[1:], n, m).loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_compiles_without_graph_breaks():
    logps, (n, m) = _pairs()
    w = logps[0].requires_grad_()
    compiled = torch.compile(lambda w: SimPO()(w, *logps[1:], n, m).loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(w), w), torch.autograd.grad(SimPO()(w, *logps[1:], n, m).loss, w))


# ---- parity with the public implementations ---------------------------------------------------------------------------------------


def _trl_loss(name, *, beta=0.1, label_smoothing=0.0, divergence="reverse_kl", weights=None, ld_alpha=None, use_weighting=False, seed=0):
    """TRL's own `_compute_loss` on a model whose per-token outputs are given: (its loss, our inputs for the same batch)."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    generator = torch.Generator().manual_seed(seed)
    pairs, length, prompt = 4, 12, 3
    completion = torch.zeros(2 * pairs, length, dtype=torch.long)
    for row, n in enumerate(torch.randint(2, length - prompt, (2 * pairs,), generator=generator).tolist()):
        completion[row, prompt : prompt + n] = 1
    mask = completion[:, 1:].bool()
    logp, sq = (-torch.rand(2 * pairs, length - 1, generator=generator) * 3 * mask for _ in range(2))
    ref = logp.sum(1) + torch.randn(2 * pairs, generator=generator)
    outputs = SimpleNamespace(log_probs=logp, log_sum_sq_probs=sq, entropy=sq, mean_logits=sq, is_top1=mask)
    identity = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
    names = [name] if isinstance(name, str) else list(name)
    stand_in = SimpleNamespace(
        accelerator=identity,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5,
        beta=beta,
        loss_types=names,
        loss_weights=weights or [1.0] * len(names),
        label_smoothing=label_smoothing,
        args=SimpleNamespace(discopop_tau=0.05),
        use_weighting=use_weighting,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": ref[:pairs],
        "ref_rejected_logps": ref[pairs:],
    }
    loss = trainer._compute_loss(stand_in, lambda **_: outputs, inputs, False)
    counts = mask.sum(1)
    flat = (logp[mask], sq[mask])
    sums = logp.sum(1) if ld_alpha is None else ld_logps(flat[0], counts, ld_alpha)
    ours = (sums[:pairs], sums[pairs:], ref[:pairs], ref[pairs:], counts[:pairs], counts[pairs:])
    return loss, ours, wpo_weights(*flat, counts)


TRL_NAMES = {
    "sigmoid": "dpo",
    "hinge": "hinge",
    "ipo": "ipo_mean",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sft": "sft",
    "sigmoid_norm": "dpo_norm",
}


@pytest.mark.parametrize("trl_name", TRL_NAMES)
def test_trl_loss_types(trl_name):
    smoothed = trl_name in ("exo_pair", "robust", "aot", "aot_unpaired")
    theirs, ours, _ = _trl_loss(trl_name, label_smoothing=0.1 if smoothed else 0.0)
    loss = loss_from_name(TRL_NAMES[trl_name], **({"label_smoothing": 0.1} if smoothed else {}))
    torch.testing.assert_close(loss(*ours).loss, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("trl_name", ["sigmoid", "ipo", "sigmoid_norm", "hinge", "exo_pair", "robust", "discopop"])
def test_trl_divergences(trl_name, divergence):
    theirs, ours, _ = _trl_loss(trl_name, divergence=divergence, label_smoothing=0.1)
    options = {"label_smoothing": 0.1} if trl_name in ("exo_pair", "robust") else {}
    torch.testing.assert_close(
        loss_from_name(TRL_NAMES[trl_name], divergence=divergence, **options)(*ours).loss, theirs, rtol=3e-6, atol=3e-6
    )


def test_trl_weighting_ld_alpha_and_combination():
    theirs, ours, weights = _trl_loss("sigmoid", use_weighting=True)
    torch.testing.assert_close(DPO()(*ours, weights=weights).loss, theirs)
    theirs, ours, _ = _trl_loss("sigmoid", ld_alpha=0.4)
    torch.testing.assert_close(DPO()(*ours).loss, theirs)
    theirs, ours, _ = _trl_loss(["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0])
    torch.testing.assert_close(Combine([(DPO(), 0.8), (BCO(), 0.2), (SFT(), 1.0)])(*ours).loss, theirs)


def test_trl_experimental_cpo_simpo_orpo():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    (w, k, _, _), (n, m) = _pairs(torch.float32)
    base = {
        "alpha": 0.0,
        "beta": 0.3,
        "label_smoothing": 0.2,
        "simpo_gamma": 0.7,
        "accelerator": SimpleNamespace(device=torch.device("cpu")),
    }
    theirs = cpo.cpo_loss(SimpleNamespace(loss_type="sigmoid", **base), w, k)[0]
    torch.testing.assert_close(CPO(beta=0.3, alpha=0.0, label_smoothing=0.2)(w, k).per_pair, theirs)
    theirs = cpo.cpo_loss(SimpleNamespace(loss_type="simpo", **base), w / n, k / m)[0]
    torch.testing.assert_close(SimPO(beta=0.3, gamma=0.7, label_smoothing=0.2)(w, k, None, None, n, m).per_pair, theirs)
    usual = torch.arange(len(n)) < 7  # without the near-certain rows, where float32 odds cancel
    theirs = -orpo.odds_ratio_loss(SimpleNamespace(**base), w / n, k / m)[0]
    ours = ORPO(beta=0.3)(w, k, None, None, n, m)
    nll = -w * len(n) / n.sum()
    torch.testing.assert_close((ours.per_pair - nll)[usual], theirs[usual], rtol=1e-4, atol=1e-5)


LIGER_NAMES = {
    "sigmoid": DPO(),
    "hinge": Hinge(),
    "exo_pair": EXO(label_smoothing=0.1),
    "robust": Robust(),
    "nca_pair": loss_from_name("nca_pair"),
    "bco_pair": BCO(),
    "sppo_hard": loss_from_name("sppo_hard"),
    "apo_zero": loss_from_name("apo_zero"),
    "apo_down": loss_from_name("apo_down"),
    "discopop": DiscoPOP(),
}


@pytest.mark.parametrize("liger_name", LIGER_NAMES)
def test_liger_loss_types(liger_name):
    liger = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss").LigerFusedLinearDPOFunction
    logps, (n, m) = _pairs(torch.float32)
    usual = [t[5:] for t in logps]
    theirs = liger.preference_loss_fn(
        usual[0], usual[1], torch.zeros(14, 1), usual[2], usual[3], loss_type=liger_name, label_smoothing=0.1
    )[0]
    torch.testing.assert_close(LIGER_NAMES[liger_name](*usual, n[5:], m[5:]).loss, theirs)


def test_rdpo_without_penalty_is_dpo():
    logps, (n, m) = _pairs()
    assert torch.equal(RDPO(alpha=0.0)(*logps, n, m).per_pair, DPO()(*logps, n, m).per_pair)


def test_slic_is_active_strictly_inside_the_margin():
    out = SLiC(delta=1.0, lam=0.0)(torch.tensor([0.0, -1.0, -2.0]), torch.tensor([-1.0, -1.5, -1.0]))
    assert out.coef_l.tolist() == [0.0, 1.0, 1.0]
