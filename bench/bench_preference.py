"""Preference loss: what inactive pairs cost, and a whole DPO training step beside TRL's own trainer on the embedded model.

    python -m pytest bench/bench_preference.py -s            tables, and bench/results/<device>/preference_*.json
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch

WORDS = ["the", "river", "moves", "over", "warm", "stones", "while", "three", "birds", "argue", "about", "rain", "and", "nobody", "writes"]
PAIRS, PROMPT_WORDS, COMPLETION_WORDS = 2, 32, 64


def _rows() -> list[dict[str, str]]:
    """Fixed word salad: the cost of a step does not depend on what the tokens say."""

    def text(seed: int, length: int) -> str:
        return " ".join(WORDS[(seed + i * (seed % 7 + 1)) % len(WORDS)] for i in range(length))

    sides = (("prompt", 0, PROMPT_WORDS), ("chosen", 5, COMPLETION_WORDS), ("rejected", 9, COMPLETION_WORDS))
    return [{name: " " * (name != "prompt") + text(i + seed, length) for name, seed, length in sides} for i in range(PAIRS)]


def whole_step(which: str, adapter: str) -> Callable[[], Any]:
    """Zero gradients, forward of policy and reference, loss, backward, AdamW: one optimiser step of the named trainer."""
    import trl
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig

    from llmcore.integrations.trl import DPOTrainer
    from llmcore.models import load_model

    warnings.simplefilter("ignore")
    disable_progress_bars()
    loaded = load_model("smollm2", device="cpu", dtype=torch.float32)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if adapter == "lora" else None
    config = trl.DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=PAIRS, report_to=[], use_cpu=True, bf16=False,
                           gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-6)  # fmt: skip
    trainer = {"trl": trl.DPOTrainer, "llmcore": DPOTrainer}[which](
        model=loaded.model, ref_model=None if lora else copy.deepcopy(loaded.model), args=config, train_dataset=Dataset.from_list(_rows()),
        processing_class=loaded.tokenizer, peft_config=lora)  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-6)
    trainer.optimizer = optimizer

    def step() -> float:
        optimizer.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        trainer._metrics["train"].clear()
        return float(loss.detach())

    step.tokens = int(batch["attention_mask"].sum())  # type: ignore[attr-defined]
    return step


@pytest.mark.parametrize("adapter", ["lora", "full"])
def markdown(content: dict[str, Any]) -> str:
    """The README table of one whole-step result."""
    lines = [f"{content['model']}, {content['pairs']} pairs, {content['tokens']} tokens a step.", "",
             "| step | median ms [p20, p80] | tokens/s | peak memory above the model, MiB |", "|---|---:|---:|---:|"]
    for name, row in content["rows"].items():
        lines.append(f"| {name} | {row['median_ms']:.0f} [{row['p20_ms']:.0f}, {row['p80_ms']:.0f}] | {row['tokens_per_second']:.0f} "
                     f"| {row['peak_bytes'] / 2**20:.0f} |")
    ratios = content["ratios"]
    return "\n".join(lines) + (f"\n\nllmcore over TRL: {ratios['tokens_per_second_over_trl']:.2f}x the tokens/s, "
                              f"{ratios['peak_memory_over_trl']:.2f}x the memory.")


def test_whole_step_beside_trl(adapter):
    steps = {name: whole_step(name, adapter) for name in ("trl", "llmcore")}
    first = {name: step() for name, step in steps.items()}
    assert first["llmcore"] == pytest.approx(first["trl"], abs=1e-4), "no time is reported for a different loss"
    rows: dict[str, dict[str, Any]] = harness.interleaved(steps, rounds=5)
    for name, step in steps.items():
        rows[name]["tokens_per_second"] = step.tokens / rows[name]["median_ms"] * 1e3
    tokens = steps["trl"].tokens
    del steps
    for name in rows:
        rows[name]["peak_bytes"] = harness.peak_memory(whole_step, (name, adapter), threads=torch.get_num_threads())
    ratios = {"tokens_per_second_over_trl": rows["llmcore"]["tokens_per_second"] / rows["trl"]["tokens_per_second"],
              "peak_memory_over_trl": rows["llmcore"]["peak_bytes"] / rows["trl"]["peak_bytes"]}  # fmt: skip
    for name, row in rows.items():
        rate, peak = row["tokens_per_second"], row["peak_bytes"] / 2**20
        print(f"{adapter:5s} {name:8s} {row['median_ms']:9.0f} ms  {rate:7.1f} tokens/s  {peak:7.0f} MiB")
    print(adapter, ratios)
    content = {"model": "SmolLM2-135M-Instruct float32", "pairs": PAIRS, "tokens": tokens, "first_loss": first, "rows": rows}
    harness.save(f"preference_step_{adapter}", content | {"ratios": ratios})


@pytest.mark.parametrize("mode", ["recompute", "resident"])
def test_inactive_pairs_cost_no_backward(mode):
    """8 sequences of 128, half prompt, a 49152 x 576 float32 head: hinge with every pair beyond, and within, its margin."""
    from llmcore.kernels.preference import fused_preference_loss

    from llmcore.losses import Hinge

    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 128, 576, generator=g).requires_grad_()
    weight = (torch.randn(49152, 576, generator=g) / 24).requires_grad_()
    labels = torch.randint(49152, (8, 128), generator=g)
    labels[:, :64] = -100
    logp = fused_preference_loss(hidden.detach(), weight.detach(), labels, loss=Hinge(), ref_logp=torch.zeros(8)).logp
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(6):
        for kind, shift in (("inactive", 1e4), ("active", -1e4)):
            ref = logp.clone()
            ref[4:] += shift
            hidden.grad = weight.grad = None
            begin = time.perf_counter()
            result = fused_preference_loss(hidden, weight, labels, loss=Hinge(), ref_logp=ref, mode=mode)
            middle = time.perf_counter()
            result.loss.backward()
            end = time.perf_counter()
            at = times.setdefault(kind, {"forward_ms": [], "backward_ms": []})
            at["forward_ms"].append((middle - begin) * 1e3)
            at["backward_ms"].append((end - middle) * 1e3)
            assert (result.stats.rows_backward == 0) == (kind == "inactive")
    rows = {kind: {name: statistics.median(values[1:]) for name, values in sides.items()} for kind, sides in times.items()}
    share = rows["inactive"]["backward_ms"] / rows["inactive"]["forward_ms"]
    print(mode, rows, f"inactive backward / forward = {share:.4f}")
    harness.save(f"preference_inactive_{mode}", {"shape": "8 x 128 (64 scored), D 576, V 49152, float32", "rows": rows,
                                                 "inactive_backward_over_forward": share})  # fmt: skip
    assert share < 0.02
