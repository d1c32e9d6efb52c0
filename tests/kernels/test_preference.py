"""fused_preference_loss against the unfused float64 loss: every schedule, layout and option, and what must not cost anything."""

import math

import pytest
import torch
from llmcore.kernels.linear_logprob import fused_linear_logprob
from llmcore.kernels.linear_logprob_results import LinearLogprob
from llmcore.kernels.preference import fused_preference_loss, preference_loss_reference

from llmcore.losses import AOT, BCO, DPO, KTO, LOSS_NAMES, ORPO, SFT, Hinge, IPOSum, kto_baseline, ld_logps, loss_from_name, wpo_weights

S, T, D, V = 8, 11, 40, 1003


def _inputs(seed=0, dtype=torch.float64, s=S, t=T, d=D, v=V):
    """Unshifted labels, ragged completions after ragged prompts."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(s, t, d, dtype=torch.float64, generator=g).to(dtype)
    weight = (torch.randn(v, d, dtype=torch.float64, generator=g) / d**0.5).to(dtype)
    labels = torch.randint(v, (s, t), generator=g)
    for row in range(s):
        start = 1 + int(torch.randint(3, (1,), generator=g))
        stop = start + 1 + int(torch.randint(t - start, (1,), generator=g))
        labels[row, :start] = -100
        labels[row, stop:] = -100
    ref = -8.0 * (labels[:, 1:] != -100).sum(1) + torch.randn(s, generator=g)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, ref.to(torch.float64)


def _unfused(hidden, weight, labels, loss, ref, **options):
    h, w = (x.detach().double().requires_grad_(x.requires_grad) for x in (hidden, weight))
    value = preference_loss_reference(h, w, labels, loss=loss, ref_logp=None if ref is None else ref.double(), shift=1, **options)
    return value, torch.autograd.grad(value, [x for x in (h, w) if x.requires_grad], allow_unused=True)


def _paired(names=LOSS_NAMES):
    return [name for name in names if not loss_from_name(name).unpaired]


# Bytes that hold about `rows` float64 rows beside the implementation's scratch.
def _budget(rows, backend="torch", num_rows=64, itemsize=8):
    import importlib

    module = importlib.import_module(f"llmcore.kernels.linear_logprob_{backend}")
    return module.scratch_bytes(num_rows, D, V, False) + rows * V * itemsize


@pytest.mark.parametrize("name", _paired())
@pytest.mark.parametrize("mode", ["recompute", "resident", "blocks"])
def test_every_paired_loss_in_every_schedule(name, mode):
    hidden, weight, labels, ref = _inputs()
    loss = loss_from_name(name)
    truth, grads = _unfused(hidden, weight, labels, loss, ref)
    num_rows = int((labels[:, 1:] != -100).sum())
    options = {"mode": mode} if mode != "blocks" else {"memory_budget": _budget(20, num_rows=num_rows)}
    result = fused_preference_loss(hidden, weight, labels, loss=loss, ref_logp=ref, shift=1, backend="torch", **options)
    torch.testing.assert_close(result.loss, truth, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(result.loss, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    everyone = result.stats.rows_backward == result.stats.rows_scored
    if mode == "blocks" and not loss.batch_level:
        assert result.stats.mode == "resident"
        assert not everyone or result.stats.gemm_units == pytest.approx(3.0)
    if mode == "recompute":
        assert not everyone or result.stats.gemm_units == pytest.approx(4.0)
    assert everyone or name in ("slic_hf", "sft")


def test_blocks_agree_with_one_piece_in_every_field():
    hidden, weight, labels, ref = _inputs(1)
    combined = [(DPO(), 0.8), (BCO(), 0.2), (SFT(), 1.0)]
    outputs = ("entropy", "token_accuracy")
    whole = fused_preference_loss(hidden, weight, labels, loss=combined, ref_logp=ref, shift=1, backend="torch", outputs=outputs)
    parts = fused_preference_loss(
        hidden, weight, labels, loss=combined, ref_logp=ref, shift=1, backend="torch", outputs=outputs, memory_budget=_budget(20)
    )
    assert whole.stats.mode == parts.stats.mode == "resident"
    for name in (
        "per_pair",
        "chosen_logp",
        "rejected_logp",
        "logp",
        "margins",
        "coef_w",
        "coef_l",
        "accuracy",
        "ties",
        "entropy",
        "token_accuracy",
        "rewards_chosen",
        "counts",
    ):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), msg=lambda text, name=name: f"{name}: {text}")
    assert parts.metrics() == pytest.approx(whole.metrics())


def test_one_pair_longer_than_the_budget_spills_to_recomputation():
    hidden, weight, labels, ref = _inputs(2, s=4)
    _, grads = _unfused(hidden, weight, labels, DPO(), ref)
    counts = (labels[:, 1:] != -100).sum(1)
    rows = int((counts[:2] + counts[2:]).min()) - 1
    result = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1, backend="torch", memory_budget=_budget(rows))
    assert result.stats.mode == "mixed"
    assert 3.0 < result.stats.gemm_units < 4.0
    for ours, theirs in zip(torch.autograd.grad(result.loss, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_blocks_hand_their_gradients_over_once():
    hidden, weight, labels, ref = _inputs()
    result = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1, backend="torch", memory_budget=_budget(20))
    (3.0 * result.loss).backward(retain_graph=True)
    _, grads = _unfused(hidden, weight, labels, DPO(), ref)
    torch.testing.assert_close(weight.grad, 3.0 * grads[1], rtol=1e-9, atol=1e-13)
    with pytest.raises(RuntimeError, match="mode='recompute'"):
        result.loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_low_precision_against_float64_on_the_same_inputs(dtype, backend):
    hidden, weight, labels, ref = _inputs(3, dtype)
    truth, grads = _unfused(hidden, weight, labels, DPO(), ref)
    tolerance = 5e-7 if dtype == torch.float32 else 4e-3
    plain = preference_loss_reference(hidden, weight, labels, loss=DPO(), ref_logp=ref.float(), shift=1)
    baseline = torch.autograd.grad(plain, (hidden, weight))
    for options in ({"mode": "recompute"}, {"mode": "resident"}, {"memory_budget": _budget(20, itemsize=4)}):
        result = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref.float(), shift=1, backend=backend, **options)
        assert result.loss.dtype == torch.float32
        torch.testing.assert_close(result.loss.double(), truth, rtol=0, atol=5e-5)
        for ours, theirs, base in zip(torch.autograd.grad(result.loss, (hidden, weight)), grads, baseline, strict=True):
            allowed = max(tolerance, 2 * float((base.double() - theirs).norm() / theirs.norm()))
            assert (ours.double() - theirs).norm() <= allowed * theirs.norm(), (backend, dtype, options)


def test_policy_equal_to_reference_is_ln2_to_the_last_bit():
    hidden, weight, labels, _ = _inputs(4, torch.float32)
    frozen = (hidden.detach(), weight.detach())
    ln2 = torch.tensor(math.log(2.0))
    for options in ({"ref": frozen}, {"ref": (hidden.detach(), weight)}):  # two launches, one launch
        result = fused_preference_loss(hidden, weight, labels, loss=DPO(), shift=1, **options)
        assert torch.equal(result.per_pair, ln2.expand(S // 2))
        assert result.accuracy == 0.5
        assert result.ties == 1.0
    alone = torch.cat(
        [
            fused_preference_loss(hidden[[i, i + 4]], weight, labels[[i, i + 4]], loss=DPO(), ref=frozen_pair, shift=1).per_pair
            for i in range(4)
            for frozen_pair in [(hidden.detach()[[i, i + 4]], weight.detach())]
        ]
    )
    assert torch.equal(alone, ln2.expand(S // 2))


def test_reference_rows_ride_in_the_policy_launch_when_the_head_is_shared():
    hidden, weight, labels, _ = _inputs(5)
    ref_hidden = hidden.detach() + 0.1
    apart = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref=(ref_hidden, weight.detach().clone()), shift=1, backend="torch")
    joint = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref=(ref_hidden, weight), shift=1, backend="torch")
    assert joint.stats.rows_scored == 2 * apart.stats.rows_scored
    for ours, theirs in zip(
        torch.autograd.grad(joint.loss, (hidden, weight)), torch.autograd.grad(apart.loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("mode", ["recompute", "resident"])
def test_inactive_pairs_leave_the_backward_and_a_batch_of_them_costs_nothing(mode, monkeypatch):
    released = []
    monkeypatch.setattr(LinearLogprob, "release", lambda scores, release=LinearLogprob.release: released.append(scores) or release(scores))
    hidden, weight, labels, ref = _inputs(6, torch.float32)
    behind = ref.clone()
    behind[S // 2 :] += 1e4  # rejected far likelier under the reference: every margin is met
    result = fused_preference_loss(hidden, weight, labels, loss=Hinge(), ref_logp=behind, shift=1, mode=mode)
    assert len(released) == 1  # kept logits do not wait for the backward
    result.loss.backward()
    assert result.loss == 0
    assert result.stats.rows_backward == 0
    assert result.stats.gemm_units == pytest.approx(1.0)
    assert not weight.grad.any()
    assert not hidden.grad.any()
    behind[S // 2] -= 2e4  # one pair active
    result = fused_preference_loss(hidden, weight, labels, loss=Hinge(), ref_logp=behind, shift=1, mode=mode)
    result.loss.backward()
    assert len(released) == 1
    assert result.stats.rows_backward == int(result.counts[[0, S // 2]].sum())
    assert result.metrics()["grad_coef/active"] == 0.25


def test_frozen_head_computes_no_weight_gradient():
    hidden, weight, labels, ref = _inputs(7)
    weight.requires_grad_(False)
    truth, (grad,) = _unfused(hidden, weight, labels, IPOSum(), ref)
    for outputs in ((), ("entropy",)):
        result = fused_preference_loss(hidden, weight, labels, loss=IPOSum(), ref_logp=ref, shift=1, backend="torch", outputs=outputs)
        torch.testing.assert_close(torch.autograd.grad(result.loss, hidden)[0], grad, rtol=1e-9, atol=1e-12)
        assert result.stats.gemm_units == pytest.approx(2.0)
    torch.testing.assert_close(result.loss, truth)


def _pack(hidden, labels):
    lengths = torch.tensor([3 + i % (T - 2) for i in range(len(labels))])
    packed_h = torch.cat([hidden.detach()[i, :n] for i, n in enumerate(lengths)])
    packed_l = torch.cat([labels[i, :n] for i, n in enumerate(lengths)])
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    padded = labels.clone()
    for i, n in enumerate(lengths):
        padded[i, n:] = -100
    return packed_h.requires_grad_(), packed_l, cu, padded


@pytest.mark.parametrize("blocks", [False, True])
def test_packed_equals_padded(blocks):
    hidden, weight, labels, _ = _inputs(8)
    labels[:, 1] = torch.arange(S)  # nobody is empty after packing
    packed_h, packed_l, cu, padded = _pack(hidden, labels)
    options = {"memory_budget": _budget(12)} if blocks else {}
    a = fused_preference_loss(hidden, weight, padded, loss=ORPO(), shift=1, backend="torch")
    b = fused_preference_loss(packed_h, weight, packed_l, loss=ORPO(), shift=1, cu_seqlens=cu, backend="torch", **options)
    torch.testing.assert_close(a.logp, b.logp, rtol=1e-13, atol=0)
    assert torch.equal(a.counts, b.counts)
    for ours, theirs in zip(*(torch.autograd.grad(r.loss, weight) for r in (a, b)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("budget", [None, 16])
def test_many_rejected_per_chosen(budget):
    hidden, weight, labels, ref = _inputs(9)
    pairs = torch.tensor([[0, 1], [0, 2], [3, 4], [0, 5], [6, 7]])
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    truth = preference_loss_reference(h, w, labels, loss=DPO(), ref_logp=ref, shift=1, pair_index=pairs)
    grads = torch.autograd.grad(truth, (h, w))
    result = fused_preference_loss(
        hidden,
        weight,
        labels,
        loss=DPO(),
        ref_logp=ref,
        shift=1,
        pair_index=pairs,
        backend="torch",
        memory_budget=None if budget is None else _budget(budget),
    )
    torch.testing.assert_close(result.loss, truth)
    for ours, theirs in zip(torch.autograd.grad(result.loss, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)
    with pytest.warns(UserWarning, match="in no pair"):
        fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1, pair_index=pairs[:2])


@pytest.mark.parametrize("budget", [None, 16])
def test_kto(budget):
    hidden, weight, labels, ref = _inputs(10)
    desirable = torch.tensor([True, False, True, True, False, True, False, True])
    loss = KTO(desirable_weight=1.2, undesirable_weight=0.6)
    z0 = kto_baseline(torch.tensor([2.0, 1.0]), torch.zeros(2))
    result = fused_preference_loss(
        hidden,
        weight,
        labels,
        loss=loss,
        ref_logp=ref,
        desirable=desirable,
        z0=z0,
        shift=1,
        backend="torch",
        memory_budget=None if budget is None else _budget(budget),
    )
    logp = fused_linear_logprob(hidden, weight, labels, shift=1, backend="reference").logp.sum(1)
    sign = torch.where(desirable, torch.tensor(1.0, dtype=torch.float64), -1.0)
    factor = torch.where(desirable, torch.tensor(1.2, dtype=torch.float64), 0.6)
    expected = factor * torch.sigmoid(-sign * 0.1 * (logp - ref - 1.5))
    torch.testing.assert_close(result.per_pair, expected.detach())
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, (hidden, weight)), torch.autograd.grad(expected.mean(), (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    assert result.chosen_logp.shape == (5,)


def _with_common_prefix(seed=11):
    hidden, weight, labels, ref = _inputs(seed)
    data, half = hidden.detach().clone(), S // 2
    labels[:, :2] = -100
    labels[:, 2:5] = torch.randint(V, (S, 3))
    labels[half:, :4] = labels[:half, :4]  # two common completion tokens at least
    labels[half:, 4] = (labels[:half, 4] + 1) % V  # then the two part
    labels[half, 2:] = labels[0, 2:]  # one pair identical
    data[half:, :4] = data[:half, :4]  # rows that predict them, and the row after
    data[half] = data[0]
    return data.requires_grad_(), weight, labels, ref


@pytest.mark.filterwarnings("ignore:.*identical chosen and rejected")
@pytest.mark.parametrize("loss", [DPO(), ORPO(), BCO()], ids=lambda x: x.name)
@pytest.mark.parametrize("budget", [None, 16])
def test_shared_prefix_rows_are_scored_once_and_gradients_move_to_the_first_copy(loss, budget):
    hidden, weight, labels, ref = _with_common_prefix()
    plain = fused_preference_loss(hidden, weight, labels, loss=loss, ref_logp=ref, shift=1, backend="torch", mode="recompute")
    shared = fused_preference_loss(
        hidden,
        weight,
        labels,
        loss=loss,
        ref_logp=ref,
        shift=1,
        backend="torch",
        shared_prefix=True,
        memory_budget=None if budget is None else _budget(budget),
    )
    assert shared.stats.rows_scored < plain.stats.rows_scored
    torch.testing.assert_close(shared.loss, plain.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(shared.logp, plain.logp, rtol=1e-13, atol=0)
    assert shared.identical == 1
    (h0, w0), (h1, w1) = (torch.autograd.grad(r.loss, (hidden, weight)) for r in (plain, shared))
    torch.testing.assert_close(w1, w0, rtol=1e-9, atol=1e-13)
    half = S // 2
    torch.testing.assert_close(h1[:half, :3] + h1[half:, :3], h0[:half, :3] + h0[half:, :3], rtol=1e-9, atol=1e-13)
    if loss.margin_only:
        assert not h1[0].any()  # the identical pair: nothing left
        assert shared.stats.rows_backward <= plain.stats.rows_scored - 2 * (plain.stats.rows_scored - shared.stats.rows_scored)


def test_wpo_and_ld_alpha_against_the_helpers():
    hidden, weight, labels, ref = _inputs(12)
    scores = fused_linear_logprob(hidden, weight, labels, shift=1, outputs=("logp", "log_sum_sq"), backend="reference")
    mask = (labels != -100) & (torch.arange(T) >= 1)
    counts = mask.sum(1)
    half = S // 2
    factor = wpo_weights(scores.logp.detach()[mask], scores.log_sum_sq[mask], counts)
    sums = scores.logp.sum(1)
    expected = DPO()(sums[:half], sums[half:], ref[:half], ref[half:], weights=factor).loss
    for budget in (None, 16):
        got = fused_preference_loss(
            hidden,
            weight,
            labels,
            loss=DPO(),
            ref_logp=ref,
            shift=1,
            wpo=True,
            backend="torch",
            memory_budget=None if budget is None else _budget(budget),
        )
        torch.testing.assert_close(got.loss, expected)
        torch.testing.assert_close(torch.autograd.grad(got.loss, weight), torch.autograd.grad(expected, weight, retain_graph=True))
        tail = fused_preference_loss(
            hidden,
            weight,
            labels,
            loss=DPO(),
            ref_logp=ref,
            shift=1,
            ld_alpha=0.3,
            backend="torch",
            memory_budget=None if budget is None else _budget(budget),
        )
        ld = ld_logps(scores.logp[mask], counts, 0.3)
        expected_ld = DPO()(ld[:half], ld[half:], ref[:half], ref[half:]).loss
        torch.testing.assert_close(tail.loss, expected_ld)
        torch.testing.assert_close(torch.autograd.grad(tail.loss, weight), torch.autograd.grad(expected_ld, weight, retain_graph=True))


def test_micro_batches_with_global_normalisers_add_up():
    hidden, weight, labels, ref = _inputs(13)
    loss = [(DPO(), 0.5), (SFT(), 1.0)]
    whole = fused_preference_loss(hidden, weight, labels, loss=loss, ref_logp=ref, shift=1)
    total = sum(
        fused_preference_loss(
            hidden[rows],
            weight,
            labels[rows],
            loss=loss,
            ref_logp=ref[rows],
            shift=1,
            num_pairs=4,
            num_tokens=int(whole.chosen_counts.sum()),
        ).loss
        for rows in ([0, 4], [1, 2, 5, 6], [3, 7])
    )
    torch.testing.assert_close(total, whole.loss)


def test_empty_completions():
    hidden, weight, labels, ref = _inputs(14)
    labels[5] = -100
    with pytest.raises(ValueError, match="sequence 5"):
        fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1)
    zero = fused_preference_loss(hidden, weight, labels, loss=ORPO(), shift=1, on_empty="zero")
    zero.loss.backward()
    assert zero.logp[5] == 0
    assert torch.isfinite(weight.grad).all()
    rest = [i for i in range(S) if i not in (1, 5)]
    dropped = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1, on_empty="drop")
    without = fused_preference_loss(hidden[rest], weight, labels[rest], loss=DPO(), ref_logp=ref[rest], shift=1)
    assert dropped.dropped == 1
    torch.testing.assert_close(dropped.loss, without.loss)
    assert dropped.stats.rows_scored == without.stats.rows_scored


def test_all_ignored_gives_zero_connected_to_the_graph():
    hidden, weight, labels, ref = _inputs(15)
    result = fused_preference_loss(hidden, weight, torch.full_like(labels, -100), loss=DPO(), ref_logp=ref, shift=1)
    result.loss.backward()
    assert result.loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_kl_against_the_reference_is_zero_for_itself_and_positive_otherwise():
    hidden, weight, labels, _ = _inputs(16)
    same = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref=(hidden.detach(), weight.detach()), shift=1, outputs=("kl",))
    other = fused_preference_loss(
        hidden, weight, labels, loss=DPO(), ref=(hidden.detach() * 1.1, weight.detach()), shift=1, outputs=("kl",)
    )
    assert not same.kl.any()
    assert (other.kl > 0).all()
    log_p, log_q = (torch.log_softmax(h.detach() @ weight.detach().T, -1) for h in (hidden, hidden * 1.1))
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1] * (labels[:, 1:] != -100)
    torch.testing.assert_close(other.kl, rows.sum(1))


def test_metrics_follow_their_definitions():
    hidden, weight, labels, ref = _inputs(17)
    result = fused_preference_loss(hidden, weight, labels, loss=DPO(beta=0.2), ref_logp=ref, shift=1, outputs=("entropy", "token_accuracy"))
    metrics, half = result.metrics(), S // 2
    log_p = torch.log_softmax(hidden.detach() @ weight.detach().T, -1)[:, :-1]
    mask = labels[:, 1:] != -100
    token = log_p.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * mask
    logp = token.sum(1)
    rewards = 0.2 * (logp - ref)
    expected = {
        "rewards/chosen": rewards[:half].mean(),
        "rewards/rejected": rewards[half:].mean(),
        "rewards/margins": (rewards[:half] - rewards[half:]).mean(),
        "rewards/accuracies": (rewards[:half] > rewards[half:]).double().mean(),
        "rewards/ties": 0.0,
        "logps/chosen": logp[:half].mean(),
        "logps_mean/rejected": logp[half:].sum() / mask[half:].sum(),
        "likelihood/chosen_drop": (logp - ref)[:half].mean(),
        "entropy": (-(log_p.exp() * log_p).sum(-1) * mask).sum() / mask.sum(),
        "counts/chosen_tokens": mask[:half].sum(),
        "mean_token_accuracy": ((log_p.argmax(-1) == labels[:, 1:]) & mask)[:half].sum() / mask[:half].sum(),
        "loss": result.loss.detach(),
        "grad_coef/mean": result.coef_w.abs().mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name


def test_identical_completions_warn_and_are_counted():
    hidden, weight, labels, ref = _with_common_prefix()
    with pytest.warns(UserWarning, match="1 of 4 pairs have identical"):
        result = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1)
    assert result.identical == 1


def test_options_of_the_head_reach_the_kernel():
    hidden, weight, labels, ref = _inputs(18)
    bias = torch.randn(V, dtype=torch.float64).requires_grad_()
    options = {"bias": bias, "logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}
    for budget in (None, 16):
        result = fused_preference_loss(
            hidden,
            weight,
            labels,
            loss=DPO(),
            ref_logp=ref,
            shift=1,
            backend="torch",
            memory_budget=None if budget is None else _budget(budget),
            **options,
        )
        truth = preference_loss_reference(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1, **options)
        for ours, theirs in zip(
            torch.autograd.grad(result.loss, (hidden, weight, bias)), torch.autograd.grad(truth, (hidden, weight, bias)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_compiles_without_graph_breaks_and_equals_eager():
    hidden, weight, labels, ref = _inputs(19, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(h, w, y, r):
        return fused_preference_loss(h, w, y, loss=DPO(), ref_logp=r, shift=1).loss

    ours = torch.autograd.grad(step(hidden, weight, labels, ref.float()), (hidden, weight))
    eager = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref.float(), shift=1).loss
    for a, b in zip(ours, torch.autograd.grad(eager, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument():
    hidden, weight, labels, ref = _inputs(20)
    pairs = torch.tensor([[0, 4], [1, 9]])
    cases = [
        ({"loss": "dpo"}, TypeError, "loss must be a loss object"),
        ({"loss": []}, TypeError, "loss must be"),
        ({"ref_logp": None}, ValueError, "ref_logp is missing"),
        ({"ref_logp": ref[:3]}, ValueError, "ref_logp must be"),
        ({"ref_logp": ref * torch.nan}, ValueError, "ref_logp must be finite"),
        ({"pair_index": pairs}, ValueError, "pair 1"),
        ({"pair_index": pairs.float()}, TypeError, "pair_index"),
        ({"pair_index": pairs[0]}, ValueError, "pair_index must be"),
        ({"desirable": torch.ones(S, dtype=torch.bool)}, ValueError, "desirable"),
        ({"loss": KTO()}, ValueError, "desirable"),
        ({"loss": KTO(), "desirable": torch.ones(3, dtype=torch.bool)}, ValueError, "desirable must be bool"),
        ({"weights": torch.ones(3)}, ValueError, "weights must be"),
        ({"weights": torch.ones(4), "wpo": True}, ValueError, "weights and wpo"),
        ({"ld_alpha": 1.5}, ValueError, "ld_alpha"),
        ({"on_empty": "skip"}, ValueError, "on_empty"),
        ({"mode": "fast"}, ValueError, "mode"),
        ({"outputs": ("kl",)}, ValueError, "kl"),
        ({"outputs": ("logits",)}, ValueError, "outputs"),
        ({"ref": (hidden, weight)}, ValueError, "ref and ref_logp"),
        ({"loss": ORPO(nll_over="all")}, ValueError, "nll_over"),
        ({"loss": AOT(), "wpo": True}, ValueError, "WPO"),
    ]
    for change, error, match in cases:
        with pytest.raises(error, match=match):
            fused_preference_loss(hidden, weight, labels, **{"loss": DPO(), "ref_logp": ref, "shift": 1, **change})
    with pytest.raises(ValueError, match="even number"):
        fused_preference_loss(hidden[:3], weight, labels[:3], loss=DPO(), ref_logp=ref[:3], shift=1)
    bad = labels.clone()
    bad[0, 5] = V
    with pytest.raises(ValueError, match="labels"):
        fused_preference_loss(hidden, weight, bad, loss=DPO(), ref_logp=ref, shift=1)


def _rank(rank, path, results):
    import torch.distributed as dist

    torch.set_num_threads(1)  # a forked process has none of its parent's OpenMP threads and would wait for them
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    hidden, weight, labels, ref = _inputs(21)
    cut = (0, 400, V)
    shard = weight.detach()[cut[rank] : cut[rank + 1]].clone().requires_grad_()
    split = fused_preference_loss(
        hidden,
        shard,
        labels,
        loss=DPO(),
        ref_logp=ref,
        shift=1,
        process_group=dist.group.WORLD,
        backend="torch",
        vocab_range=(cut[rank], cut[rank + 1]),
    )
    split.loss.backward()
    rows = [0, 4] if rank == 0 else [1, 2, 3, 5, 6, 7]  # data parallel with different numbers of pairs
    part = fused_preference_loss(hidden[rows], weight, labels[rows], loss=DPO(), ref_logp=ref[rows], shift=1, num_pairs=4)
    results[rank] = (split.loss.detach(), hidden.grad.clone(), shard.grad, part.loss.detach(), part.metrics(process_group=dist.group.WORLD))
    dist.destroy_process_group()


def test_two_ranks_vocabulary_shards_and_data_parallel_metrics(tmp_path):
    import torch.multiprocessing as mp

    hidden, weight, labels, ref = _inputs(21)
    whole = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, shift=1)
    whole.loss.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(_rank, args=(str(tmp_path / "store"), results), nprocs=2, start_method="fork")
        (loss0, hidden0, shard0, part0, metrics0), (loss1, hidden1, shard1, part1, metrics1) = results[0], results[1]
    for loss in (loss0, loss1, part0 + part1):
        torch.testing.assert_close(loss, whole.loss.detach())
    for grad in (hidden0, hidden1):
        torch.testing.assert_close(grad, hidden.grad, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(torch.cat([shard0, shard1]), weight.grad, rtol=1e-9, atol=1e-14)
    expected = whole.metrics()
    for name in ("rewards/chosen", "rewards/accuracies", "logps_mean/rejected", "per_pair_loss", "counts/pairs", "likelihood/chosen_drop"):
        assert metrics0[name] == metrics1[name] == pytest.approx(expected[name]), name
