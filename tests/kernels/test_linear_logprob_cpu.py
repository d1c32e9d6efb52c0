"""Every instruction set that this CPU has serves the compiled kernel: against float64, and the same bits for a row in any batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from llmcore.kernels import backends

pytestmark = pytest.mark.skipif(backends.extension_error() is not None, reason="the compiled operators are not built")

CODE = """
import torch
from llmcore.kernels.linear_logprob import fused_linear_logprob, linear_logprob_reference

torch.manual_seed(0)
for dtype, logp_limit, grad_limit in ((torch.float32, 2e-6, 5e-7), (torch.bfloat16, 5e-5, 4e-3)):
    for rows, size, vocab in ((1, 40, 1003), (67, 72, 1003)):
        hidden = torch.randn(rows, 2 * size).to(dtype)[:, ::2].detach().requires_grad_()
        weight = (torch.randn(vocab, size) / size**0.5).to(dtype).requires_grad_()
        labels = torch.randint(vocab, (rows,))
        upstream = torch.randn(rows)
        exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        exact = linear_logprob_reference(exact_hidden, exact_weight, labels).logp
        truth = torch.autograd.grad((exact * upstream).sum(), (exact_hidden, exact_weight))
        for mode in ("recompute", "resident"):
            logp = fused_linear_logprob(hidden, weight, labels, mode=mode, backend="cpp").logp
            grads = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
            assert (logp - exact).abs().max() <= logp_limit, (dtype, mode, float((logp - exact).abs().max()))
            for ours, expected in zip(grads, truth):
                error = float((ours - expected).norm() / expected.norm())
                assert error <= grad_limit, (dtype, mode, error)
            alone = fused_linear_logprob(hidden[-1:], weight, labels[-1:], mode=mode, backend="cpp").logp
            assert torch.equal(alone, logp[-1:]), (dtype, mode)
print("ok")
"""


@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512_bf16", "amx"])  # a level that the CPU lacks falls to the highest it has
def test_each_instruction_set_agrees_with_float64(level):
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "LLMCORE_CPU_ISA": level}
    run = subprocess.run([sys.executable, "-c", CODE], cwd=root, env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "ok", run.stderr
