"""The page of the direct-alignment section: what the data is, the curves, what changed on unseen questions, answers before and after."""

from __future__ import annotations

import math
from typing import Any

from llmcore.demo.report import Marked, cards, picture, table

INK, TRAIN, HELD = "#1b1f24", "#9db7d5", "#c2410c"


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Mean over the last `width` steps (fewer at the start)."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]


def curves(history: list[dict[str, Any]]) -> str:
    """Loss, margin and accuracy of training and held-out pairs over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    panels = (
        ("loss", "DPO loss", math.log(2)),
        ("rewards/margins", "reward margin (nats × beta)", 0.0),
        ("rewards/accuracies", "accuracy", 0.5),
    )
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, title, start) in zip(axes, panels, strict=True):
        steps = [line["step"] for line in history if name in line]
        values = [line[name] for line in history if name in line]
        axis.plot(steps, values, ".", color=TRAIN, markersize=4, label="training pairs of each step")
        axis.plot(steps, _smooth(values), color="#4878a8", lw=1.6, label="their mean over 5 steps")
        points = [(line["step"], line[f"eval/{name}"]) for line in history if f"eval/{name}" in line]
        if points:  # before training policy and reference are the same model: every margin is 0, every pair a tie
            axis.plot(*zip((0, start), *points, strict=True), "o-", color=HELD, lw=1.8, markersize=5, label="held-out pairs (all)")
        axis.axhline(start, color=INK, lw=0.8, ls=":")
        axis.set_title(title, fontsize=11, color=INK)
        axis.set_xlabel("optimiser step", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].set_ylim(-0.03, 1.03)
    axes[0].set_ylim(bottom=0)
    axes[0].annotate("ln 2", (0, math.log(2)), xytext=(2, 3), textcoords="offset points", fontsize=8, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return picture(figure, "loss, reward margin and accuracy over the optimiser steps, training and held-out pairs")


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _answers(rows: list[tuple[str, Any, Any]]) -> str:
    from llmcore.demo.alignment import Answer, keeps_the_rule

    def shown(answer: Any) -> tuple[str, bool]:
        answer = Answer(*answer)
        return answer.text + ("" if answer.ended else " […]"), keeps_the_rule(answer)

    cells = [(question, Marked(*shown(before)), Marked(*shown(after))) for question, before, after in rows]
    return table(("question", "before", "after"), cells, classes="answers")


def page(numbers: dict[str, Any]) -> str:
    from llmcore.demo import alignment as made

    final, kept = numbers["final"], numbers["keeps_the_rule"]
    figures = [
        (f"{_percent(kept['before'])} → {_percent(kept['after'])}", "sampled answers to unseen questions that keep the rule"),
        (f"{_percent(kept['greedy before'])} → {_percent(kept['greedy after'])}", "greedy answers to unseen questions that keep it"),
    ]
    if "eval/loss" in final:
        figures.append((f"0.50 → {final['eval/rewards/accuracies']:.2f}", f"accuracy on {numbers['pairs_held_out']} held-out pairs"))
        figures.append((f"{math.log(2):.3f} → {final['eval/loss']:.3f}", "loss on the held-out pairs"))
    measured = [
        ("loss of the first step (policy = reference, so ln 2 = 0.693147)", f"{numbers['first_loss']:.6f}"),
        (
            "last step, its own pairs: loss, margin, accuracy",
            f"{final['loss']:.4f}, {final['rewards/margins']:.3f}, {final['rewards/accuracies']:.2f}",
        ),
    ]
    if "eval/loss" in final:
        measured.append(
            (
                "held-out pairs after the last step: loss, margin, accuracy",
                f"{final['eval/loss']:.4f}, {final['eval/rewards/margins']:.3f}, {final['eval/rewards/accuracies']:.2f}",
            )
        )
        measured.append(
            (
                "held-out pairs: change of log-probability, chosen and rejected (nats a sequence)",
                f"{final['eval/logratio/chosen']:+.2f}, {final['eval/logratio/rejected']:+.2f}",
            )
        )
    measured.append(
        ("answers that keep the rule when the model is asked to be brief (training data)", _percent(kept["asked to be brief, before"]))
    )
    held = numbers["held_out"]
    return (
        "<p>A small chat model rambles. Can it learn to answer in one sentence <em>without being asked to</em>, from preferences "
        "alone? Everything below ran on this machine just now.</p>"
        + cards(figures)
        + f'<p class="note"><b>What the data is.</b> The embedded SmolLM2-135M-Instruct answered {numbers["prompts"]} built-in questions, '
        f"once as they are and {made.BRIEF} times with “{made.REQUEST.strip()}” appended (temperature {made.TEMPERATURE:g}). "
        f"A rule, no person, labelled the answers: preferred is <b>{numbers['rule']}</b>. The pairs hold the plain question only. "
        "The rule looks at form, not at truth: this model is often wrong, briefly or at length.</p>"
        f"<p>{numbers['pairs']} training pairs; {numbers['pairs_held_out']} pairs of {numbers['prompts_held_out']} questions that "
        f"training never saw. {numbers['steps']} steps of {made.PAIRS_PER_STEP} pairs, DPO with beta {made.BETA:g}, LoRA of rank "
        f"{made.RANK}, learning rate {made.LEARNING_RATE:g} falling to 0.</p>"
        + curves(numbers["history"])
        + '<p class="caption">Accuracy is the share of pairs whose preferred answer gained more log-probability over the reference than '
        "the other one, a tie counting one half: before training every pair is a tie. Where the held-out curve stays behind the training "
        "curve, the adapter has learnt the pairs rather than the rule.</p>"
        + "<h3>Unseen questions, greedy answers</h3>"
        + f'<p class="caption">✓ keeps the rule. […] the limit of {made.MAX_NEW_TOKENS} tokens cut the answer.</p>'
        + _answers([(h["prompt"], h["greedy_before"], h["greedy_after"]) for h in held])
        + "<h3>Unseen questions, one sampled answer (the same random numbers)</h3>"
        + _answers([(h["prompt"], h["before"][0], h["after"][0]) for h in held])
        + "<h3>Measured</h3>"
        + table(("", "value"), measured)
        + "<h3>Time</h3>"
        + table(("part", "seconds"), [(name, f"{value:.1f}") for name, value in numbers["seconds"].items()])
    )
