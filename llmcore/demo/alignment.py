"""Direct alignment: DPO with LoRA on pairs that the model itself wrote and a rule labelled."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from llmcore.demo import Context, Section
from llmcore.demo.report import picture, table
from llmcore.files import write_bytes, write_json

PROMPTS = (
    "Name a fruit.",
    "What is the capital of France?",
    "Say hello to a new neighbour.",
    "Which animal barks?",
    "Give one reason to sleep well.",
    "What colour is the sky on a clear day?",
    "Name a musical instrument.",
    "How do I keep bread fresh?",
    "What is two plus three?",
    "Suggest a name for a cat.",
    "What do bees make?",
    "Tell me one fact about the moon.",
    "Name a river.",
    "What should I wear when it rains?",
    "Which season comes after winter?",
    "Give me one tip for learning to cook.",
)
HELD_OUT = 4  # every fourth prompt is kept out of training: one of the first four, one of the next four, …
SAMPLES = 4  # completions of a prompt, hence up to two pairs
MAX_NEW_TOKENS = 24
TEMPERATURE = 1.0
SEED = 0

RULE = "the completion with fewer words is preferred; equal counts give no pair"


def words(text: str) -> int:
    return len(text.split())


def is_held_out(prompt: int) -> bool:
    return prompt % HELD_OUT == HELD_OUT - 1


def label(samples: list[str]) -> list[tuple[str, str]]:
    """(chosen, rejected): the shortest against the longest, the second shortest against the second longest, …; no ties, none empty."""
    ordered = sorted((text for text in samples if text.strip()), key=words)
    pairs = zip(ordered[: len(ordered) // 2], reversed(ordered), strict=False)
    return [(short, long) for short, long in pairs if words(short) < words(long)]


def _ask(prompts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def _sample(model: Any, prompts: list[str], numbers: list[int], context: Context, what: str) -> list[list[str]]:
    """SAMPLES completions of each prompt. A completion depends on (seed, prompt's number, sample) and the model alone."""
    from llmcore.generation import Sampling, complete
    from llmcore.training import Progress

    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    streams = [number * SAMPLES + k for number in numbers for k in range(SAMPLES)]
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, seed=SEED)
    with Progress(len(asked), what, show=context.progress) as bar:
        texts = complete(model, _ask(asked), sampling, ids=streams, on_progress=lambda done, *_: bar.update(done)).texts
    return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]


def _greedy(model: Any, prompts: list[str]) -> list[str]:
    from llmcore.generation import Sampling, complete

    return complete(model, _ask(prompts), Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS)).texts


def _write_pairs(path: Path, prompts: list[str], samples: list[list[str]], *, held_out: bool) -> int:
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            },
            ensure_ascii=False,
        )
        for number, (prompt, texts) in enumerate(zip(prompts, samples, strict=True))
        if is_held_out(number) == held_out
        for chosen, rejected in label(texts)
    ]
    write_bytes(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def _mean_words(samples: list[list[str]]) -> float:
    counts = [words(text) for texts in samples for text in texts]
    return sum(counts) / len(counts)


def _curves(history: list[dict[str, Any]]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for axis, (name, title) in zip(
        axes, (("loss", "loss"), ("rewards/margins", "reward margin"), ("rewards/accuracies", "accuracy")), strict=True
    ):
        for key, text, style in ((name, "training pairs of the step", "-"), (f"eval/{name}", "all held-out pairs", "o--")):
            points = [(line["step"], line[key]) for line in history if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=text, markersize=4)
        axis.set(title=title, xlabel="optimiser step")
        axis.grid(alpha=0.3)
    axes[0].axhline(0.6931471805599453, color="gray", lw=0.8, ls=":", label="ln 2")
    axes[2].set_ylim(-0.05, 1.05)
    axes[0].legend(fontsize=8)
    return picture(figure, "loss, reward margin and accuracy over the optimiser steps")


def section(context: Context) -> Section:
    """Sample, label, train, sample again. Interrupted, the same folder goes on: finished samples are kept, training resumes."""
    import peft
    import torch

    from llmcore.methods import direct_alignment
    from llmcore.models import load_model
    from llmcore.training import TrainingConfig

    folder = context.out / "alignment"
    prompts = list(PROMPTS[: context.prompts])
    numbers = list(range(len(prompts)))
    held = [n for n in numbers if is_held_out(n)]
    if not held:
        raise ValueError(f"prompts must be at least {HELD_OUT}, so that one is held out; got {len(prompts)}")
    timings: dict[str, float] = {}
    clock = time.monotonic()
    model = load_model("smollm2", dtype=torch.float32)
    timings["load the model"] = time.monotonic() - clock

    made_with = {"prompts": prompts, "samples": SAMPLES, "max_new_tokens": MAX_NEW_TOKENS, "temperature": TEMPERATURE, "seed": SEED,
                 "model": model.fingerprint()}
    cached = folder / "samples.json"
    stored = json.loads(cached.read_text()) if cached.is_file() else {}
    if stored.get("made_with") != made_with:
        context.say(f"the model answers {len(prompts)} prompts {SAMPLES} times each")
        clock = time.monotonic()
        texts = _sample(model, prompts, numbers, context, "sampling")
        greedy = _greedy(model, [prompts[n] for n in held])
        stored = {"made_with": made_with, "samples": texts, "greedy": greedy, "seconds": time.monotonic() - clock}
        write_json(cached, stored)
    else:
        context.say(f"keeping the samples in {cached}")
    samples: list[list[str]] = stored["samples"]
    timings["sample completions"] = stored["seconds"]

    train_pairs, eval_pairs = folder / "pairs.jsonl", folder / "pairs-held-out.jsonl"
    count = _write_pairs(train_pairs, prompts, samples, held_out=False)
    count_held = _write_pairs(eval_pairs, prompts, samples, held_out=True)
    if not count:
        raise ValueError(f"every prompt gave ties only: no pair to train on; see {cached}")

    config = direct_alignment.Config(
        loss="dpo",
        loss_options={"beta": 0.1},
        batch_size=4,
        micro_batch_size=2,
        num_steps=context.steps,
        lora_rank=16,
        training=TrainingConfig(learning_rate=2e-4, warmup_steps=min(3, context.steps), checkpoint_every=5, eval_every=10),
    )
    context.say(f"DPO with LoRA on {count} pairs, {count_held} held out")
    result = direct_alignment.train(
        train_pairs, config=config, model=model, output_dir=folder / "training", eval_source=eval_pairs if count_held else None,
        progress=context.progress,
    )
    timings["train (all steps, evaluations included)"] = sum(line["seconds"] for line in result.history)

    context.say("the trained model answers the held-out prompts")
    clock = time.monotonic()
    fresh = load_model("smollm2", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(fresh.model, str(folder / "training" / "final"))
    trained = dataclasses.replace(fresh, model=adapted.merge_and_unload().eval())  # type: ignore[operator]
    asked = [prompts[n] for n in held]
    after = _sample(trained, asked, held, context, "sampling again")
    greedy_after = _greedy(trained, asked)
    timings["sample again"] = time.monotonic() - clock

    last = [line for line in result.history if "loss" in line][-1]
    first = next(line for line in result.history if "loss" in line)
    before = [samples[n] for n in held]
    numbers_out = {
        "prompts": len(prompts),
        "pairs": count,
        "pairs_held_out": count_held,
        "steps": result.steps,
        "first_loss": first["loss"],
        "final": {name: last[name] for name in sorted(last) if name.startswith(("loss", "rewards/", "eval/loss", "eval/rewards/"))},
        "mean_words_held_out": {"before": _mean_words(before), "after": _mean_words(after)},
        "seconds": {**timings, "median step": sorted(line["seconds"] for line in result.history)[len(result.history) // 2]},
        "held_out": [
            {"prompt": prompt, "greedy_before": g0, "greedy_after": g1, "before": b, "after": a}
            for prompt, g0, g1, b, a in zip(asked, stored["greedy"], greedy_after, before, after, strict=True)
        ],
        "history": result.history,
    }
    return Section("Direct alignment: DPO with LoRA", _page(numbers_out, result.history), numbers_out)


def _page(numbers: dict[str, Any], history: list[dict[str, Any]]) -> str:
    final, mean = numbers["final"], numbers["mean_words_held_out"]
    rows = [
        ("loss of the first step (ln 2 = 0.693147 when the policy still equals the reference)", f"{numbers['first_loss']:.6f}"),
        ("last step: loss, margin, accuracy (its own pairs)",
         f"{final['loss']:.4f}, {final['rewards/margins']:.3f}, {final['rewards/accuracies']:.2f}"),
    ]
    if "eval/loss" in final:
        rows.append((f"held-out pairs ({numbers['pairs_held_out']}) after the last step: loss, margin, accuracy",
                     f"{final['eval/loss']:.4f}, {final['eval/rewards/margins']:.3f}, {final['eval/rewards/accuracies']:.2f}"))
    rows.append((f"mean words of sampled answers to held-out prompts ({SAMPLES} each, the same random numbers), before and after",
                 f"{mean['before']:.1f}, {mean['after']:.1f}"))
    return (
        f'<p class="note"><b>What the data is.</b> The embedded SmolLM2-135M-Instruct answered {numbers["prompts"]} built-in prompts, '
        f"{SAMPLES} times each at temperature {TEMPERATURE:g}, at most {MAX_NEW_TOKENS} tokens (longer ones are cut). A rule, no person, "
        f"labelled the answers: {RULE}. This is no measure of quality: a shorter answer is not a better one, and the pairs are few and "
        "made by the model that is trained. It shows that the whole path runs and that the loss does what it says.</p>"
        f"<p>{numbers['pairs']} training pairs, {numbers['pairs_held_out']} pairs of prompts that training never saw, "
        f"{numbers['steps']} steps of up to 4 pairs, DPO with beta 0.1, LoRA of rank 16, learning rate 2e-4. Accuracy is the share of "
        "pairs whose chosen answer gained more log-probability over the reference than the rejected one; a tie counts one half. "
        "Where the held-out curve stays behind the training curve, the adapter has learnt the pairs rather than the rule, "
        "and a rule that counts words can be met by nonsense without spaces: the answers below show what the training really did.</p>"
        + _curves(history)
        + table(("measured", "value"), rows)
        + "<h3>Held-out prompts, greedy answers</h3>"
        + table(("prompt", "before", "after"), [(h["prompt"], h["greedy_before"], h["greedy_after"]) for h in numbers["held_out"]])
        + "<h3>Held-out prompts, one sampled answer (the same random numbers)</h3>"
        + table(("prompt", "before", "after"), [(h["prompt"], h["before"][0], h["after"][0]) for h in numbers["held_out"]])
        + "<h3>Time</h3>"
        + table(("part", "seconds"), [(name, f"{value:.1f}") for name, value in numbers["seconds"].items()])
    )
