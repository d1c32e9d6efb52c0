"""Traps of public implementations and degenerate inputs, one test each: references, counts, micro-batches, dropout, refusals, KL."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from llmcore.methods import direct_alignment as da
from transformers import LlamaConfig, LlamaForCausalLM

from llmcore import adapters, data
from llmcore.losses import DPO, KTO, SFT, Combine, DPONorm, IPOMean
from llmcore.training import TrainingConfig

V = 12


def tiny(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A float64 model small enough to enumerate."""
    settings = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "initializer_range": 0.4, "tie_word_embeddings": True, **changes}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=0, pad_token_id=0, **settings)).double().eval()


def examples(count: int = 6, seed: int = 0, *, prompt: int = 3) -> list[data.Example]:
    """Pairs of ragged completions after a shared prompt, each ended by token 0, which is the padding too."""
    rng = np.random.default_rng(seed)

    def side(start: np.ndarray) -> data.Tokens:
        return data.Tokens(np.concatenate([start, rng.integers(1, V, rng.integers(1, 6)), [0]]), len(start))

    starts = [rng.integers(1, V, prompt) for _ in range(count)]
    return [data.Example(f"rows:{i + 1}", (side(start), side(start))) for i, start in enumerate(starts)]


def sequence_logp(model: torch.nn.Module, tokens: data.Tokens) -> torch.Tensor:
    """Σ log p of the completion, one sequence, full logits."""
    logp = model(input_ids=torch.from_numpy(tokens.ids)[None]).logits[0].double().log_softmax(-1)
    places = range(max(tokens.start, 1), len(tokens.ids))
    return sum((logp[t - 1, tokens.ids[t]] for t in places), torch.zeros((), dtype=torch.float64))


def fingerprint(model: torch.nn.Module, rows: list[data.Example], **changes) -> dict:
    class Tokenizer:
        chat_template = changes.pop("template", None)

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {str(i): i for i in range(V)}

    return da.reference_fingerprint(model, Tokenizer(), rows, da.Config(**changes), layout="padded", isolate=True)


# ---- references


def test_cached_scores_do_not_depend_on_their_batch_and_leave_the_random_numbers_alone(tmp_path):
    model, rows = tiny(), examples()
    mark = fingerprint(model, rows)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = da.CachedRef.compute(model, rows, fingerprint=mark, batch_size=1, progress=False)
    all_ = da.CachedRef.compute(model, rows, fingerprint=mark, batch_size=6, path=tmp_path / "ref.safetensors", progress=False)
    assert torch.equal(torch.get_rng_state(), before), "scoring the reference must not change the order of training"
    assert torch.equal(one.logp, all_.logp)
    truth = torch.stack([torch.stack([sequence_logp(model, s) for s in row.sequences]) for row in rows])
    torch.testing.assert_close(one.logp.double(), truth.detach(), rtol=1e-6, atol=1e-5)
    assert torch.equal(da.CachedRef.load(tmp_path / "ref.safetensors").logp, one.logp)


def test_half_done_scores_resume(tmp_path, monkeypatch):
    model, rows = tiny(), examples()
    mark, path = fingerprint(model, rows), tmp_path / "ref.safetensors"
    whole = da.CachedRef.compute(model, rows, fingerprint=mark, batch_size=2, progress=False)
    from llmcore.methods.direct_alignment import reference

    score, scored = reference._reference_pass, []

    def stop_at_the_third(given, batch, *rest):
        scored.extend(batch.ids)
        if len(scored) > 4:
            raise KeyboardInterrupt
        return score(given, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "_reference_pass", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            da.CachedRef.compute(model, rows, fingerprint=mark, batch_size=2, path=path, progress=False)
    seen: list[str] = []
    monkeypatch.setattr(reference, "_reference_pass", lambda m, batch, *rest: (seen.extend(batch.ids), score(m, batch, *rest))[1])
    resumed = da.CachedRef.compute(model, rows, fingerprint=mark, batch_size=2, path=path, progress=False)
    assert seen == ["rows:5", "rows:6"]
    assert torch.equal(resumed.logp, whole.logp)


def test_scores_of_another_reference_are_refused():
    model, rows = tiny(), examples()
    cached = da.CachedRef.compute(model, rows, fingerprint=fingerprint(model, rows), progress=False)
    cached.check(fingerprint(model, rows))
    others = {
        "model": fingerprint(tiny(1), rows),
        "tokenizer": fingerprint(model, rows, template="another"),
        "examples": fingerprint(model, rows[::-1]),
        "max_length": fingerprint(model, rows, max_length=64),
        "truncation": fingerprint(model, rows, truncation="keep_end"),
        "ld_alpha": fingerprint(model, rows, ld_alpha=0.5),
        "dtype": {"dtype": "torch.bfloat16"},
    }
    for name, mark in others.items():
        with pytest.raises(ValueError, match=f"another {name}"):
            cached.check(mark)
    batch = data.batch_of(rows[:2])
    with pytest.raises(ValueError, match="ld_alpha"):
        da.preference_step(model, batch, DPO(), cached, ld_alpha=0.5)
    with pytest.raises(ValueError, match="no score for example rows:9"):
        cached.of(data.batch_of([data.Example("rows:9", rows[0].sequences)]))
    with pytest.raises(ValueError, match=r"ref_logp of example b is \[0.0, nan\]"):
        da.CachedRef(torch.tensor([[0.0, 0.0], [0.0, float("nan")]]), ["a", "b"], {})
    with pytest.raises(ValueError, match=r"must be \(3, "):
        da.CachedRef(torch.zeros(2, 2), ["a", "b", "c"], {})
    with pytest.raises(ValueError, match="ref_logp is missing"):
        da.preference_step(model, batch, DPO())
    with pytest.raises(ValueError, match=r"ref_logp\[1\] is nan"):
        da.preference_step(model, data.batch_of(rows[:1], ref_logp=torch.tensor([0.0, float("nan")])), DPO())


def test_held_out_pairs_have_their_own_reference_scores(tiny_model, tmp_path):
    """The evaluation of a run that has not moved gives ties and ln 2; a policy compared with itself forever would give the same after."""
    rows = [{"prompt": f"Count to {n}:", "chosen": f" {n} it is", "rejected": f" no, {n + 1} rather"} for n in range(3, 9)]
    config = da.Config(batch_size=4, micro_batch_size=2, num_steps=3, lora_rank=4,
                       training=TrainingConfig(learning_rate=1e-2, warmup_steps=0, eval_every=1))  # fmt: skip
    result = da.train(rows[:4], config=config, model=tiny_model, output_dir=tmp_path, eval_source=rows[4:], progress=False)
    assert np.float32(result.history[0]["loss"]) == np.float32(math.log(2))
    last = result.history[-1]
    assert last["eval/rewards/ties"] == 0.0
    assert last["eval/rewards/accuracies"] > 0.5
    assert last["eval/loss"] < math.log(2)


def test_a_short_run_scores_the_reference_on_the_rows_it_sees(tiny_model, tmp_path):
    rows = [{"prompt": f"Count to {n}:", "chosen": f" {n} it is", "rejected": f" no, {n + 1} rather"} for n in range(3, 15)]
    curves = {}
    for reference in ("auto", "cached"):
        config = da.Config(batch_size=2, num_steps=3, lora_rank=4, reference=reference, training=TrainingConfig(learning_rate=1e-2))
        run = da.train(rows, config=config, model=tiny_model, output_dir=tmp_path / reference, progress=False)
        curves[reference] = [(line["loss"], line["rewards/margins"]) for line in run.history]
        assert (tmp_path / reference / "reference.safetensors").exists() == (reference == "cached")
    assert curves["auto"] == curves["cached"]


# ---- counts, micro-batches, metrics


def test_an_empty_prompt_scores_what_has_a_predecessor():
    """The first token of a sequence has no predecessor: counts and averages come from the scored tokens, not from the mask's sum."""
    model, rows = tiny(), examples(4, prompt=0)
    batch = data.batch_of(rows, ref_logp=torch.zeros(4, 2))
    expected = [len(s.ids) - 1 for row in rows for s in row.sequences]
    assert batch.counts.tolist() == expected
    logp = torch.stack([sequence_logp(model, s) for row in rows for s in row.sequences]).view(-1, 2)
    n = torch.tensor(expected, dtype=torch.float64).view(-1, 2)
    for loss, value in ((IPOMean(), lambda x: (x - 5) ** 2), (DPONorm(), lambda x: -torch.nn.functional.logsigmoid(0.1 * x))):
        out = da.preference_step(model, batch, loss)
        torch.testing.assert_close(out.per_pair, value((logp / n)[:, 0] - (logp / n)[:, 1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("loss", [DPO(), IPOMean(), Combine([(DPO(), 0.8), (SFT(), 1.0)])], ids=lambda loss: loss.name)
def test_micro_batches_of_any_size_and_layout_give_the_gradient_of_the_whole(layout, loss):
    """Pair terms divide by the step's pairs, token-averaged ones by its tokens: a mean of micro-batch means would be another loss."""
    reference = torch.zeros(6, 2)

    def gradients(sizes: list[int], layout: str) -> tuple[float, list[torch.Tensor]]:
        model, rows = tiny(), examples()
        step = da.PreferenceStep(loss, None)
        bounds = [0, *itertools.accumulate(sizes)]
        batches = [data.batch_of(rows[a:b], ref_logp=reference[a:b], layout=layout) for a, b in itertools.pairwise(bounds)]
        context = step.prepare(model, [(k, 1.0) for k in range(len(batches))], batches, lambda t: t)
        total = 0.0
        for batch in batches:
            out = step(model, batch, context)
            out.loss.backward()
            total += out.loss.item()
        return total, [p.grad for p in model.parameters()]

    value, whole = gradients([6], "padded")
    parts_value, parts = gradients([1, 3, 2], layout)
    assert parts_value == pytest.approx(value, rel=1e-12)
    # transformers' norms and rotations compute in float32; a shared prompt adds its two gradients in another order
    largest = max(g.abs().max().item() for g in whole)
    tolerance = {"rtol": 1e-3, "atol": 2e-6 * largest} if layout == "shared" else {"rtol": 1e-9, "atol": 1e-12}
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shared_prompt_is_hidden_from_nobody_and_the_chosen_side_from_the_rejected(attention):
    """Eager attention adds its mask: the boolean one of the other implementations would hide nothing."""
    model, rows = tiny(), examples()
    model.set_attn_implementation(attention)
    truth = torch.stack([sequence_logp(model, s) for row in rows for s in row.sequences])
    for layout in data.LAYOUTS:
        for isolate in (False, True):
            scores = da.sequence_scores(model, data.batch_of(rows, layout=layout, isolate=isolate)).logp
            torch.testing.assert_close(scores, truth, rtol=1e-5, atol=1e-5)


def test_ties_count_one_half_and_a_nan_margin_is_wrong():
    values = {"reward_w": [1.0, 0.0, float("nan"), -1.0], "reward_l": [0.0, 0.0, 0.0, 0.0]}
    rest = dict.fromkeys(("per_pair", "lw", "ll", "nw", "nl", "coef", "entropy_w", "entropy_l", "top1_w", "clamped"), [1.0] * 4)
    metrics = da.summarize({k: torch.tensor(v, dtype=torch.float64) for k, v in (values | rest).items()}, DPO())
    assert metrics["rewards/accuracies"] == (1 + 0.5) / 4
    assert metrics["rewards/ties"] == 0.25
    assert metrics["rewards/reference_free"] == 1.0


def test_kto_baseline_is_the_clamped_mean_over_the_whole_step():
    policy, reference = tiny(0), tiny(1)
    rows = [data.Example(e.id, e.sequences[:1], desirable=bool(i % 2)) for i, e in enumerate(examples(5))]
    joined = [data.Tokens(np.concatenate([a.ids[: a.start], b.ids[b.start :]]), a.start)
              for a, b in zip([r.sequences[0] for r in rows], [r.sequences[0] for r in rows[1:] + rows[:1]], strict=True)]  # fmt: skip
    with torch.no_grad():
        ratios = torch.stack([sequence_logp(policy, s) - sequence_logp(reference, s) for s in joined])
    batches = [data.batch_of(rows[:2]), data.batch_of(rows[2:])]
    z0 = da.mismatched_baseline(policy, da.RefModel(reference), batches)
    other_way = da.mismatched_baseline(reference, da.RefModel(policy), batches)
    assert z0.item() == pytest.approx(max(0.0, ratios.mean().item()), rel=1e-6)
    assert other_way.item() == pytest.approx(max(0.0, -ratios.mean().item()), rel=1e-6)
    assert (z0 > 0) != (other_way > 0)
    # two ranks, each with one micro-batch: sums and counts are added first, then clamped
    sums = []
    for k in range(2):
        da.mismatched_baseline(policy, da.RefModel(reference), batches, local=[(k, 1.0)], reduce=lambda t: sums.append(t) or t)
    total = sums[0] + sums[1]
    assert (total[0] / total[1]).clamp(min=0).item() == pytest.approx(z0.item(), rel=1e-6)
    with pytest.raises(ValueError, match="mismatched completions"):
        da.mismatched_baseline(policy, None, batches)


def test_dropout_is_off_so_that_the_first_margins_are_zero(tiny_model, tmp_path):
    from llmcore import load_model

    model = load_model(tiny_model, device="cpu", dtype="float32")
    model.model.config.attention_dropout = 0.5
    for layer in model.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = [{"prompt": "One", "chosen": " two three", "rejected": " four"}] * 2
    config = da.Config(batch_size=2, micro_batch_size=2, num_steps=1, lora_rank=2)
    result = da.train(rows, config=config, model=model, output_dir=tmp_path, progress=False)
    assert result.history[0]["rewards/margins"] == 0.0
    assert np.float32(result.history[0]["loss"]) == np.float32(math.log(2))


def test_every_row_of_an_epoch_is_seen_and_the_stop_string_is_text(smollm2):
    rows = data.read_rows([{"prompt": "Say <|im_end|> twice", "chosen": " <|im_end|><|im_end|>", "rejected": " no"}] * 5)
    tokens = data.tokenize(rows, smollm2.tokenizer, stop_ids=smollm2.stop_ids).examples
    stops = (tokens[0].sequences[0].ids == smollm2.stop_ids[0]).sum()
    assert stops >= 2, "text that contains the stop string is kept, not an assertion"
    batches = data.Batches(tokens, batch_size=2, epochs=1, seed=1)
    assert [len(b.ids) for step in range(len(batches)) for b in batches[step]] == [2, 2, 1]


# ---- what is refused


def test_settings_that_would_change_the_loss_silently_are_refused():
    for given, match in (
        ({"loss": "aot", "micro_batch_size": 2, "batch_size": 8}, "couples the pairs"),
        ({"loss": "aot_unpaired", "wpo": True, "micro_batch_size": 8, "batch_size": 8}, "wpo"),
        ({"loss": "kto", "ld_alpha": 0.5}, "pairs"),
        ({"loss": "kto", "wpo": True}, "pairs"),
        ({"loss": "cpo", "loss_options": {"nll_over": "all"}}, "nll_over"),
        ({"loss": DPO(), "loss_options": {"beta": 0.2}}, "loss_options"),
        ({"loss": "ipo"}, "ipo_sum"),
        ({"loss": "dpo", "loss_options": {"label_smoothing": 0.1}}, "cdpo"),
        ({"ld_alpha": 1.5}, "ld_alpha"),
    ):
        with pytest.raises(ValueError, match=match):
            da.Config(**given)
    assert da.Config(loss="aot", micro_batch_size=8, batch_size=8).make_loss().batch_level


def test_models_whose_loss_would_lose_a_part_are_refused():
    import peft

    model = tiny()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="auxiliary loss"):
        adapters.check_head(model)
    virtual = peft.get_peft_model(tiny(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens"):
        adapters.check_head(virtual)
    on_head = peft.get_peft_model(tiny(tie_word_embeddings=False), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output head"):
        adapters.check_head(on_head)


def test_pairs_out_of_range_and_rows_without_a_pair():
    sequences = [s for e in examples(2) for s in e.sequences]
    with pytest.raises(ValueError, match=r"pair_index must lie in \[0, 4\)"):
        data.collate(sequences, pair_index=[(0, 4)])
    with pytest.warns(UserWarning, match="2 of 4 sequences are in no pair"):
        data.collate(sequences, pair_index=[(0, 1)])
    model, batch = tiny(), data.collate(sequences[:2], pair_index=[(0, 1)])
    with pytest.raises(ValueError, match="works on unpaired examples"):
        da.preference_step(model, batch, KTO(), da.RefModel(tiny(1)))
    with pytest.raises(ValueError, match=r"desirable \(S,\) is missing"):
        da.preference_step(model, data.collate(sequences[:2]), KTO(), da.RefModel(tiny(1)))


def test_an_empty_completion_has_a_finite_average_and_no_gradient():
    model, rows = tiny(), examples(2)
    empty = data.Tokens(rows[0].sequences[0].ids[:3], 3)
    batch = data.batch_of([data.Example("a", (rows[0].sequences[0], empty)), rows[1]], ref_logp=torch.zeros(2, 2))
    for loss in (IPOMean(), DPONorm()):
        model.zero_grad()
        out = da.preference_step(model, batch, loss)
        out.loss.backward()
        assert bool(out.per_pair.isfinite().all())
        assert out.logp[1] == 0
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# ---- KL


def moved(seed: int = 7) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(policy, reference): the same model, the policy's weights shifted."""
    policy, reference = tiny(0), tiny(0)
    with torch.no_grad():
        for p, noise in zip(policy.parameters(), tiny(seed).parameters(), strict=True):
            p.add_(0.3 * noise)
    return policy, reference


def token_terms(p: torch.Tensor, q: torch.Tensor, token: int) -> dict[str, float]:
    """Every estimator's term of one token, from the two log-distributions at its position."""
    delta = float(p[token] - q[token])
    return {"k1": delta, "k2": delta * delta / 2, "k3": math.exp(-delta) - 1 + delta, "rb": float((p.exp() * (p - q)).sum())}


@torch.no_grad()
def enumerated(policy: torch.nn.Module, reference: torch.nn.Module, prompt: list[int], limit: int) -> dict[str, tuple[float, float]]:
    """Mean and variance of each estimator over every continuation that the sampler can produce."""
    moments = {name: [0.0, 0.0] for name in ("k1", "k2", "k3", "rb")}
    todo: list[tuple[list[int], float, dict[str, float]]] = [([], 1.0, dict.fromkeys(moments, 0.0))]
    while todo:
        done, probability, sums = todo.pop()
        ids = torch.tensor([[*prompt, *done]])
        p, q = (m(input_ids=ids).logits[0, -1].log_softmax(-1) for m in (policy, reference))
        for token in range(V):
            terms = token_terms(p, q, token)
            total = {name: sums[name] + terms[name] for name in moments}
            reach = probability * math.exp(float(p[token]))
            if token == 0 or len(done) + 1 == limit:
                for name, value in total.items():
                    moments[name][0] += reach * value
                    moments[name][1] += reach * value * value
            else:
                todo.append(([*done, token], reach, total))
    return {name: (first, second - first * first) for name, (first, second) in moments.items()}


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "rb"])
def test_kl_of_the_drawn_samples_is_the_brute_force_sum(estimator):
    policy, reference = moved()
    prompts = [[3, 5, 2], [7, 1]]
    found = da.kl_to_reference(policy, da.RefModel(reference), prompts, estimator=estimator, n_samples=2, max_new_tokens=5, seed=4,
                               stop_ids=(0,))  # fmt: skip
    drawn = da.sample(policy, [p for p in prompts for _ in range(2)], stop_ids=(0,), max_new_tokens=5, seed=4)
    sums: dict[str, list[float]] = {name: [] for name in ("k1", "k2", "k3", "rb")}
    with torch.no_grad():
        for s in drawn:
            p, q = (m(input_ids=torch.from_numpy(s.ids)[None]).logits[0].log_softmax(-1) for m in (policy, reference))
            terms = [token_terms(p[t - 1], q[t - 1], int(s.ids[t])) for t in range(s.start, len(s.ids))]
            for name, values in sums.items():
                values.append(sum(term[name] for term in terms))
    expected = sums[estimator]
    assert found.kl == pytest.approx(np.mean(expected), rel=1e-6)
    assert found.k1 == pytest.approx(np.mean(sums["k1"]), rel=1e-6)
    assert found.per_prompt == pytest.approx([np.mean(expected[:2]), np.mean(expected[2:])], rel=1e-6)
    assert found.truncated == sum(s.ids[-1] != 0 for s in drawn)
    assert found.distance == math.sqrt(max(0.0, found.kl))
    assert json.dumps(found.to_json())


def test_kl_estimates_agree_with_enumeration_of_all_continuations():
    policy, reference = moved()
    prompt, samples = [3, 5, 2], 400
    truth = enumerated(policy, reference, prompt, 3)
    assert truth["k1"][0] == pytest.approx(truth["k3"][0], rel=1e-6)
    assert truth["k1"][0] == pytest.approx(truth["rb"][0], rel=1e-6), "three unbiased estimators, one divergence"
    assert truth["rb"][1] < truth["k1"][1], "the full distribution has the smallest variance"
    for estimator in ("k1", "rb"):
        found = da.kl_to_reference(policy, da.RefModel(reference), [prompt], estimator=estimator, n_samples=samples, max_new_tokens=3,
                                   stop_ids=(0,), batch_size=samples)  # fmt: skip
        mean, variance = truth[estimator]
        assert abs(found.kl - mean) < 4 * math.sqrt(variance / samples)
