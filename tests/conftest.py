"""Shared fixtures: poisoned memory, devices, the error rule, the real model loaded once."""

from __future__ import annotations

import os
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

SEED = os.environ.get("LLMCORE_TEST_SEED")
hypothesis.settings.register_profile("llmcore", deadline=None, database=None, derandomize=SEED is None)
hypothesis.settings.load_profile("llmcore")


@pytest.fixture(autouse=True)
def poison():
    """Every uninitialised tensor starts as NaN (or the largest integer): an output that nobody wrote fails at once."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seeded(request):
    """Inputs drawn from torch's global generator, or by hypothesis, are the same in every run; `LLMCORE_TEST_SEED=n` draws others."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()) + int(SEED or 0))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device here")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model, float32 on CPU, loaded once. Tests must leave it as they found it."""
    from llmcore.models import load_model

    return load_model("smollm2", device="cpu", dtype=torch.float32)


@pytest.fixture
def error_rule():
    """max|ours - truth| <= factor * max|baseline - truth| + atol: truth in float64, baseline = plain PyTorch in the tested dtype."""

    def check(name: str, ours: torch.Tensor, truth: torch.Tensor, baseline: torch.Tensor, *,
              factor: float = 2.0, atol: float = 0.0) -> None:
        assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
        if ours.numel() == 0:
            return
        ours64, truth64, base64 = (t.detach().double().cpu() for t in (ours, truth, baseline))
        error = (ours64 - truth64).abs()
        error = torch.where(error.isnan() & ours64.isnan() & truth64.isnan(), 0.0, error)
        allowed = factor * (base64 - truth64).abs().nan_to_num().max().item() + atol
        worst = int(error.nan_to_num(nan=float("inf")).argmax())
        assert error.flatten()[worst].item() <= allowed, (
            f"{name}: worst at flat index {worst}: ours {ours64.flatten()[worst].item()!r}, truth {truth64.flatten()[worst].item()!r}, "
            f"error {error.flatten()[worst].item():.3e}, allowed {allowed:.3e}")

    return check


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Directory of a random two-layer Llama with SmolLM2's vocabulary and tokenizer: quick to train, loadable by another process."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from llmcore.models import embedded_path

    folder = tmp_path_factory.mktemp("tiny") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=True,
                             bos_token_id=1, eos_token_id=2, pad_token_id=2)
        LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_path()).save_pretrained(folder)
    return str(folder)
