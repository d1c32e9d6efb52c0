"""Instance-adaptive prompting: selection rules, answers in text, and scores equal to separate full passes on the real model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from llmcore.methods.instance_adaptive import (
    CANDIDATES,
    IAPConfig,
    InstanceAdaptivePrompting,
    Threshold,
    calibrate_lambdas,
    calibrate_threshold,
    find_answer,
    flow_map,
    normalise,
    select_mv,
    select_ss,
)

QUESTION = "Tom has 3 apples and buys 2 more. How many apples does Tom have?"
ENDINGS = (" Tom has 3 + 2 apples. The answer is 5.", " we count the apples one by one. The answer is 6", " The answer is 5.")


@pytest.mark.parametrize(("text", "family", "expected"), [
    ("So 7 + 11 is large. The answer is 18.", "number", "18"), ("The answer is $1,250.50 in all", "number", "1,250.50"),
    ("x = 3, y = 4", "number", None), ("total: 3 + 4 = 7\n", "number", "7"), ("3 x $4 = $12 in all.\nGood.", "number", "12"),
    ("Then 3 + 4 = 7 and x = 9", "number", None), ("half: 1 / 8 = 12.5 %", "number", "12.5 %"), ("#### -42", "number", "-42"),
    ("answer is 3. No, the answer is 4.", "number", "4"), ("We saw 12 cows.", "number", None),
    ("The answer is \\boxed{12}", "number", "12"), ("The answer is: 18", "number", "18"), ("The answer is\n", "number", None),
    ("The answer is (B).", "option", "B"), ("The answer is: c)", "option", "c"), ("Answer: D", "option", "D"),
    ("Apples are good.", "option", None), ("The answer is Apples", "option", None),
    ("The answer is valid.", "yesno", "valid"), ("Answer: No", "yesno", "No"),
])  # fmt: skip
def test_answers_need_a_cue_and_come_whole(text, family, expected):
    span = find_answer(text, family)
    assert (None if span is None else text[span[0] : span[1]]) == expected


def test_numbers_compare_as_numbers():
    assert normalise("5.0") == normalise("5") == normalise(" $5 ")
    assert normalise("1,000") == normalise("1000")
    assert normalise("(B)") == normalise("b")
    assert normalise("1/2") == normalise("0.5")


def test_selection_rules():
    scores, answers = [0.1, None, 0.5, 0.4, 0.3], ["7", None, "8", "7.0", "9"]
    assert select_ss(scores, answers, 0.35)[0] == 2
    assert select_ss(scores, answers, -torch.inf)[0] == 0
    assert select_ss(scores, answers, torch.inf)[0] == 2
    assert select_mv(scores, answers, 3)[0] == 2  # 8, 7, 9: a tie, the best supporting score decides
    assert select_mv(scores, answers, 4)[0] == 3  # two votes for 7, from its better supporter
    assert select_mv(scores, answers, 99) == select_mv(scores, answers, 4)
    assert select_mv([None], [None]) == (None, "no_score")
    with pytest.raises(ValueError, match="k must be"):
        select_mv(scores, answers, 0)


def test_thresholds_are_optimal_by_brute_force():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(6, 4, generator=generator).mul(8).round() / 8
        correct = torch.rand(6, 4, generator=generator) < 0.4
        if correct.all() or not correct.any():
            continue
        grid = torch.cat([scores.flatten() - 1, scores.flatten() + 1e-3, scores.flatten() - 1e-3])

        def balanced(t, scores=scores, correct=correct):
            return (scores[correct] > t).double().mean() + (scores[~correct] <= t).double().mean()

        def downstream(t, scores=scores, correct=correct):
            return sum(bool(correct[i, select_ss(scores[i].tolist(), ["x"] * 4, t)[0]]) for i in range(6))

        for metric, merit in (("balanced", balanced), ("downstream", downstream)):
            found = calibrate_threshold(scores, correct, metric)
            assert merit(found) == pytest.approx(float(max(merit(float(t)) for t in grid)))
    with pytest.raises(ValueError, match="one class"):
        calibrate_threshold([1.0, 2.0], [True, True])


def test_weights_rank_right_above_wrong_and_maps_average():
    generator = torch.Generator().manual_seed(1)
    flows = torch.rand(40, 3, generator=generator)
    correct = flows[:, 1] > 0.5 + 0.1 * torch.randn(40, generator=generator)
    weights = calibrate_lambdas(flows, correct)
    assert sum(weights) == pytest.approx(1)
    assert weights[1] == max(weights)
    scores = flows.double() @ torch.tensor(weights, dtype=torch.float64)
    best = sum(float(g > b) + 0.5 * float(g == b) for g in scores[correct] for b in scores[~correct])
    for other in ((0.0, 1.0, 0.0), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.9, 0.1)):
        s = flows.double() @ torch.tensor(other, dtype=torch.float64)
        assert best >= sum(float(g > b) + 0.5 * float(g == b) for g in s[correct] for b in s[~correct]) - 1e-9
    layers, heads = flow_map(torch.arange(2 * 2 * 3 * 3.0).view(2, 2, 3, 3))
    assert torch.equal(heads, torch.arange(18.0).view(2, 3, 3) + 9)
    assert torch.equal(layers, heads.mean(1))
    with pytest.raises(ValueError, match="flows must be"):
        flow_map(torch.zeros(2, 3))


def test_a_threshold_refuses_other_settings(smollm2):
    metadata = InstanceAdaptivePrompting(smollm2).metadata()
    threshold = calibrate_threshold([1.0, 2.0, 3.0], [False, False, True], metadata=metadata)
    assert isinstance(threshold, Threshold)
    assert threshold == 2.5
    InstanceAdaptivePrompting(smollm2, config=IAPConfig(strategy="ss", threshold=threshold))
    with pytest.raises(ValueError, match="calibrated with other loss"):
        InstanceAdaptivePrompting(smollm2, config=IAPConfig(strategy="ss", threshold=threshold, loss="margin"))
    silent = IAPConfig(candidates=CANDIDATES[:1], max_new_tokens=1, answer=lambda text: None, on_no_score="raise")
    with pytest.raises(ValueError, match="has a score"):
        InstanceAdaptivePrompting(smollm2, config=silent).answer(QUESTION)
    result = InstanceAdaptivePrompting(smollm2, config=dataclasses.replace(silent, on_no_score="first")).answer(QUESTION)
    assert (result.chosen, result.answer, result.reason) == (0, None, "no_score")


@pytest.mark.parametrize("change", [{"candidates": ()}, {"candidates": ("a", "a")}, {"k": 0}, {"lambdas": (0.5, 0.5, 0.5)},
                                    {"strategy": "ss"},
                                    {"template": "{p} {q}"}, {"loss": "nll"}, {"answer": "essay"}, {"strategy": "best"}])  # fmt: skip
def test_bad_settings_are_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change)) if change != {'strategy': 'ss'} else 'threshold'} must"):
        IAPConfig(**change)


def _items(iap, shared=True):
    items = []
    for candidate, ending in zip(CANDIDATES, ENDINGS, strict=False):
        text, question, prompt = iap.compose(QUESTION, candidate)
        span = find_answer(ending, "number")
        items.append((text + ending, {"question": question, "prompt": prompt}, (span[0] + len(text), span[1] + len(text))))
    return items


def test_shared_suffix_batch_equals_separate_full_passes(smollm2):
    iap = InstanceAdaptivePrompting(smollm2)
    items = _items(iap)
    together = iap.score_texts(items)
    separate = InstanceAdaptivePrompting(smollm2, config=IAPConfig(share_prefix=False, batch=1)).score_texts(items)
    for a, b in zip(together, separate, strict=True):
        assert a["status"] == b["status"] == "scored"
        assert a["score"] == pytest.approx(b["score"], rel=2e-4)
        torch.testing.assert_close(a["flows"], b["flows"], rtol=2e-2, atol=2e-4 * float(b["flows"].max()))
    tail = [(text + " And so on, for ever.", spans, span) for text, spans, span in items[:1]]
    assert iap.score_texts(tail)[0]["score"] == pytest.approx(together[0]["score"], rel=2e-4), "nothing behind the answer may matter"
    margin = InstanceAdaptivePrompting(smollm2, config=IAPConfig(loss="margin")).score_texts(items)
    for a, b in zip(together, margin, strict=True):
        assert a["score"] == pytest.approx(b["score"] * (1 - a["p_answer"]), rel=2e-3)


def test_scores_are_linear_in_lambdas_and_flagged_without_rationale(smollm2):
    plain = InstanceAdaptivePrompting(smollm2, config=IAPConfig(template="Q: {q}\nA: {p}", layers="shallow"))
    items = _items(plain)[:1]
    parts = [dataclasses.replace(plain.config, lambdas=tuple(float(i == j) for j in range(3))) for i in range(3)]
    scores = [InstanceAdaptivePrompting(smollm2, config=config).score_texts(items)[0]["score"] for config in parts]
    assert plain.score_texts(items)[0]["score"] == pytest.approx(sum(scores) / 3, rel=1e-6)
    assert plain.score_texts(items)[0]["flows"].shape == (10, 9, 3)
    text, question, prompt = plain.compose(QUESTION, CANDIDATES[0])
    direct = plain.score_texts([(text + " 5", {"question": question, "prompt": prompt}, (len(text) + 1, len(text) + 2)), (text, {}, None)])
    assert direct[1]["status"] == "no_answer"
    assert direct[0]["status"] in ("empty_rationale", "scored")


def test_swapping_segments_swaps_the_weights(smollm2):
    """With rationale and question exchanged in the segments, the weight of a flow follows its pair of names."""
    ids = torch.tensor([smollm2.tokenizer("Tom has 3 apples. Let us count them all. One, two, three: 3")["input_ids"]])
    n = ids.shape[1]
    spans = {"question": (0, 5), "prompt": (5, 10), "rationale": (10, n)}
    swapped = {"prompt": (0, 5), "question": (5, 10), "rationale": (10, n)}
    score = {}
    for name, segments in (("plain", spans), ("swapped", swapped)):
        for weights in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)):
            iap = InstanceAdaptivePrompting(smollm2, config=IAPConfig(lambdas=weights))
            flows, total = iap.score(ids, segments, n - 1, 33)
            assert flows.shape == (1, 30, 9, 3)
            score[name, weights] = float(total)
    assert score["swapped", (0.0, 1.0, 0.0)] == pytest.approx(score["plain", (0.0, 0.0, 1.0)], rel=1e-6)
    assert score["swapped", (0.0, 0.0, 1.0)] == pytest.approx(score["plain", (0.0, 1.0, 0.0)], rel=1e-6)
    assert score["swapped", (1.0, 0.0, 0.0)] == 0.0, "no prompt reads a question that comes later"


def test_substitution_in_chunks_equals_one_by_one(smollm2):
    settings = {"candidates": CANDIDATES[:3], "max_new_tokens": 6, "last_number": True, "answer": lambda text: (1, 2), "strategy": "ss"}
    every = InstanceAdaptivePrompting(smollm2, config=IAPConfig(**settings, threshold=float("inf"))).answer(QUESTION)
    scores = [one.score for one in every.per_candidate]
    assert len(scores) == 3
    assert every.chosen == max(range(3), key=lambda i: scores[i])
    threshold = sorted(scores)[1] * 1.01
    one, chunked = (
        InstanceAdaptivePrompting(smollm2, config=IAPConfig(**settings, threshold=threshold, batch=batch)).answer(QUESTION)
        for batch in (1, 3)
    )
    assert (one.chosen, one.answer, one.reason) == (chunked.chosen, chunked.answer, chunked.reason)
    assert len(one.per_candidate) == one.chosen + 1, "later candidates are not generated"
    for a, b in zip(one.per_candidate, chunked.per_candidate, strict=False):
        assert (a.text, a.answer) == (b.text, b.answer)
        assert a.score == pytest.approx(b.score, rel=2e-4)


def test_answering_resumes_and_explains(smollm2, tmp_path):
    config = IAPConfig(candidates=CANDIDATES[:2], max_new_tokens=12, last_number=True, batch=2)
    iap = InstanceAdaptivePrompting(smollm2, config=config)
    path = tmp_path / "runs.jsonl"
    first = iap.answer_many([QUESTION, " "], path)
    assert first[0].metadata["loss"] == "ce"
    assert len(first[0].per_candidate) == 2
    assert "question must not be empty" in first[1]["error"]
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    again = iap.answer_many([QUESTION], path)
    assert again[0] == first[0]
    assert path.read_text().splitlines() == lines
    scores = [one.score for one in first[0].per_candidate if one.score is not None]
    if scores:
        eager = dataclasses.replace(config, strategy="ss", threshold=min(scores) - 1)
        assert InstanceAdaptivePrompting(smollm2, config=eager).answer(QUESTION).reason.startswith("first score")
    assert json.loads(first[0].to_json())["question"] == QUESTION
