"""`llmcore align`: train a model on preferences, or score preferences with a model."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Train on preference data, or score it.")

Data = Annotated[str, typer.Option(help="rows: .jsonl / .parquet (.gz too), a saved dataset's folder or a Hugging Face dataset's name")]
Model = Annotated[str, typer.Option(help="'smollm2' (embedded), a folder with safetensors, a .gguf file or a hub id")]
Loss = Annotated[str, typer.Option(help="dpo, cdpo, ipo_sum, ipo_mean, hinge, simpo, orpo, cpo, rdpo, kto, …")]
Beta = Annotated[float | None, typer.Option(help="the loss's beta; its own default when not given")]
Option = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="another option of the loss, e.g. -o label_smoothing=0.1; repeatable")
]
MaxLength = Annotated[int, typer.Option(help="tokens a sequence may have")]
Truncation = Annotated[str, typer.Option(help="longer rows: reject (an error), drop, keep_start or keep_end")]
OnEmpty = Annotated[str, typer.Option(help="empty completions: error, drop or zero")]
Split = Annotated[str, typer.Option(help="split of a Hugging Face dataset")]
Limit = Annotated[int | None, typer.Option(help="use only the first rows")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16 weights; the checkpoint's own by default")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; the GPU when there is one")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, no progress")]


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="run folder; the same command resumes an interrupted run there")],
    model: Model = "smollm2",
    loss: Loss = "dpo",
    beta: Beta = None,
    option: Option = None,
    eval_data: Annotated[str | None, typer.Option(help="held-out rows, evaluated at the end (and every --eval-every steps)")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps; by default --epochs passes over the data")] = None,
    epochs: Annotated[float, typer.Option(help="passes over the data")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="pairs per optimiser step, over all processes")] = 8,
    micro_batch_size: Annotated[int, typer.Option(help="pairs per forward and backward")] = 2,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 5e-5,
    warmup_steps: Annotated[int, typer.Option()] = 5,
    schedule: Annotated[str, typer.Option(help="after the warm-up: constant, linear or cosine")] = "constant",
    optimizer: Annotated[str, typer.Option(help="adamw or rmsprop")] = "adamw",
    lora_rank: Annotated[int, typer.Option(help="rank of the adapters; 0 trains all weights")] = 16,
    reference: Annotated[str, typer.Option(help="auto, cached (scored once), adapter (LoRA off), model (a frozen copy), none")] = "auto",
    ld_alpha: Annotated[float | None, typer.Option(help="LD-DPO: weight of tokens beyond the shorter side's length")] = None,
    wpo: Annotated[bool, typer.Option("--wpo", help="weight pairs by the policy's own likelihood")] = False,
    max_length: MaxLength = 512,
    truncation: Truncation = "reject",
    on_empty: OnEmpty = "error",
    mixed_precision: Annotated[str, typer.Option(help="no, or bf16 (autocast over float32 weights)")] = "no",
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="recompute activations, for memory")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="steps between checkpoints")] = 50,
    eval_every: Annotated[int, typer.Option(help="steps between evaluations; 0 = only at the end")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    split: Split = "train",
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start again in a folder that holds a run, replacing it")] = False,
    as_json: AsJson = False,
) -> None:
    """Align a model on preference pairs (or on labelled single answers, with --loss kto).

    Rows have chosen, rejected and optionally prompt (text or messages); for kto prompt, completion and label. Every row is checked before
    the first step. metrics.jsonl grows by one line a step; Ctrl-C saves a checkpoint and the same command goes on from it.

    Several processes: torchrun --nproc-per-node 2 -m llmcore align train …, or accelerate launch.

    \b
    Examples:
      llmcore align train --data pairs.jsonl --out run
      llmcore align train --data pairs.jsonl.gz --loss ipo_sum --beta 0.05 --truncation drop --steps 100 --out run
      llmcore align train --data feedback.parquet --loss kto --lora-rank 0 --learning-rate 5e-7 --optimizer rmsprop --out run
    """
    import dataclasses

    from llmcore.methods import direct_alignment
    from llmcore.training import TrainingConfig

    config = direct_alignment.Config(
        loss=loss,
        loss_options=_options(beta, option),
        max_length=max_length,
        truncation=truncation,
        on_empty=on_empty,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        epochs=epochs,
        num_steps=steps,
        reference=reference,
        ld_alpha=ld_alpha,
        wpo=wpo,
        lora_rank=lora_rank,
        training=TrainingConfig(
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            schedule=schedule,
            optimizer=optimizer,
            mixed_precision=mixed_precision,
            gradient_checkpointing=gradient_checkpointing,
            checkpoint_every=checkpoint_every,
            eval_every=eval_every,
            seed=seed,
        ),
    )
    with _plain_warnings():
        result = direct_alignment.train(
            data,
            config=config,
            model=model,
            output_dir=out,
            eval_source=eval_data,
            split=split,
            limit=limit,
            dtype=dtype,
            device=device,
            resume=not fresh,
            progress=not as_json,
        )
    if not _is_main():
        return
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    done = [line for line in result.history if "loss" in line]
    if done:
        first, last = done[0], done[-1]
        for name in (
            "loss",
            "rewards/margins",
            "rewards/accuracies",
            "logratio/chosen",
            "logratio/rejected",
            "eval/loss",
            "eval/rewards/accuracies",
        ):
            if name in last:
                print(f"{name:28} {first.get(name, float('nan')):10.4f} -> {last[name]:10.4f}")
    again = f", resumed from step {result.resumed_from}" if result.resumed_from is not None else ""
    print(f"{result.steps} steps in {result.seconds:.0f} s{again}, {result.skipped} skipped; {out}/metrics.jsonl, {out}/final")


@app.command()
def score(
    data: Data,
    model: Model = "smollm2",
    adapter: Annotated[Path | None, typer.Option(help="a run's final/ folder: score it against its own base")] = None,
    reference: Annotated[str | None, typer.Option(help="reference model; without it (and without --adapter) margins are against 0")] = None,
    loss: Loss = "dpo",
    beta: Beta = None,
    option: Option = None,
    max_length: MaxLength = 512,
    truncation: Truncation = "reject",
    on_empty: OnEmpty = "error",
    micro_batch_size: Annotated[int, typer.Option(help="pairs per forward")] = 4,
    split: Split = "train",
    limit: Limit = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="write the score of every row there, as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Log-probabilities, margins and accuracy of a model on preference pairs.

    \b
    Examples:
      llmcore align score --data pairs.jsonl
      llmcore align score --data held_out.jsonl --adapter run/final --json
    """
    from llmcore.files import write_json
    from llmcore.methods import direct_alignment

    config = direct_alignment.Config(
        loss=loss,
        loss_options=_options(beta, option),
        max_length=max_length,
        truncation=truncation,
        on_empty=on_empty,
        micro_batch_size=micro_batch_size,
        batch_size=micro_batch_size,
    )
    with _plain_warnings():
        result = direct_alignment.score(
            data,
            model=model,
            adapter=adapter,
            reference=reference,
            config=config,
            split=split,
            limit=limit,
            dtype=dtype,
            device=device,
            progress=not as_json,
        )
    if out is not None:
        write_json(out, result.to_json())
    if as_json:
        print(json.dumps(result.to_json()))
        return
    for name, value in result.metrics.items():
        print(f"{name:28} {value:12.5f}")
    counts = ", ".join(f"{v} {k}" for k, v in result.data_counts.items() if v and k not in ("rows", "kept"))
    print(f"{len(result.ids)} pairs; {counts or 'all rows used'}")


def _options(beta: float | None, given: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {} if beta is None else {"beta": beta}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ValueError(f"--option must be name=value, got {item!r}")
        if name in options:
            raise ValueError(f"option {name!r} is given twice")
        try:
            options[name] = float(value)
        except ValueError:
            options[name] = value
    return options


def _is_main() -> bool:
    import os

    return int(os.environ.get("RANK", "0")) == 0


class _plain_warnings(warnings.catch_warnings):
    """Show warnings of the data and the loss as single lines on standard error."""

    def __enter__(self) -> Any:
        log = super().__enter__()
        warnings.showwarning = lambda message, *_args, **_more: print(f"warning: {message}", file=sys.stderr)
        warnings.filterwarnings("default", category=UserWarning)
        return log
