"""Preference loss: what inactive pairs cost, and a whole DPO training step beside TRL's own trainer on the embedded model.

    python -m pytest bench/bench_preference.py -s            tables, and bench/results/<device>/preference_*.json
    python -m pytest bench/bench_preference.py -s -k "lora and 8"                    one of them (each takes minutes on two cores)
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
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
# Tokens of prompt, chosen and rejected of eight pairs drawn from the human preference data of hh-rlhf (harmless-base): the mix of lengths
# is what padding and repeated prompts pay for. BENCH_PAIRS=file.jsonl.gz takes the texts of real pairs instead.
LENGTHS = ((126, 31, 34), (192, 71, 46), (156, 6, 72), (46, 14, 15), (18, 37, 20), (15, 10, 9), (192, 37, 110), (74, 70, 24))
STEPS = ("trl", "llmcore DPOTrainer", "llmcore align")


def _rows(pairs: int) -> list[dict[str, str]]:
    """Word salad of fixed lengths (the cost of a step does not depend on what the tokens say), or the first real pairs of a file."""
    if source := os.environ.get("BENCH_PAIRS"):
        from llmcore import data

        rows = [row for row in data.read_rows(source) if isinstance(row.prompt, str) and all(str(c).strip() for c in row.completions)]
        names = ("prompt", "chosen", "rejected")
        return [dict(zip(names, (str(row.prompt), *map(str, row.completions)), strict=True)) for row in rows[:pairs]]

    def text(seed: int, length: int) -> str:
        return " ".join(WORDS[(seed + i * (seed % 7 + 1)) % len(WORDS)] for i in range(length))

    names = (("prompt", 0), ("chosen", 5), ("rejected", 9))
    return [
        {name: " " * (name != "prompt") + text(i + seed, length) for (name, seed), length in zip(names, lengths, strict=True)}
        for i, lengths in enumerate(LENGTHS[:pairs])
    ]


def _perturb(model: torch.nn.Module) -> None:
    """Move the policy off its reference, so that equal losses mean equal computations (at the start every loss is ln 2)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.02 if "lora_" in name else 0.01 * parameter.std()) * noise


def whole_step(which: str, adapter: str, pairs: int) -> Callable[[], Any]:
    """Zero gradients, forward of policy and live reference, loss, backward, AdamW: one optimiser step of the named implementation.

    All take the batch that TRL's collator made of the same rows: equal token ids, equal scored tokens.
    """
    import trl
    from datasets import Dataset, disable_progress_bars
    from llmcore.methods import direct_alignment
    from peft import LoraConfig

    from llmcore import data
    from llmcore.integrations.trl import DPOTrainer
    from llmcore.losses import DPO
    from llmcore.models import load_model

    warnings.simplefilter("ignore")
    disable_progress_bars()
    loaded = load_model("smollm2", device="cpu", dtype=torch.float32)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if adapter == "lora" else None
    config = trl.DPOConfig(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=pairs, report_to=[], use_cpu=True, bf16=False,
                           gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-6)  # fmt: skip
    trainer = (trl.DPOTrainer if which == "trl" else DPOTrainer)(
        model=loaded.model, ref_model=None if lora else copy.deepcopy(loaded.model), args=config,
        train_dataset=Dataset.from_list(_rows(pairs)), processing_class=loaded.tokenizer, peft_config=lora)  # fmt: skip
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model = trainer.model
    _perturb(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    trainer.optimizer = optimizer
    if which == "llmcore align":
        loss = DPO()
        reference = direct_alignment.AdapterOff() if lora else direct_alignment.RefModel(trainer.ref_model)
        packed = data.Batch.from_fields(batch, layout="shared", isolate=True)

        def compute() -> torch.Tensor:
            return direct_alignment.preference_step(model, packed, loss, reference).loss
    else:

        def compute() -> torch.Tensor:
            trainer._metrics["train"].clear()
            return trainer.compute_loss(model, batch)

    tokens = int(batch["attention_mask"].sum())

    def step() -> tuple[float, int]:
        optimizer.zero_grad()
        loss = compute()
        loss.backward()
        optimizer.step()
        return float(loss.detach()), tokens

    return step


def markdown(content: dict[str, Any]) -> str:
    """The table of one result: inactive pairs, or a whole step."""
    if "inactive_backward_over_forward" in content:
        lines = [f"{content['shape']}.", "", "| pairs | forward ms | backward ms | backward / forward |", "|---|---:|---:|---:|"]
        lines += [f"| {kind} | {row['forward_ms']:.1f} | {row['backward_ms']:.1f} | {row['backward_ms'] / row['forward_ms']:.4f} |"
                  for kind, row in content["rows"].items()]  # fmt: skip
        return "\n".join(lines)
    lines = [f"{content['model']}, {content['pairs']} pairs, {content['tokens']} tokens a step, live reference.", "",
             "| step | median ms [p20, p80] | tokens/s | peak memory above the model, MiB | tokens/s, memory over TRL |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for name, row in content["rows"].items():
        ratios = content["ratios"].get(name)
        against = f"{ratios['tokens_per_second']:.2f}x, {ratios['peak_memory']:.2f}x" if ratios else ""
        lines.append(f"| {name} | {row['median_ms']:.0f} [{row['p20_ms']:.0f}, {row['p80_ms']:.0f}] | {row['tokens_per_second']:.0f} "
                     f"| {row['peak_bytes'] / 2**20:.0f} | {against} |")  # fmt: skip
    return "\n".join(lines)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pairs", [2, 8])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_whole_step_beside_trl(adapter, pairs):
    with contextlib.ExitStack() as stack:  # each in a process of its own: memory that one's allocator keeps is not taken from the others
        steps = {name: stack.enter_context(harness.Remote(whole_step, (name, adapter, pairs), result=True)) for name in STEPS}
        rows: dict[str, dict[str, Any]] = harness.interleaved(steps, rounds=3 if pairs == 2 else 2)
        first = {name: step.first.result[0] for name, step in steps.items()}
        tokens = steps["trl"].first.result[1]
    assert abs(first["trl"] - math.log(2)) > 1e-3, "policy and reference must differ for equal losses to mean something"
    for name, value in first.items():
        assert value == pytest.approx(first["trl"], rel=1e-4), f"no time is reported for a different loss: {name}"
    for name, row in rows.items():
        row["tokens_per_second"] = tokens / row["median_ms"] * 1e3
        row["peak_bytes"] = harness.peak_memory(whole_step, (name, adapter, pairs), threads=torch.get_num_threads())
    base = rows["trl"]
    ratios = {name: {"tokens_per_second": row["tokens_per_second"] / base["tokens_per_second"],
                     "peak_memory": row["peak_bytes"] / base["peak_bytes"]} for name, row in rows.items() if name != "trl"}  # fmt: skip
    trained = "LoRA of rank 16" if adapter == "lora" else "all weights"
    data = "real pairs" if os.environ.get("BENCH_PAIRS") else "word salad in lengths of hh-rlhf"
    content = {"model": f"SmolLM2-135M-Instruct float32, {trained}", "pairs": pairs, "tokens": tokens, "data": data, "first_loss": first,
               "rows": rows, "ratios": ratios}  # fmt: skip
    print("\n" + markdown(content))
    harness.save(f"preference_step_{adapter}_{pairs}", content)


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
