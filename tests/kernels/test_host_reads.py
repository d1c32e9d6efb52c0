"""Nothing on the Triton path waits for the GPU more often with more pairs, rows or vocabulary chunks, or reads an upstream value.

A trainer that reads a value from the device for every pair or chunk runs at the speed of those reads. `HostReads` counts, on CPU tensors in
Triton's interpreter, what would stop a GPU: values that Python takes out of a tensor, and results whose size depends on values. On a GPU
the same test lets CUDA count its own synchronisations.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from llmcore.kernels import linear_logprob_configs, linear_logprob_ops
from llmcore.kernels.linear_logprob import fused_linear_logprob
from llmcore.kernels.preference import fused_preference_loss

from llmcore.losses import DPO

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
pytestmark = pytest.mark.usefixtures("quiet_numpy")
served = pytest.mark.skipif(
    DEVICE.type == "cpu" and not INTERPRETING, reason="runs in the interpreter's process, see test_in_the_interpreter"
)


@pytest.mark.skipif(DEVICE.type == "cuda" or INTERPRETING, reason="these tests run on the GPU, or already in the interpreter")
def test_in_the_interpreter(in_the_interpreter):
    in_the_interpreter(__file__)


def _inside_triton() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if f"{os.sep}triton{os.sep}" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class _Values(TorchFunctionMode):
    """Values of a CPU tensor that Python takes without an operator, or with one that a mode does not see inside another operator."""

    CALLS = ("tolist", "numpy", "cpu", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.CALLS and not _inside_triton():
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """The names of what would wait for the device, in `seen`; the fused operators are entered, not counted as one."""

    OPERATORS = ("nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "llmcore":
            inside = {"linear_logprob": linear_logprob_ops._forward, "linear_logprob_grad": linear_logprob_ops._gradients}[name]
            with self, _Values(self.seen):
                return inside(*args, **(kwargs or {}))
        by_mask = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in self.OPERATORS or by_mask) and not _inside_triton():
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted():
    """A list that holds one entry for each wait."""
    if DEVICE.type == "cpu":
        with HostReads() as mode, _Values(mode.seen):
            yield mode.seen
        return
    seen: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen += [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def _waits(pairs: int, dtype: torch.dtype, *, fused: bool, frozen: bool = False, **options) -> tuple[list[str], list[str]]:
    """Waits of the forward and of the backward of a DPO step over `pairs` pairs of 3 scored tokens behind 2 of prompt."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * pairs, 5, 16, generator=g).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(1100, 16, generator=g).to(DEVICE, dtype).requires_grad_(not frozen)
    labels = torch.randint(1100, (2 * pairs, 5), generator=g)
    labels[:, :2] = -100
    labels, ref = labels.to(DEVICE), torch.full((2 * pairs,), -20.0, device=DEVICE)
    with counted() as forward:
        if fused:
            loss = fused_preference_loss(hidden, weight, labels, loss=DPO(), ref_logp=ref, backend="triton", **options).loss
        else:
            logp = fused_linear_logprob(hidden, weight, labels, backend="triton", **options).logp.sum(dim=1)
            loss = DPO()(*logp.chunk(2), *ref.chunk(2)).loss
    with counted() as backward:
        (3 * loss).backward()
    assert hidden.grad.abs().sum() > 0
    return forward, backward


@served
@pytest.mark.parametrize("mode", ["recompute", "resident"])
@pytest.mark.parametrize("fused", [False, True], ids=["linear_logprob", "preference_loss"])
@pytest.mark.parametrize(("dtype", "frozen"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_waits_do_not_grow_with_pairs_or_chunks(mode, fused, dtype, frozen, monkeypatch):
    few = _waits(1, dtype, fused=fused, frozen=frozen, mode=mode)
    monkeypatch.setattr(linear_logprob_configs, "CHUNK_BYTES", 1)  # every block of the vocabulary a chunk of its own
    many = _waits(12, dtype, fused=fused, frozen=frozen, mode=mode)
    assert many == few
    forward, backward = many
    assert len(forward) <= 8
    assert len(backward) <= 4  # the compaction of the scored rows and of those with a gradient, and two integers of their layout
    if DEVICE.type == "cpu":
        assert not {"item", "__float__"} & {*forward, *backward}, "a float was read: the loss, a coefficient or the upstream gradient"


@served
def test_one_graph_whatever_the_length():
    """Inside torch.compile(fullgraph=True) any value read by Python would break the graph; lengths must not bring new ones."""
    import torch._dynamo.testing

    weight = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()

    def score(hidden, labels):
        return fused_linear_logprob(hidden, weight, labels, outputs=("logp", "entropy"), backend="triton").logp.sum()

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(score, fullgraph=True, backend=counter)
    frames = []
    for length in (5, 9, 12, 17):
        g = torch.Generator().manual_seed(length)
        hidden = torch.randn(length, 16, generator=g).to(DEVICE)
        labels = torch.randint(300, (length,), generator=g)
        labels[0] = -100
        labels = labels.to(DEVICE)
        (ours,) = torch.autograd.grad(compiled(hidden, labels), weight)
        (expected,) = torch.autograd.grad(score(hidden, labels), weight)
        torch.testing.assert_close(ours, expected)
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 3, "the second length makes the size symbolic, none after it compiles again"
