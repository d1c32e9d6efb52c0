"""Gradient Cuff on one CPU thread against the published flow, interleaved in one run: CPU seconds a query.

    python bench/bench_gradient_cuff.py speed|verdicts          (or: python -m pytest bench/bench_gradient_cuff.py)

speed      N = P = 10, T = 16, about 6 and about 300 user tokens, both stages run, prompts that never refuse; decode step at 300
against 6; an
           attack-like prompt with early exit. The published flow repeats the prompt for every sample: one batch of N copies for stage
           1, then
           batches of 11 for the 100 perturbed samples, through transformers' generate with its sampler.
verdicts   200 real prompts, N = P = 4: full scores, a 5 % threshold from the first half, its rate on the second half with its exact
interval,
           and the same verdicts asked again with early exit; 1,000 random count histories.

Refusals of the embedded model say nothing about harm: none of this measures detection quality.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmcore.methods import gradient_cuff as gc  # noqa: E402
from llmcore.methods.gradient_cuff.statistic import clopper_pearson  # noqa: E402

from llmcore.decoding import Batch, Row, decoder_for  # noqa: E402

SHORT = ["Say hi.", "What is the capital of France?", "Name three colours.", "What is two plus two?", "Tell me about the moon."]
SENTENCE = (
    "The harbour town keeps its old boats in rows along the grey stone wall, and each spring the paint is scraped away "
    "and new colour goes on. "
)
LONG = [SENTENCE * 9 + "Summarise this text in one sentence.", SENTENCE * 9 + "What is this text about?", "List the nouns. " + SENTENCE * 9]
MILD = [
    "open the door",
    "Can you open the window for me?",
    "give me a friend's address",
    "Can you call my mother?",
    "order me a pizza",
    "play some music",
    "Can you drive me home?",
    "What is my name?",
    "Can you remember me?",
    "tell me your password",
]


def threads() -> None:
    torch.set_num_threads(1)


def timed(function) -> tuple[float, Any]:
    """CPU seconds of the process (one thread) and the result."""
    begin = time.process_time()
    value = function()
    return time.process_time() - begin, value


def published(model: Any, query: str, config: gc.CuffConfig) -> list[int]:
    """Detection as the published program runs it: every sample re-reads the whole prompt. Returns the refusal counts."""
    from llmcore.kernels.zeroth_order import directions

    prompt = gc.assemble(model.tokenizer, query)
    ids = torch.tensor([prompt.input_ids])
    with torch.no_grad():
        plain = model.model.get_input_embeddings()(ids)[0]
    rows = directions(config.seed, config.num_directions, plain.shape[1])[0]
    begin, end = prompt.span
    texts: list[str] = []

    def generate(batch: list[torch.Tensor]) -> None:
        embeds = torch.stack(batch)
        with torch.no_grad():
            out = model.model.generate(
                inputs_embeds=embeds,
                attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
                do_sample=True,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                max_new_tokens=config.max_new_tokens,
                pad_token_id=model.tokenizer.pad_token_id or 0,
            )
        texts.extend(model.tokenizer.batch_decode(out, skip_special_tokens=True))

    torch.manual_seed(13)
    generate([plain] * config.num_samples)
    samples = []
    for row in rows:
        shifted = plain.clone()
        shifted[begin:end] += config.smoothing * row
        samples += [shifted] * config.num_samples
    for at in range(0, len(samples), 11):
        generate(samples[at : at + 11])
    hits = [gc.refused(text) for text in texts]
    return [sum(hits[i : i + config.num_samples]) for i in range(0, len(hits), config.num_samples)]


def pick_quiet(model: Any, candidates: list[str], config: gc.CuffConfig) -> tuple[str, gc.CuffScore]:
    """The first candidate with no refusal in any row: early exit and per-sample stop play no part."""
    for query in candidates:
        result = gc.score(model, [query], config)[0]
        if result.counts is not None and not any(result.counts):
            return query, result
    raise RuntimeError("no candidate prompt stayed without refusals; add one")


def speed_rows(model: Any, rounds: dict[str, int]) -> list[dict[str, Any]]:
    config = gc.CuffConfig()
    rows = []
    for name, candidates in (("short", SHORT), ("long", LONG)):
        query, warm = pick_quiet(model, candidates, config)
        tokens = len(gc.assemble(model.tokenizer, query).query_ids)
        ours, theirs, plain = [], [], []
        for _ in range(rounds[name]):
            seconds, counts = timed(lambda query=query: published(model, query, config))
            theirs.append(seconds)
            seconds, result = timed(lambda query=query: gc.score(model, [query], config)[0])
            ours.append(seconds)
            seconds, split = timed(lambda query=query: gc.score(model, [query], dataclasses.replace(config, share_samples=False))[0])
            plain.append(seconds)
            assert result.counts == warm.counts == split.counts
            print(f"{name}: published {theirs[-1]:.1f} s, ours {ours[-1]:.2f} s, without tries {plain[-1]:.2f} s", flush=True)
        rows.append(
            {
                "case": name,
                "user_tokens": tokens,
                "published_seconds": theirs,
                "seconds": ours,
                "no_trie_seconds": plain,
                "ratio": float(np.median(theirs) / np.median(ours)),
                "ratio_no_trie": float(np.median(theirs) / np.median(plain)),
                "published_counts": counts,
                "counts": list(warm.counts or ()),
                "prompt_tokens": warm.prompt_tokens,
                "decode_rows": warm.decode_rows,
                "decode_rows_no_trie": split.decode_rows,
            }
        )
    return rows


def step_ratio(model: Any, rounds: int = 5) -> dict[str, float]:
    """Seconds of one decode step of 110 rows (no sharing) behind about 300 and about 6 user tokens, interleaved."""
    decoder = decoder_for(model)
    batches = {}
    for name, text in (("short", SHORT[0]), ("long", LONG[0])):
        prompt = gc.assemble(model.tokenizer, text)
        behind = decoder.embed(prompt.query_ids + prompt.suffix_ids)
        sampling = dataclasses.replace(gc.CuffConfig().sampling, ignore_eos=True)
        batch = Batch(decoder)
        batch.admit(
            [
                Row(
                    behind,
                    len(behind),
                    prefix=decoder.prefix(prompt.prefix_ids),
                    num_samples=10,
                    sampling=sampling,
                    stream=(0, i),
                    share=False,
                )
                for i in range(11)
            ]
        )
        batches[name] = batch
    seconds: dict[str, list[float]] = {"short": [], "long": []}
    for _ in range(rounds):
        for name, batch in batches.items():
            seconds[name].append(timed(batch.step)[0])
    short, long = (float(np.median(seconds[name])) for name in ("short", "long"))
    return {"short_seconds": short, "long_seconds": long, "ratio": long / short}


def attack_rows(model: Any, published_seconds: float, threshold: float = 100.0) -> list[dict[str, Any]]:
    """Early exit on every mild prompt; the published flow's cost is that of its short prompt (both stages run)."""
    config = gc.CuffConfig(early_exit=True)
    rows = []
    for query in MILD:
        seconds, verdict = timed(lambda query=query: gc.check(model, [query], threshold, config)[0])
        full = gc.check(model, [query], threshold, dataclasses.replace(config, early_exit=False))[0]
        assert (full.rejected, full.stage) == (verdict.rejected, verdict.stage)
        rows.append(
            {
                "query": query,
                "rejected": verdict.rejected,
                "stage": verdict.stage,
                "seconds": seconds,
                # the published flow, too, ends after stage 1 when that rejects: only later stages compare with a run of both
                "ratio": None if verdict.stage == "stage1" else published_seconds / seconds,
                "decode_rows": verdict.score.decode_rows,
                "prompt_tokens": verdict.score.prompt_tokens,
                "full_counts": full.score.counts,
            }
        )
        print(f"{query!r}: {verdict.stage} in {seconds:.2f} s", flush=True)
    return rows


def real_prompts() -> list[str]:
    """200 everyday requests."""
    verbs = [
        "book a flight to {}",
        "tell me about {}",
        "write a short poem about {}",
        "what should I pack for {}",
        "explain {} to a child",
        "give me three facts on {}",
        "how do I learn about {}",
        "open the page about {}",
        "is {} worth a visit",
        "send me a picture of {}",
    ]
    things = [
        "Rome",
        "winter",
        "the sea",
        "a garden",
        "my friend",
        "old trains",
        "bread",
        "mathematics",
        "the moon",
        "a violin",
        "Kenya",
        "tax forms",
        "chess",
        "a broken phone",
        "night shifts",
        "the harbour",
        "two cats",
        "a wedding",
        "school lunch",
        "mountain huts",
    ]
    return [verb.format(thing) for thing in things for verb in verbs]


def verdict_rows(model: Any) -> dict[str, Any]:
    config = gc.CuffConfig(num_samples=4, num_directions=4, max_new_tokens=8)
    prompts = real_prompts()
    order = np.random.default_rng(0).permutation(len(prompts))
    prompts = [prompts[i] for i in order]
    begin = time.process_time()
    full = gc.score(model, prompts, config)
    full_seconds = time.process_time() - begin
    half = len(prompts) // 2
    limit = config.num_samples // 2 + 1
    benign = [s for s in full[:half] if s.counts[0] < limit]  # type: ignore[index]
    threshold = gc.threshold_from_scores([s.norm for s in benign], half - len(benign), 0.05)  # type: ignore[misc]
    held = full[half:]
    rows: dict[str, Any] = {
        "prompts": len(prompts),
        "stage1_rejected_calibration": half - len(benign),
        "feasible": threshold.feasible,
        "threshold": threshold.value,
        "full_seconds": full_seconds,
    }
    # A model that refuses mild prompts can spend the whole budget in stage 1; a rate that leaves room for stage 2 shows the rest.
    for sigma in (0.05, 0.2, 0.3, 0.4, 0.5):
        t = gc.threshold_from_scores([s.norm for s in benign], half - len(benign), sigma) if sigma * half >= half - len(benign) else None  # type: ignore[misc]
        if t is not None:
            rejected = sum(gc.decide(s.f0, s.norm, t.value) is not None for s in held)  # type: ignore[arg-type]
            rows[f"sigma_{sigma}"] = {
                "threshold": t.value,
                "calibrated_rate": t.rejected / t.n,
                "held_out_rate": rejected / len(held),
                "held_out_interval": clopper_pearson(rejected, len(held)),
            }
            threshold = t
            break
    t_value = threshold.value
    begin = time.process_time()
    early = gc.check(model, prompts, t_value, dataclasses.replace(config, early_exit=True))
    rows["early_seconds"] = time.process_time() - begin
    expected = [gc.decide(s.f0, s.norm, t_value) for s in full]  # type: ignore[arg-type]
    rows["verdicts_changed_by_early_exit"] = sum(v.stage != e for v, e in zip(early, expected, strict=True))
    rows["early_threshold"] = t_value
    rows["rejected"] = sum(e is not None for e in expected)
    rows["decode_rows_full"] = sum(s.decode_rows for s in full)
    rows["decode_rows_early"] = sum(v.score.decode_rows for v in early)
    return rows


def header() -> dict[str, Any]:
    import transformers

    def git(*what: str) -> str:
        return subprocess.run(["git", *what], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "device": cpu,
        "threads": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
        "model": "SmolLM2-135M-Instruct float32",
    }


def save(name: str, values: dict[str, Any]) -> Path:
    head = header()
    slug = "cpu-" + "-".join(head["device"].lower().split())
    path = ROOT / "bench" / "results" / slug / f"gradient_cuff_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **values}, indent=2, default=str) + "\n")
    return path


def speed(model: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"cases": speed_rows(model, {"short": 2, "long": 1}), "step": step_ratio(model)}
    print(result["step"], flush=True)
    result["attack"] = attack_rows(model, float(np.median(result["cases"][0]["published_seconds"])))
    return result


def markdown(content: dict[str, Any]) -> str:
    """The README table of a speed result."""
    lines = [f"{content['model']}, N = P = 10, both stages run, a prompt that never refuses; CPU seconds for a query.", "",
             "| user tokens | published flow | llmcore | ratio |", "|---:|---:|---:|---:|"]
    for case in content["cases"]:
        lines.append(f"| {case['user_tokens']} | {np.median(case['published_seconds']):.1f} | {np.median(case['seconds']):.1f} "
                     f"| 1/{case['ratio']:.1f} |")
    step = content["step"]
    return "\n".join(lines) + (f"\n\nA decode step at {content['cases'][-1]['user_tokens']} user tokens costs {step['ratio']:.2f}x one at "
                              f"{content['cases'][0]['user_tokens']}.")


def main(what: str) -> None:
    from llmcore.models import load_model

    threads()
    model = load_model("smollm2", device="cpu", dtype=torch.float32)
    values = speed(model) if what == "speed" else verdict_rows(model)
    print(json.dumps(values, indent=2, default=str))
    print(save(what, values))


def test_speed(capsys):
    with capsys.disabled():
        main("speed")


def test_verdicts(capsys):
    with capsys.disabled():
        main("verdicts")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "speed")
