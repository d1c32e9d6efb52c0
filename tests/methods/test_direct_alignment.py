"""Direct alignment: the first loss, a run against a plain PyTorch run written here, errors of the command, what a refused run leaves."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llmcore.methods import direct_alignment as da
from safetensors.torch import load_file, save_file

from llmcore import adapters, cli, data, load_model
from llmcore.losses import loss_from_name
from llmcore.training import TrainingConfig

PAIRS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in [
        ("The sky is very", " blue", " loud today"),
        ("Two and two make", " four", " five"),
        ("A cat says", " meow", " woof woof"),
        ("The opposite of hot is", " cold", " soup"),
        ("Paris is the capital of", " France", " Spain"),
        ("Water is made of", " hydrogen and oxygen", " fire"),
        ("Ice melts into", " water", " sand"),
        ("The sun rises in the", " east", " west"),
    ]
]
BETA, RATE, STEPS = 0.1, 3e-4, 50


def tokenized(model, rows=PAIRS):
    return data.tokenize(data.read_rows(rows), model.tokenizer, stop_ids=model.stop_ids).examples


def plain_logps(module: torch.nn.Module, examples) -> torch.Tensor:
    """(pairs, 2) sequence log-probabilities from the model's full logits, right-padded, log_softmax over all positions."""
    sequences = [s for e in examples for s in e.sequences]
    T = max(len(s.ids) for s in sequences)
    ids, mask, scored = (torch.zeros(len(sequences), T, dtype=torch.long) for _ in range(3))
    for row, s in enumerate(sequences):
        ids[row, : len(s.ids)] = torch.from_numpy(s.ids)
        mask[row, : len(s.ids)] = 1
        scored[row, s.start : len(s.ids)] = 1
    logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logp = F.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logp * scored[:, 1:]).sum(1).view(-1, 2)


def plain_run(model, examples, steps: int, rate: float, rank: int) -> tuple[list[float], torch.nn.Module]:
    """Mean margin before each update of textbook DPO with AdamW, and the trained module; nothing of the library but the seeded adapters."""
    module = adapters.unwrap(model)
    module.requires_grad_(rank == 0)
    with torch.no_grad():
        reference = plain_logps(module, examples)
    module = adapters.add_lora(module, rank=rank, seed=0).train() if rank else module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    margins = []
    for _ in range(steps):
        ratio = plain_logps(module, examples) - reference
        margin = BETA * (ratio[:, 0] - ratio[:, 1])
        margins.append(margin.mean().item())
        loss = -F.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
    return margins, module


def follow(name: str, tmp_path, *, rate: float, **layout) -> None:
    rank = 8
    model = load_model(name, device="cpu", dtype="float32")
    config = da.Config(loss_options={"beta": BETA}, batch_size=8, micro_batch_size=8, num_steps=STEPS, lora_rank=rank,
                       training=TrainingConfig(learning_rate=rate), **layout)
    result = da.train(PAIRS, config=config, model=model, output_dir=tmp_path / "run", progress=False)
    assert result.steps == STEPS
    assert result.skipped == 0
    assert np.float32(result.history[0]["loss"]) == np.float32(np.log(2.0))
    plain = load_model(name, device="cpu", dtype="float32")
    expected = np.array(plain_run(plain, tokenized(plain), STEPS, rate, rank)[0])
    ours = np.array(result.curve("rewards/margins"))
    assert result.history[-1]["rewards/accuracies"] == 1.0
    assert expected[-1] > 0.5, "the plain run must have learnt something for the comparison to mean anything"
    worst = np.abs(ours - expected) / np.maximum(0.02 * np.abs(expected), 1e-3)
    assert worst.max() <= 1, f"step {worst.argmax() + 1}: {ours[worst.argmax()]} against {expected[worst.argmax()]}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_steps_follow_a_plain_run_on_the_real_model(tmp_path):
    follow("smollm2", tmp_path, rate=RATE, isolate=False)


def test_fifty_steps_follow_a_plain_run(tiny_model, tmp_path):
    follow(tiny_model, tmp_path, rate=5e-3, layout="shared", isolate=False)


def same_weights(name: str, tmp_path, *, rate: float, rank: int, **layout) -> None:
    """Twenty steps of the fused path and of plain logits end in the same weights, every tensor to 1e-5 of its norm.

    Adapters start at zero and Adam divides by the gradient's own size, which lifts rounding: on a real model plain PyTorch's float32 run
    ends further than 1e-5 from its float64 run. There, the float64 weights are the truth and twice plain PyTorch's error is the limit.
    """
    model = load_model(name, device="cpu", dtype="float32")
    config = da.Config(loss_options={"beta": BETA}, batch_size=8, micro_batch_size=4, num_steps=20, lora_rank=rank,
                       training=TrainingConfig(learning_rate=rate, warmup_steps=0), **layout)  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    result = da.train(PAIRS, config=config, model=model, output_dir=tmp_path / "run", progress=False)
    assert result.steps == 20
    final = tmp_path / "run" / "final"
    ours = load_file(final / ("adapter_model.safetensors" if rank else "model.safetensors"))

    def plain(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        other = load_model(name, device="cpu", dtype="float32")
        examples = tokenized(other)
        other.model.to(dtype)
        module = plain_run(other, examples, 20, rate, rank)[1]
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    baseline = plain(torch.float32)
    truth = plain(torch.float64) if rank else baseline
    assert len(ours) == len(truth)
    squares = [0.0, 0.0]
    for name, p in truth.items():
        stored = ours[name.replace(".default.", ".") if rank else name]
        error, rounding = (stored - p).norm().item(), (baseline[name] - p).norm().item()
        limit = max(1e-5 * p.norm().item(), 2 * rounding)
        assert error <= limit, f"{name}: {error / p.norm():.2e}, plain PyTorch {rounding / p.norm():.2e}"
        moved = (p - before[name]).norm() / p.norm() if not rank else p.norm()
        assert moved > 1e-5, f"{name} did not move"
        squares = [squares[0] + error**2, squares[1] + rounding**2]
    size = sum(p.norm().item() ** 2 for p in truth.values())
    assert squares[0] <= max(1e-10 * size, squares[1]), "over all weights: to 1e-5, or as near to float64 as plain PyTorch"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rank", [0, 8])
def test_twenty_steps_give_the_weights_of_a_plain_run_on_the_real_model(rank, tmp_path):
    same_weights("smollm2", tmp_path, rate=1e-5 if rank == 0 else 1e-4, rank=rank)


@pytest.mark.parametrize("rank", [0, 8])
def test_twenty_steps_give_the_weights_of_a_plain_run(rank, tiny_model, tmp_path):
    same_weights(tiny_model, tmp_path, rate=1e-4, rank=rank)


def test_first_loss_of_the_real_model_is_ln_2_to_the_last_bit(smollm2):
    batch = data.batch_of(tokenized(smollm2, PAIRS[:2]), layout="shared", isolate=True)
    with torch.no_grad():
        cached = da.sequence_scores(smollm2.model, batch).logp
        out = da.preference_step(smollm2.model, replace(batch, ref_logp=cached), loss_from_name("dpo"))
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == np.float32(np.log(2.0))
    assert out.rewards_chosen.tolist() == [0.0, 0.0]
    assert out.metrics["rewards/accuracies"] == 0.5


def command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["llmcore", "align", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_refused_commands_leave_a_finished_run_as_it_was(tiny_model, tmp_path, monkeypatch, capsys):
    good = write_rows(tmp_path / "good.jsonl", PAIRS[:4])
    run = tmp_path / "run"
    common = ["--out", run, "--loss", "ipo_sum", "--steps", 2, "--batch-size", 2, "--device", "cpu", "--json"]
    assert command(monkeypatch, "--data", good, "--model", tiny_model, *common) == 0
    capsys.readouterr()
    before = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert Path("metrics.jsonl") in before
    assert any(p.parts[0] == "final" for p in before)

    broken = tmp_path / "nan"
    shutil.copytree(tiny_model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})

    columns = write_rows(tmp_path / "columns.jsonl", [PAIRS[0], {"prompt": "a", "chosen": "b"}])
    empty = write_rows(tmp_path / "empty.jsonl", [PAIRS[0], {"prompt": "a", "chosen": " b", "rejected": "  "}])
    labels = write_rows(tmp_path / "labels.jsonl", [{"prompt": "a", "completion": " b", "label": 2}])
    cases = [
        (["--data", columns, "--model", tiny_model], ["columns.jsonl:2", "'rejected'"]),
        (["--data", empty, "--model", tiny_model], ["empty.jsonl:2", "'rejected'", "empty completion"]),
        (["--data", labels, "--model", tiny_model, "--loss", "kto"], ["labels.jsonl:1", "'label'", "2"]),
        (["--data", good, "--model", broken], ["model.layers.1.mlp.up_proj.weight", "NaN"]),
        (["--data", good, "--model", tiny_model, "--lr", "1e-3"], ["learning_rate", "other settings"]),
    ]
    for given, parts in cases:
        assert command(monkeypatch, *common, *given) == 2, given
        message = capsys.readouterr().err
        for part in parts:
            assert part in message, (given, message)
        after = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
        assert after == before, given
