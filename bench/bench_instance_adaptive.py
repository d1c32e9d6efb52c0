"""Choosing among nine trigger sentences for one question, beside what any user of nine triggers pays: one batched greedy decode of them.

    python -m pytest bench/bench_instance_adaptive.py -s         32 new tokens (about a minute)
    python bench/bench_instance_adaptive.py [--tokens 256] [--rounds 2] [--save]

Ways, in interleaved rounds on the same nine prompts, greedy, the same limit of new tokens:
    generate        transformers' generate, nine rows padded on the left, its key/value cache
    decode          llmcore.generation.complete, nine rows, the shared opening computed once
    saliency        InstanceAdaptivePrompting.score_texts of the nine finished texts: prefix once, suffixes in one pass
    nine passes     the same scores from nine separate full passes (one round)
    answer          InstanceAdaptivePrompting.answer: decode, find the answers, score, vote
FLOP of the saliency: 4 · parameters of the layers · tokens behind the shared opening, up to each answer (forward and activation-only
backward), against 2 · parameters · tokens of the decode: a pass costs two decodes' worth of products, at a large matrix's rate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness
import torch

QUESTION = "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"  # GSM8K, test


def measure(tokens: int, rounds: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    from llmcore.methods.instance_adaptive import CANDIDATES, IAPConfig, InstanceAdaptivePrompting, find_answer

    from llmcore.generation import Sampling, complete
    from llmcore.models import load_model

    language_model = load_model("smollm2", device="cpu", dtype=dtype)
    model, tokenizer = language_model.model, language_model.tokenizer
    config = IAPConfig(max_new_tokens=tokens, last_number=True)
    iap = InstanceAdaptivePrompting(language_model, config=config)
    composed = [iap.compose(QUESTION, candidate) for candidate in CANDIDATES]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _, _ in composed]
    width = max(map(len, prompts))
    padded = torch.tensor([[tokenizer.eos_token_id] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    sampling = Sampling(temperature=0.0, max_new_tokens=tokens)

    def generate() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                input_ids=padded, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id
            )

    def decode() -> Any:
        return complete(language_model, prompts, sampling, max_rows=len(prompts))

    items = []
    completions = decode()
    for (text, question, prompt), completion in zip(composed, completions, strict=True):
        found = find_answer(completion.text, config.answer, last_number=True)
        span = None if found is None else (found[0] + len(text), found[1] + len(text))
        items.append((text + completion.text, {"question": question, "prompt": prompt}, span))
    separate = InstanceAdaptivePrompting(language_model, config=IAPConfig(share_prefix=False, batch=1, last_number=True))
    together, apart = iap.score_texts(items), separate.score_texts(items)
    pairs = [(a["score"], b["score"]) for a, b in zip(together, apart, strict=True) if "score" in a]
    error = max(abs(a - b) / b for a, b in pairs)
    if not error < (2e-4 if dtype == torch.float32 else 0.5):  # bfloat16 rounds activations; float32 is where equality is meant
        raise RuntimeError(f"scores differ from nine separate full passes by {error:.1e}; no times for a wrong result")
    generated = generate()[:, width:]
    same = sum(tokenizer.decode(row, skip_special_tokens=True) == c.text for row, c in zip(generated, completions, strict=True))
    rows = harness.interleaved(
        {"generate": generate, "decode": decode, "saliency": lambda: iap.score_texts(items), "answer": lambda: iap.answer(QUESTION)},
        rounds=rounds, slow_rounds=rounds,
    )  # fmt: skip
    rows |= harness.interleaved({"nine passes": lambda: separate.score_texts(items)}, rounds=1)
    ms = {name: row["median_ms"] for name, row in rows.items()}
    best = min(ms["generate"], ms["decode"])
    return {
        "dtype": str(dtype).removeprefix("torch."), "max_new_tokens": tokens, "rows": rows, "scored": len(pairs),
        "generated_tokens": sum(len(c.token_ids) for c in completions), "texts_equal_to_generate": same,
        "error_against_separate_passes": error, "saliency_vs_generate": ms["saliency"] / ms["generate"],
        "saliency_vs_fastest_decode": ms["saliency"] / best, "answer_vs_generate": ms["answer"] / ms["generate"],
        "answer_vs_fastest_decode": ms["answer"] / best,
    }  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """The table of one result file."""
    lines = ["SmolLM2-135M, one GSM8K question, nine triggers, greedy."]
    for run in content["runs"]:
        base = run["rows"]["generate"]["median_ms"]
        lines += ["", f"{run['dtype']}, at most {run['max_new_tokens']} new tokens ({run['generated_tokens']} in all), "
                  f"{run['scored']} of 9 scored, scores within {run['error_against_separate_passes']:.0e} of nine separate passes:", "",
                  "| step | median s [p20, p80] | rounds | of generate |", "|---|---:|---:|---:|"]
        for name, row in run["rows"].items():
            median, low, high = (row[f"{key}_ms"] / 1e3 for key in ("median", "p20", "p80"))
            lines.append(f"| {name} | {median:.2f} [{low:.2f}, {high:.2f}] | {row['rounds']} | {row['median_ms'] / base:.2f} |")
    return "\n".join(lines)


def test_instance_adaptive_small():
    assert measure(32, 1)["scored"] > 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for kind in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        runs.append(measure(options.tokens, options.rounds, getattr(torch, kind)))
        print(markdown({"runs": runs[-1:]}), flush=True)
        print({name: x for name, x in runs[-1].items() if name != "rows"}, flush=True)
        if options.save:
            harness.save("instance_adaptive", {"runs": runs})
