"""fused_policy_loss and fused_imitation_loss against autograd of the plain float64 formulas."""

import pytest
import torch
from llmcore.kernels.linear_logprob import fused_linear_logprob
from llmcore.kernels.policy import clipped_objective, fused_imitation_loss, fused_policy_loss, policy_loss_reference

B, T, D, V = 6, 9, 24, 307


def _inputs(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, dtype=torch.float64, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, dtype=torch.float64, generator=g) / 3).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, T), generator=g)
    for row in range(B):
        labels[row, : 1 + row % 3] = -100
        labels[row, T - row % 2 :] = -100
    rewards = torch.tensor([0.9, -0.4, 0.1, 0.5, -1.0, 0.3], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.7, 1.0], dtype=torch.float64)
    sft = torch.tensor([False, False, True, False, False, True])
    shift = torch.tensor([0.05, -0.5, 0.3, 0.4, -0.1, 0.0], dtype=torch.float64)  # inside, below, above the clip range
    return hidden, weight, labels, rewards, weights, sft, shift


def _token_logp(hidden, weight, labels):
    logp = torch.log_softmax(hidden[:, :-1].double() @ weight.double().T, -1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    mask = labels[:, 1:] != -100
    return torch.where(mask, logp, 0.0), mask


def _mean(hidden, weight, labels):
    logp, mask = _token_logp(hidden, weight, labels)
    return logp.sum(1) / mask.sum(1)


@pytest.mark.parametrize("mode", ["recompute", "resident"])
@pytest.mark.parametrize("kl_grad", ["through", "detached"])
def test_value_and_gradients(kl_grad, mode):
    hidden, weight, labels, rewards, weights, sft, shift = _inputs()
    mean = _mean(hidden, weight, labels)
    ref = (mean + shift).detach()
    truth = policy_loss_reference(mean, ref, rewards, weights, sft, kl=0.2, clip=0.2, sft_coeff=0.5, kl_grad=kl_grad)
    ours = fused_policy_loss(
        hidden,
        weight,
        labels,
        ref_logp=ref,
        rewards=rewards,
        weights=weights,
        sft_mask=sft,
        kl=0.2,
        clip=0.2,
        sft_coeff=0.5,
        kl_grad=kl_grad,
        shift=1,
        mode=mode,
    )
    torch.testing.assert_close(ours.loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.logp_mean, mean.detach(), rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours.loss, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert ours.clip_fraction == 0.5


def test_closed_form_against_autograd_on_both_sides_of_every_corner():
    k = torch.tensor([-1.0, -0.3, -0.2, 0.0, 0.1, 0.19, 0.5, 2.0], dtype=torch.float64).repeat(3).requires_grad_()
    rewards = torch.tensor([1.0, -1.0, 0.05], dtype=torch.float64).repeat_interleave(8)
    for kl_grad in ("through", "detached"):
        value, slope = clipped_objective(k.detach(), torch.zeros_like(k), rewards, kl=0.2, clip=0.2, kl_grad=kl_grad)
        advantage = rewards - 0.2 * (k if kl_grad == "through" else k.detach())
        truth = -torch.minimum(advantage * k.exp(), advantage * k.exp().clamp(0.8, 1.2))
        torch.testing.assert_close(value, truth.detach())
        torch.testing.assert_close(slope, torch.autograd.grad(truth.sum(), k)[0], rtol=1e-13, atol=1e-15)


def test_first_step_pushes_small_rewards_down_only_through_the_penalty():
    same, rewards = torch.zeros(2, dtype=torch.float64), torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert torch.allclose(clipped_objective(same, same, rewards, kl=0.2, clip=0.2)[1], -(rewards - 0.2))
    assert torch.allclose(clipped_objective(same, same, rewards, kl=0.2, clip=0.2, kl_grad="detached")[1], -rewards)


def test_token_ratios():
    hidden, weight, labels, rewards, weights, sft, _ = _inputs(1)
    logp, mask = _token_logp(hidden, weight, labels)
    old = torch.zeros(B, T, dtype=torch.float64)
    old[:, 1:] = (logp + 0.3 * torch.randn(B, T - 1, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).detach()
    k = (logp - old[:, 1:]) * mask
    advantage = rewards[:, None] - 0.2 * k
    pg = -torch.minimum(advantage * k.exp(), advantage * k.exp().clamp(0.8, 1.2)) * mask
    truth = (weights * pg.sum(1) / mask.sum(1))[~sft].sum() / 4 - 0.5 * (weights * logp.sum(1) / mask.sum(1))[sft].sum() / 2
    ours = fused_policy_loss(hidden, weight, labels, ref_logp=old, rewards=rewards, weights=weights, sft_mask=sft, ratio="token", shift=1)
    torch.testing.assert_close(ours.loss, truth, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours.loss, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_micro_batches_add_up_with_the_batch_counts_and_not_without():
    hidden, weight, labels, rewards, weights, sft, shift = _inputs(2)
    ref = (_mean(hidden, weight, labels) + shift).detach()

    def part(rows, **options):
        return fused_policy_loss(
            hidden[rows],
            weight,
            labels[rows],
            ref_logp=ref[rows],
            rewards=rewards[rows],
            weights=weights[rows],
            sft_mask=sft[rows],
            shift=1,
            **options,
        ).loss

    whole, (a, b) = part(slice(None)), (slice(0, 3), slice(3, 6))
    torch.testing.assert_close(part(a, num_samples=4, num_sft=2) + part(b, num_samples=4, num_sft=2), whole)
    assert not torch.allclose(0.5 * (part(a, normalize="microbatch") + part(slice(3, 5), normalize="microbatch")), whole)
    only_sft = part(torch.tensor([2, 5]))
    assert torch.isfinite(only_sft)


def test_imitation():
    hidden, weight, labels, _, weights, _, shift = _inputs(3)
    mean = _mean(hidden, weight, labels)
    ref = (mean + shift).detach()
    truth = (weights * (-mean + 0.1 * mean.exp() * (mean - ref))).mean()
    ours = fused_imitation_loss(hidden, weight, labels, ref_logp=ref, weights=weights, shift=1)
    torch.testing.assert_close(ours.loss, truth, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours.loss, (hidden, weight)), torch.autograd.grad(truth, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_float32_stays_within_its_tolerances():
    hidden, weight, labels, rewards, weights, sft, shift = _inputs(4, torch.float32)
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    mean = _mean(h, w, labels)
    ref = (mean + shift).detach()
    truth = policy_loss_reference(mean, ref, rewards, weights, sft)
    ours = fused_policy_loss(
        hidden, weight, labels, ref_logp=ref.float(), rewards=rewards.float(), weights=weights.float(), sft_mask=sft, shift=1
    )
    assert (ours.loss.double() - truth).abs() <= 1e-5 * truth.abs()
    for a, b in zip(torch.autograd.grad(ours.loss, (hidden, weight)), torch.autograd.grad(truth, (h, w)), strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm()


def test_packed_equals_padded():
    hidden, weight, labels, rewards, _, sft, shift = _inputs(5)
    ref = (_mean(hidden, weight, labels) + shift).detach()
    a = fused_policy_loss(hidden, weight, labels, ref_logp=ref, rewards=rewards, sft_mask=sft, shift=1)
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    b = fused_policy_loss(hidden.view(-1, D), weight, labels.view(-1), ref_logp=ref, rewards=rewards, sft_mask=sft, shift=1, cu_seqlens=cu)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-13, atol=0)


def test_errors_name_the_argument():
    hidden, weight, labels, rewards, _, _, _ = _inputs()
    ref = torch.zeros(B)
    empty = labels.clone()
    empty[3] = -100
    cases = [
        ({"kl": -1.0}, ValueError, "kl"),
        ({"clip": float("nan")}, ValueError, "clip"),
        ({"kl_grad": "no"}, ValueError, "kl_grad"),
        ({"normalize": "none"}, ValueError, "normalize"),
        ({"ratio": "sum"}, ValueError, "ratio"),
        ({"rewards": rewards[:2]}, ValueError, "rewards"),
        ({"rewards": rewards * torch.nan}, ValueError, "rewards must be finite"),
        ({"ref_logp": ref[:1]}, ValueError, "ref_logp"),
        ({"sft_mask": torch.zeros(B)}, TypeError, "sft_mask"),
        ({"labels": empty}, ValueError, "row 3"),
        ({"ratio": "token"}, ValueError, "ref_logp"),
        ({"weights": [1.0] * B}, TypeError, "weights"),
        ({"normalize": "microbatch", "num_sft": 3}, ValueError, "num_sft"),
        ({"outputs": ("lse",)}, ValueError, "outputs"),
    ]
    for change, error, match in cases:
        arguments = {"labels": labels, "ref_logp": ref, "rewards": rewards, "shift": 1, **change}
        with pytest.raises(error, match=match):
            fused_policy_loss(hidden, weight, **arguments)


def test_per_token_logp_is_the_family_kernel():
    hidden, weight, labels, rewards, *_ = _inputs(6)
    ours = fused_policy_loss(hidden, weight, labels, ref_logp=torch.zeros(B), rewards=rewards, shift=1)
    logp = fused_linear_logprob(hidden, weight, labels, shift=1).logp
    torch.testing.assert_close(ours.logp_mean, (logp.sum(1) / ours.counts).detach())
