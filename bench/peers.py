"""The competitors of the fused linear log-probability, each wrapped once: DPO (reference-free) on given hidden states, loss and both
gradients.

A peer is `build(problem) -> step`; `step()` runs forward and backward and returns (loss, grad_hidden, grad_weight). A peer that is not
installed or
cannot run raises Missing with the reason, which the bench reports: nothing is replaced by something else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[], tuple[Tensor, Tensor | None, Tensor | None]]


class Missing(RuntimeError):
    """A peer that cannot run here, and why."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """B sequences (chosen half, then rejected half) of T positions; the first prompt positions of each are not scored."""

    name: str
    batch: int
    length: int
    prompt: int
    hidden_size: int
    vocab_size: int
    dtype: str
    beta: float = 0.1
    device: str = "cpu"

    @property
    def rows(self) -> int:
        return self.batch * (self.length - self.prompt)

    @property
    def unit_flop(self) -> float:
        return 2.0 * self.rows * self.hidden_size * self.vocab_size

    @functools.cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden (B, T, D), weight (V, D), labels (B, T)), the same numbers every time; labels are aligned, prompts are -100."""
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, self.dtype)
        hidden = torch.randn(self.batch, self.length, self.hidden_size, generator=g).to(dtype).to(self.device).requires_grad_()
        weight = (
            (torch.randn(self.vocab_size, self.hidden_size, generator=g) * self.hidden_size**-0.5)
            .to(dtype)
            .to(self.device)
            .requires_grad_()
        )
        labels = torch.randint(self.vocab_size, (self.batch, self.length), generator=g)
        labels[:, : self.prompt] = -100
        return hidden, weight, labels.to(self.device)


def dpo(logp: Tensor, beta: float) -> Tensor:
    """Mean DPO loss from per-token log-probabilities (B, T), zero where not scored."""
    chosen, rejected = logp.sum(dim=-1).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def _step(problem: Problem, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    hidden, weight, labels = problem.tensors

    def step() -> tuple[Tensor, Tensor | None, Tensor | None]:
        loss = loss_of(hidden, weight, labels)
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    return step


def _place(values: Tensor, labels: Tensor) -> Tensor:
    return torch.zeros(labels.shape, dtype=values.dtype, device=values.device).masked_scatter(labels != -100, values)


def eager(problem: Problem) -> Step:
    """Full logits, float32 log-softmax, gather."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        log_p = (hidden @ weight.T).float().log_softmax(dim=-1)
        picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return dpo(picked * (labels != -100), problem.beta)

    return _step(problem, loss)


def compiled_reference(problem: Problem) -> Step:
    """The eager formula under torch.compile."""

    @torch.compile(dynamic=False)
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        log_p = (hidden @ weight.T).float().log_softmax(dim=-1)
        picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return dpo(picked * (labels != -100), problem.beta)

    return _step(problem, loss)


def cce_torch_compile(problem: Problem) -> Step:
    """cut-cross-entropy, impl="torch_compile": compacted rows, compiled full logits (what it offers on CPU)."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Missing(str(error)) from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return dpo(-linear_cross_entropy(hidden, weight, labels, reduction="none", impl="torch_compile").float(), problem.beta)

    return _step(problem, loss)


def cce(problem: Problem) -> Step:
    """cut-cross-entropy's Triton kernels (GPU)."""
    if problem.device == "cpu":
        raise Missing('cut-cross-entropy impl="cce" needs a GPU')
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Missing(str(error)) from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return dpo(-linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce").float(), problem.beta)

    return _step(problem, loss)


def _liger(problem: Problem, compiled: bool) -> Step:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise Missing(str(error)) from error
    module = LigerFusedLinearDPOLoss(
        beta=problem.beta, use_ref_model=False, average_log_prob=False, compute_nll_loss=False, compiled=compiled
    )

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return module(weight, hidden, labels)[0]

    return _step(problem, loss)


def liger_dpo(problem: Problem) -> Step:
    """Liger's chunked DPO, eager."""
    return _liger(problem, compiled=False)


def liger_dpo_compiled(problem: Problem) -> Step:
    """Liger's chunked DPO with its own torch.compile."""
    return _liger(problem, compiled=True)


def liger_cross_entropy(problem: Problem) -> Step:
    """Liger's fused linear cross-entropy (Triton, GPU); a scalar loss, so it stands for the cost of the head alone."""
    if problem.device == "cpu":
        raise Missing("Liger's fused linear cross-entropy is a Triton kernel and needs a GPU")
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise Missing(str(error)) from error
    module = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return module(weight, hidden.reshape(-1, problem.hidden_size), labels.reshape(-1))

    return _step(problem, loss)


def trl_chunked(problem: Problem) -> Step:
    """TRL's chunked head as its trainers call it: every row."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise Missing(str(error)) from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        flat = hidden.reshape(-1, problem.hidden_size)
        logp = ChunkedLogProbFunction.apply(flat, weight, None, labels.clamp(min=0).reshape(-1), 1.0, 32768, None, 1.0, ())[0]
        return dpo(logp.view(labels.shape) * (labels != -100), problem.beta)

    return _step(problem, loss)


def trl_chunked_compacted(problem: Problem) -> Step:
    """TRL's chunked head fed with the scored rows alone."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise Missing(str(error)) from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        keep = labels != -100
        logp = ChunkedLogProbFunction.apply(hidden[keep], weight, None, labels[keep], 1.0, 32768, None, 1.0, ())[0]
        return dpo(_place(logp, labels), problem.beta)

    return _step(problem, loss)


def trl_selective(problem: Problem) -> Step:
    """Full logits in the model's dtype and TRL's selective_log_softmax."""
    try:
        from trl.trainer.utils import selective_log_softmax
    except ImportError as error:
        raise Missing(str(error)) from error

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logp = selective_log_softmax(hidden @ weight.T, labels.clamp(min=0))
        return dpo(logp * (labels != -100), problem.beta)

    return _step(problem, loss)


def torch_linear_cross_entropy(problem: Problem) -> Step:
    """torch.nn.functional.linear_cross_entropy, chunked, reduction="none"."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Missing(f"torch {torch.__version__} has no linear_cross_entropy")
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        nll = F.linear_cross_entropy(
            hidden.reshape(-1, problem.hidden_size),
            weight,
            labels.reshape(-1),
            reduction="none",
            ignore_index=-100,
            options=LinearCrossEntropyOptions(),
        )
        return dpo(-nll.float().view(labels.shape), problem.beta)

    return _step(problem, loss)


def ours(problem: Problem, mode: str = "resident", backend: str = "auto", frozen: bool = False, score: bool = False) -> Step:
    """llmcore's fused_linear_logprob."""
    from llmcore.kernels.linear_logprob import fused_linear_logprob

    hidden, weight, labels = problem.tensors
    head = weight.detach() if frozen or score else weight

    def step() -> tuple[Tensor, Tensor | None, Tensor | None]:
        with torch.set_grad_enabled(not score):
            logp = fused_linear_logprob(hidden, head, labels, mode=mode, backend=backend).logp
            loss = dpo(logp, problem.beta)
        if score:
            return loss, None, None
        grads = torch.autograd.grad(loss, (hidden,) if frozen else (hidden, weight))
        return (loss.detach(), grads[0], None if frozen else grads[1])

    return step


PEERS: dict[str, Callable[[Problem], Step]] = {
    "cce torch_compile": cce_torch_compile,
    "cce": cce,
    "liger dpo": liger_dpo,
    "liger dpo compiled": liger_dpo_compiled,
    "liger fused cross-entropy": liger_cross_entropy,
    "trl chunked head": trl_chunked,
    "trl chunked head, compacted": trl_chunked_compacted,
    "trl selective_log_softmax": trl_selective,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "eager": eager,
    "compiled reference": compiled_reference,
}
OURS: dict[str, dict] = {
    "llmcore resident": {"mode": "resident"},
    "llmcore recompute": {"mode": "recompute"},
    "llmcore frozen head": {"mode": "recompute", "frozen": True},
    "llmcore score only": {"score": True},
}


def build(name: str, problem: Problem) -> Step:
    """The step of a peer or of ours by name; module-level, so that a fresh process can build it."""
    return ours(problem, **OURS[name]) if name in OURS else PEERS[name](problem)
