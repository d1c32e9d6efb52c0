"""Direct alignment: DPO with LoRA on pairs that the model itself wrote and a rule labelled.

The model answers each question plainly and with a request to be brief; the rule prefers an answer of one whole sentence to one that is not.
The pairs keep the plain question only, so that training teaches the model to be brief unasked. Whether it learnt the rule or the pairs is
measured on questions that training never saw: margins of their pairs, and the share of its new answers that keep the rule.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmcore.demo import Context, Section
from llmcore.demo.prompts import HELD_OUT, PROMPTS, is_held_out
from llmcore.files import write_bytes, write_json

REQUEST = " Answer in one short sentence."  # added to the question for half of the samples, never in a pair
PLAIN, BRIEF = 1, 2  # samples of a prompt without and with the request
MAX_NEW_TOKENS = 32
TEMPERATURE = 0.7
SEED = 0
PAIRS_PER_STEP = 4
EVAL_EVERY = 10
LEARNING_RATE = 5e-5
BETA = 0.1
RANK = 16

RULE = f"one whole sentence: it ends by itself within {MAX_NEW_TOKENS} tokens, with one of . ! ? and none of these inside"


class Answer(NamedTuple):
    """A text and whether the model ended it (rather than the limit)."""

    text: str
    ended: bool


def keeps_the_rule(answer: Answer) -> bool:
    text = answer.text.strip()
    return answer.ended and len(text.split()) > 1 and re.fullmatch(r"[^.!?\n]+[.!?]", text) is not None


def label(answers: Sequence[Answer]) -> list[tuple[str, str]]:
    """(chosen, rejected): each distinct answer that keeps the rule with one that breaks it, in their order."""
    distinct = [answer for answer in dict.fromkeys(answers) if answer.text.strip()]
    good = [answer.text for answer in distinct if keeps_the_rule(answer)]
    bad = [answer.text for answer in distinct if not keeps_the_rule(answer)]
    return list(zip(good, bad, strict=False))


def share(answers: Sequence[Answer]) -> float:
    """Share of the answers that keep the rule."""
    return sum(map(keeps_the_rule, answers)) / len(answers)


def _answer(model: Any, questions: list[str], sampling: Any, context: Context, what: str, streams: list[int] | None = None) -> list[Answer]:
    from llmcore.generation import complete
    from llmcore.training import Progress

    asked = [[{"role": "user", "content": question}] for question in questions]
    with Progress(len(asked), what, show=context.progress) as bar:
        done = complete(model, asked, sampling, ids=streams, on_progress=lambda number, *_: bar.update(number))
    return [Answer(item.text, item.finish_reason == "eos") for item in done]


def _sample(
    model: Any, prompts: Sequence[str], numbers: Sequence[int], context: Context, what: str, *, requests: int
) -> list[list[Answer]]:
    """PLAIN answers of each prompt and `requests` more with the request. An answer depends on (seed, prompt's number, sample) and the
    model alone.
    """
    from llmcore.generation import Sampling

    each = PLAIN + requests
    questions = [prompt + (REQUEST if k >= PLAIN else "") for prompt in prompts for k in range(each)]
    streams = [number * (PLAIN + BRIEF) + k for number in numbers for k in range(each)]
    sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=MAX_NEW_TOKENS, seed=SEED)
    answers = _answer(model, questions, sampling, context, what, streams)
    return [answers[i : i + each] for i in range(0, len(answers), each)]


def _greedy(model: Any, prompts: list[str], context: Context) -> list[Answer]:
    from llmcore.generation import Sampling

    return _answer(model, prompts, Sampling(temperature=0, max_new_tokens=MAX_NEW_TOKENS), context, "greedy answers")


def _write_pairs(path: Path, prompts: list[str], answers: list[list[Answer]], *, held_out: bool) -> int:
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            },
            ensure_ascii=False,
        )
        for number, (prompt, given) in enumerate(zip(prompts, answers, strict=True))
        if is_held_out(number) == held_out
        for chosen, rejected in label(given)
    ]
    write_bytes(path, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def section(context: Context) -> Section:
    """Sample, label, train, sample again. Interrupted, the same folder goes on: finished samples are kept, training resumes."""
    import peft
    import torch

    from llmcore.demo import alignment_page
    from llmcore.methods import direct_alignment
    from llmcore.models import load_model
    from llmcore.training import TrainingConfig

    folder = context.out / "alignment"
    prompts = list(PROMPTS[: context.prompts])
    held = [n for n in range(len(prompts)) if is_held_out(n)]
    if not held:
        raise ValueError(f"prompts must be at least {HELD_OUT}, so that one is held out; got {len(prompts)}")
    asked = [prompts[n] for n in held]
    timings: dict[str, float] = {}
    clock = time.monotonic()
    model = load_model("smollm2", dtype=torch.float32)
    timings["load the model"] = time.monotonic() - clock

    made_with = {
        "prompts": prompts,
        "samples": [PLAIN, BRIEF, REQUEST],
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "model": model.fingerprint(),
    }
    cached = folder / "samples.json"
    stored = json.loads(cached.read_text()) if cached.is_file() else {}
    if stored.get("made_with") != made_with:
        context.say(f"the model answers {len(prompts)} questions {PLAIN + BRIEF} times each")
        clock = time.monotonic()
        answers = _sample(model, prompts, range(len(prompts)), context, "sampling", requests=BRIEF)
        greedy = _greedy(model, asked, context)
        stored = {"made_with": made_with, "samples": answers, "greedy": greedy, "seconds": time.monotonic() - clock}
        write_json(cached, stored)
    else:
        context.say(f"keeping the samples in {cached}")
    answers = [[Answer(*pair) for pair in each] for each in stored["samples"]]
    greedy_before = [Answer(*pair) for pair in stored["greedy"]]
    timings["sample answers"] = stored["seconds"]

    train_pairs, eval_pairs = folder / "pairs.jsonl", folder / "pairs-held-out.jsonl"
    count = _write_pairs(train_pairs, prompts, answers, held_out=False)
    count_held = _write_pairs(eval_pairs, prompts, answers, held_out=True)
    if not count:
        raise ValueError(f"no question got both an answer that keeps the rule and one that breaks it: no pair to train on; see {cached}")

    config = direct_alignment.Config(
        loss="dpo",
        loss_options={"beta": BETA},
        batch_size=PAIRS_PER_STEP,
        micro_batch_size=PAIRS_PER_STEP,
        num_steps=context.steps,
        lora_rank=RANK,
        training=TrainingConfig(
            learning_rate=LEARNING_RATE, warmup_steps=min(5, context.steps), schedule="linear", checkpoint_every=5, eval_every=EVAL_EVERY
        ),
    )
    context.say(f"DPO with LoRA on {count} pairs, {count_held} held out")
    result = direct_alignment.train(
        train_pairs,
        config=config,
        model=model,
        output_dir=folder / "training",
        eval_source=eval_pairs if count_held else None,
        progress=context.progress,
    )
    timings["train (all steps, evaluations included)"] = sum(line["seconds"] for line in result.history)

    context.say("the trained model answers the questions that it never saw")
    clock = time.monotonic()
    fresh = load_model("smollm2", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(fresh.model, str(folder / "training" / "final"))
    trained = dataclasses.replace(fresh, model=adapted.merge_and_unload().eval())  # type: ignore[operator]
    after = _sample(trained, asked, held, context, "sampling again", requests=0)
    greedy_after = _greedy(trained, asked, context)
    timings["sample again"] = time.monotonic() - clock

    before = [answers[n][:PLAIN] for n in held]
    steps = [line for line in result.history if "loss" in line]
    numbers = {
        "prompts": len(prompts),
        "prompts_held_out": len(held),
        "pairs": count,
        "pairs_held_out": count_held,
        "rule": RULE,
        "steps": result.steps,
        "first_loss": steps[0]["loss"],
        "final": {name: steps[-1][name] for name in sorted(steps[-1]) if name.startswith(("loss", "rewards/", "eval/"))},
        "keeps_the_rule": {
            "asked to be brief, before": share([a for each in answers for a in each[PLAIN:]]),
            "before": share([a for each in before for a in each]),
            "after": share([a for each in after for a in each]),
            "greedy before": share(greedy_before),
            "greedy after": share(greedy_after),
        },
        "seconds": timings,
        "median_step_seconds": sorted(line["seconds"] for line in result.history)[len(result.history) // 2],
        "held_out": [
            {"prompt": prompt, "greedy_before": g0, "greedy_after": g1, "before": b, "after": a}
            for prompt, g0, g1, b, a in zip(asked, greedy_before, greedy_after, before, after, strict=True)
        ],
        "history": result.history,
    }
    return Section("Direct alignment: teaching a model to be brief", alignment_page.page(numbers), numbers)
