"""Decoding against the model's own forward, sampling against enumeration, and independence of everything but the seed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from llmcore.decoding import Batch, Counters, Decoder, Row, decoder_for, stop_ids
from llmcore.decoding.attention import attend, merge
from llmcore.generation import Sampling, complete, kept_distribution, sample_from_embeddings, stream
from llmcore.phrases import PhraseMatcher, PhraseRule, TextRule, phrase_rule, token_bytes
from llmcore.sampling import draw, kept_candidates, philox4x32, uniforms

CHAT = Sampling(temperature=0.6, top_k=50, top_p=0.9, max_new_tokens=8, seed=3)
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}


def _chat(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def _tiny(family: str, **extra):
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**TINY, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim > 1 else 1.0)
    return model


# ---- random numbers and the kept distribution


def test_philox_known_answers():
    """Vectors of the Random123 distribution (kat_vectors, philox4x32-10)."""
    assert [int(x) for x in philox4x32((0, 0, 0, 0), 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert [int(x) for x in philox4x32((ones,) * 4, (ones << 32) | ones)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    words = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert [int(x) for x in philox4x32(words, 0x299F31D0A4093822)] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_uniforms_follow_the_counter():
    u = uniforms(13, 7, np.array([0, 2]), np.array([1, 5]), 4)
    for value, row, sample in zip(u, (0, 2), (1, 5), strict=True):
        x = [int(w) for w in philox4x32((4, row * 2**16 + sample, 7, 0x47435331), 13)]
        assert value == ((x[0] * 2**20 + (x[1] >> 12)) + 0.5) / 2**52
    many = uniforms(1, 0, 0, np.arange(20000), 0)
    assert many.min() > 0
    assert many.max() < 1
    assert abs(many.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20000)


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(50, 0.9, 0.6), (5, 1.0, 1.0), (0, 0.9, 1.0), (0, 0.5, 2.0), (1, 0.9, 1.0), (0, 1.0, 0.7), (200, 0.3, 1.5)],
)
def test_kept_distribution_is_what_transformers_warpers_keep(top_k, top_p, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 1009, generator=torch.Generator().manual_seed(top_k)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = expected.double().softmax(-1)
    for row, truth in zip(logits, expected, strict=True):
        ids, probs = kept_distribution(row, temperature, top_k, top_p)
        assert ids.tolist() == truth.nonzero()[:, 0].tolist()
        torch.testing.assert_close(probs, truth[ids], rtol=1e-6, atol=0)
    ids, probs = kept_distribution(logits, temperature, top_k, top_p)
    dense = torch.zeros_like(expected).scatter(-1, ids, probs)
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=0)


def test_kept_distribution_ties_and_edges():
    ids, probs = kept_distribution(torch.tensor([1.0, 3.0, 1.0, 1.0, 0.0]), 1.0, 2, 1.0)
    assert ids.tolist() == [0, 1, 2, 3]  # three values tie with the second largest: all are kept
    assert kept_distribution(torch.zeros(10), 1.0, 0, 0.9)[0].numel() == 9  # the first tenth's mass equals 1 − p exactly: dropped
    assert kept_distribution(torch.zeros(10), 1.0, 0, 0.7)[0].numel() == 7
    assert kept_distribution(torch.tensor([0.0, 9.0]), 1.0, 0, 1e-9)[0].tolist() == [1]  # the last always stays
    ids, probs = kept_distribution(torch.tensor([1e4, -1e4, float("-inf")]), 1.0, 0, 1.0)
    assert probs[0] == 1
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kept_distribution(torch.zeros(3), **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **bad})
    with pytest.raises(ValueError, match="NaN"):
        kept_distribution(torch.tensor([0.0, float("nan")]), 1.0, 0, 1.0)


def test_draw_is_inverse_cdf_in_ascending_id():
    ids, probs = torch.tensor([[2, 5, 7, 9]]), torch.tensor([[0.25, 0.0, 0.5, 0.25]], dtype=torch.float64)
    u = np.array([1e-17, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53])
    assert draw(ids, probs, np.zeros(6, dtype=int), u).tolist() == [2, 2, 7, 7, 9, 9]


# ---- attention and decoding


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_partial_softmaxes_merge_to_one(softcap):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 6, 3, 8, generator=g), torch.randn(2, 2, 11, 8, generator=g), torch.randn(2, 2, 11, 8, generator=g)
    mask = torch.rand(2, 1, 3, 11, generator=g) < 0.6
    mask[..., 0] = True
    mask[0, :, 0, 4:] = False  # one query sees nothing of the second part
    scores = (q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2)) * 0.3
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    truth = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.double().repeat_interleave(3, 1)
    for device_path in (None, 1e9):  # 1e9: a soft cap that does nothing sends the same numbers through the path without the CPU operator
        cap = softcap or device_path
        parts = [attend(q, k[:, :, part], v[:, :, part], 0.3, mask=mask[..., part], softcap=cap) for part in (slice(0, 4), slice(4, 11))]
        torch.testing.assert_close(merge(parts).double(), truth, rtol=1e-5, atol=1e-6)


def test_greedy_completions_equal_generate(smollm2):
    prompts = _chat("Say hi.", "What is the capital of France?", "Tell me about a dog that went to sea and found a small boat there.")
    decoder_for(smollm2).clear()  # the count below is that of a prefix seen for the first time
    ours = complete(smollm2, prompts, Sampling(temperature=0, max_new_tokens=12))
    assert ours.path == "shared"
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([smollm2.chat_ids(prompt)])
        theirs = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=2)[
            0, ids.shape[1] :
        ].tolist()
        assert completion.token_ids == [i for i in theirs if i not in stop_ids(smollm2.model)]
    assert ours.counters.prefilled_tokens == 24 + sum(len(smollm2.chat_ids(p)) - 24 for p in prompts)


@pytest.mark.parametrize(
    ("family", "extra", "path"),
    [
        ("Llama", {}, "shared"),
        ("Mistral", {"sliding_window": 9}, "shared"),
        ("Qwen2", {}, "shared"),
        ("Qwen3", {}, "shared"),
        ("Gemma2", {"sliding_window": 9, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}, "shared"),
        ("GPTNeoX", {}, "shared"),
        ("Mamba", {}, "recompute"),
    ],
)
def test_families_agree_with_their_own_forward(family, extra, path):
    """Sampled continuations of one row, checked step by step: each token must be what the model's own logits and the uniforms give."""
    model = _tiny(family, **extra)
    decoder = Decoder(model)
    assert decoder.path == path, decoder.why
    how = Sampling(temperature=1.0, top_k=20, top_p=0.95, max_new_tokens=8, seed=5, ignore_eos=True)
    g = torch.Generator().manual_seed(1)
    opening = torch.randint(3, 97, (5,), generator=g).tolist()
    prompts = [torch.randint(3, 97, (n,), generator=g).tolist() for n in (7, 1, 6)]
    sets = sample_from_embeddings(model, prompts, 4, sampling=how, opening=opening, max_rows=2)
    other = _replay(model, [opening + p for p in prompts], sets, how)
    for where, (samples, expected) in enumerate(zip(sets, other, strict=True)):
        assert samples.token_ids == expected, f"row {where}"
    assert model.config._attn_implementation != "llmcore_shared"


def _replay(model, prompts, sets, how):
    """Every sample's next token from a plain forward over its whole prefix."""
    result = []
    for query, (prompt, samples) in enumerate(zip(prompts, sets, strict=True)):
        rows = []
        for s, tokens in enumerate(samples.token_ids):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            ids, probs = kept_candidates(logits, how.temperature, how.top_k, how.top_p)
            rows.append(draw(ids, probs, np.arange(len(tokens)), uniforms(how.seed, query, 0, s, np.arange(len(tokens)))).tolist())
        result.append(rows)
    return result


def test_recompute_path_equals_shared_path():
    model = _tiny("Llama")
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    for share in (True, False):
        runs = [
            sample_from_embeddings(Decoder(model, path=path), prompts, 3, sampling=CHAT, share_samples=share, opening=[3, 4])
            for path in ("auto", "recompute")
        ]
        assert [r.token_ids for r in runs[0]] == [r.token_ids for r in runs[1]]


def test_samples_do_not_depend_on_company_chunks_order_or_sharing(smollm2):
    texts = ["can you book a flight", "Say hi.", "Write one line about winter, rain, and the old harbour.", "open the door"]
    prompts = [smollm2.chat_ids(t) for t in texts]
    base = sample_from_embeddings(smollm2, prompts, 5, sampling=CHAT)
    alone = [sample_from_embeddings(smollm2, [p], 5, sampling=CHAT, ids=[i])[0] for i, p in enumerate(prompts)]
    assert [s.token_ids for s in alone] == [s.token_ids for s in base]
    order = [2, 0, 3, 1]
    mixed = sample_from_embeddings(
        smollm2, [prompts[i] for i in order], 5, sampling=CHAT, ids=order, max_rows=2, share_samples=False, opening=[], memory_budget=1
    )
    assert [s.token_ids for s in mixed] == [base[i].token_ids for i in order]
    embedded = sample_from_embeddings(smollm2, [decoder_for(smollm2).embed(prompts[0])], 5, sampling=CHAT)
    assert embedded[0].token_ids == base[0].token_ids
    assert sum(s.counters.decode_rows for s in base) < sum(s.counters.decode_rows for s in mixed)
    for text, run in zip(("first", "shared"), (base, mixed), strict=True):
        assert sum(s.counters.prefilled_tokens for s in run) == sum(map(len, prompts)), text
        assert sum(s.counters.reused_tokens for s in run) == 4 * sum(map(len, prompts)), text


def test_growing_tail_restart_and_release(smollm2):
    decoder = decoder_for(smollm2)
    ids = smollm2.chat_ids("Count from one to twenty.")
    rows = [
        Row(decoder.embed(ids), len(ids), sampling=Sampling(temperature=0, max_new_tokens=n), num_samples=1, stream=(0, i), keep=i == 0)
        for i, n in enumerate((2, 3, 20))
    ]
    batch = Batch(decoder)
    batch.admit(rows)
    while batch.active:
        batch.step()
    rows[0].pool.reserve(rows[0].pool.prompt)
    batch.restart(rows[0], Sampling(temperature=0, max_new_tokens=20))
    while batch.active:
        batch.step()
    assert rows[0].tokens == rows[2].tokens
    batch.release(rows[0])
    assert batch.kv_bytes() == 0 or all(row.pool is None for row in batch.rows)


def test_first_tokens_have_the_models_distribution(smollm2):
    """Chi-square of the first token over 3000 samples against the kept distribution."""
    ids = smollm2.chat_ids("Say hi.")
    with torch.no_grad():
        logits = smollm2.model(input_ids=torch.tensor([ids])).logits[0, -1]
    keep, p = kept_distribution(logits, 0.6, 50, 0.9)
    samples = sample_from_embeddings(smollm2, [ids], 3000, sampling=Sampling(temperature=0.6, top_k=50, top_p=0.9, max_new_tokens=1))[0]
    seen = np.array([sum(t == [i] for t in samples.token_ids) for i in keep.tolist()])
    ended = 3000 - seen.sum()
    assert ended == 0 or any(i in stop_ids(smollm2.model) for i in keep.tolist())
    expected = p.numpy() * 3000
    assert (((seen - expected) ** 2 / expected).sum() - len(keep)) < 4 * math.sqrt(2 * len(keep)) + 4


def test_stop_strings_streaming_and_context(smollm2):
    prompt = _chat("What is the capital of France?")[0]
    greedy = Sampling(temperature=0, max_new_tokens=20)
    whole = complete(smollm2, [prompt], greedy)[0]
    assert "".join(stream(smollm2, prompt, greedy)) == whole.text
    word = whole.text.split()[2]
    stopped = Sampling(temperature=0, max_new_tokens=20, stop=(word,))
    assert complete(smollm2, [prompt], stopped)[0].text == whole.text[: whole.text.index(word)]
    assert complete(smollm2, [prompt], stopped)[0].finish_reason == "stop"
    assert "".join(stream(smollm2, prompt, stopped)) == whole.text[: whole.text.index(word)]
    with pytest.raises(ValueError, match=r"context.*9000"):
        complete(smollm2, [prompt], Sampling(max_new_tokens=9000 - len(smollm2.chat_ids(prompt))))
    with pytest.raises(TypeError, match="prompts"):
        complete(smollm2, "text")
    with pytest.raises(ValueError, match="prompts"):
        complete(smollm2, [[]])


def test_nan_logits_name_the_row():
    model = _tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(RuntimeError, match="query 4, row 0"):
        sample_from_embeddings(model, [[5, 6]], 2, sampling=CHAT, ids=[4])


def test_models_without_embeddings_are_refused():
    class Ids(torch.nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(TypeError, match="inputs_embeds"):
        Decoder(Ids())


def test_models_that_scale_embeddings_inside_are_refused():
    model = _tiny("GPTNeoX")
    plain = model.gpt_neox.forward

    def scaled(input_ids=None, inputs_embeds=None, **kwargs):
        return plain(inputs_embeds=inputs_embeds * 3 if inputs_embeds is not None else model.get_input_embeddings()(input_ids), **kwargs)

    model.gpt_neox.forward = scaled
    with pytest.raises(ValueError, match="same logits"):
        Decoder(model)


# ---- phrases over tokens


PHRASES = ("I'm sorry", "Förlåt", "对不起", "cannot", "no")
TEXTS = (
    "I'm sorry, no",
    "Well, Förlåt mig",
    "我说对不起了",
    "I can not",
    "i'M SORRY",
    "I’m sorry",
    "Fo\u0308rla\u030at",
    "cann",
    "canno",
    "对不",
    "",
    "é 🙂 nothing",
)


@pytest.mark.parametrize("backend", ["native", "python"])
@pytest.mark.parametrize("options", [{}, {"position": "start"}, {"ignore_case": True, "normalise_quotes": True, "normalise_unicode": True}])
def test_automaton_equals_text_search(smollm2, backend, options):
    from llmcore.kernels import backends

    if backend == "native" and backends.native_error():
        pytest.skip(backends.native_error())
    matcher = PhraseMatcher(PHRASES, **options)
    rule = PhraseRule(matcher, token_bytes(smollm2.tokenizer), backend=backend)
    text_rule = TextRule(matcher.matches, smollm2.tokenizer)
    rng = np.random.default_rng(0)
    cases = [smollm2.tokenizer.encode(t, add_special_tokens=False) for t in TEXTS]
    cases += [[*a, 2, *b] for a, b in itertools.pairwise(cases)]  # a special token in between leaves no trace
    cases += [rng.integers(0, 49152, 12).tolist() for _ in range(30)]
    cases += [[*smollm2.tokenizer.encode("对不起")[:k], *rng.integers(0, 300, 4).tolist()] for k in range(1, 6)]
    hits = 0
    for ids in cases:
        outcome = []
        for candidate in (rule, text_rule):
            state, reason, at = candidate.begin(), None, None
            for at, token in enumerate(ids):  # noqa: B007
                state, reason = candidate.advance(state, token)
                if reason:
                    break
            outcome.append((reason or candidate.end(state), at if reason else None))
        assert outcome[0] == outcome[1], smollm2.tokenizer.decode(ids)
        assert outcome[0][0] == ("match" if matcher.matches(smollm2.tokenizer.decode(ids, skip_special_tokens=True)) else None)
        hits += outcome[0][0] == "match"
    assert 3 <= hits < len(cases)


def test_byte_fallback_tokens_are_decoded_in_runs():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "▁no", "t", "▁对", "sorry"] + [f"<0x{b:02X}>" for b in range(256)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    import llmcore.phrases as phrases

    table = phrases.TokenBytes(
        [b"", *(w.replace("▁", " ").encode() for w in words[1:5]), *(bytes([b]) for b in range(256))], frozenset(range(5, 261))
    )
    matcher = PhraseMatcher(["对不", "sorry"])
    rule = PhraseRule(matcher, table)
    raw = [5 + b for b in "不".encode()]
    for ids in (
        [3, *raw],
        [3, *raw, 2],
        [3, *raw[:2], 2],
        [3, *raw, 5 + 0xFF],
        [3, 5 + 0xFF, *raw],
        [3, 4],
        [5 + ord("s"), 4],
        [3, *raw[:1], 0, *raw[1:], 1],
    ):
        state, reason = rule.begin(), None
        for token in ids:
            state, reason = rule.advance(state, token)
            if reason:
                break
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ((reason or rule.end(state)) == "match") == matcher.matches(text), text


def test_a_judge_is_asked_once_at_the_end(smollm2):
    asked = []
    rule = phrase_rule(lambda text: bool(asked.append(text)) or "hi" in text, smollm2.tokenizer)
    sample_from_embeddings(smollm2, [smollm2.chat_ids("Say hi.")], 2, sampling=CHAT, stop_when=rule, share_samples=False)
    assert len(asked) == 2


def test_counters_add():
    total = Counters(1, 2, 3, 4, 5)
    total.add(Counters(1, 1, 1, 1, 1))
    assert total == Counters(2, 3, 4, 5, 6)
