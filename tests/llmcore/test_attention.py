"""FlowRecorder: eight families against eager attention with retained gradients, the real model against float64, and the model left as
found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers

from llmcore.attention import FlowRecorder, estimate_memory, prefix_cache, token_segments

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {
        "head_dim": 8,
        "sliding_window": 6,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 11,
    },
    "Gemma3Text": {"head_dim": 8, "sliding_window": 6},
    "GPT2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "GPTNeoX": {},
    "GptOss": {"head_dim": 8, "sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
}
DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _model(family, seed=0, **more):
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family], **(DROPOUT if family == "GPT2" else {}), **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)  # sharper attention than at initialisation
    return model


def _batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 20), generator=generator)
    segments = torch.randint(-1, 3, (2, 20), generator=generator)
    segments[:, :3] = torch.tensor([0, 1, 2])
    return ids, segments, torch.tensor([19, 16]), torch.tensor([3, 5])


def _eager(model, ids, segments, positions, targets, mask=None):
    """The usual way: every attention matrix and its gradient in memory."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False)
    for attention in out.attentions:
        attention.retain_grad()
    loss = torch.nn.functional.cross_entropy(out.logits[torch.arange(len(ids)), positions].float(), targets, reduction="sum")
    loss.backward()
    onehot = torch.nn.functional.one_hot(segments + 1, 4)[..., 1:].float()
    bins = torch.stack([onehot.transpose(1, 2)[:, None] @ (a * a.grad).abs() @ onehot[:, None] for a in out.attentions], 1)
    model.zero_grad()
    model.set_attn_implementation(before)
    return bins, loss.item()


def _state(model):
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return (
        model.config._attn_implementation,
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        [m.training for m in model.modules()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [dict(layer.__dict__).get("gradient_checkpointing") for layer in layers],
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_eager_attention(family, padded):
    model = _model(family)
    ids, segments, positions, targets = _batch()
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :6] = 0
    truth, loss = _eager(model, ids, segments, positions, targets, mask)
    before = _state(model)
    with FlowRecorder(model, segments) as rec:
        rec.run(ids, mask, positions, targets)
    assert _state(model) == before
    assert (rec.sums - truth).abs().max() <= 3e-6 * truth.abs().max()
    assert rec.loss.sum().item() == pytest.approx(loss, rel=1e-5)


def _float64_llama(model, ids, position, target):
    """SmolLM2 in float64 from its weights alone; returns (A, dL/dA) of every layer for the cross-entropy of `target` at `position`, and
    the margin's."""
    weights = {name: t.double() for name, t in model.state_dict().items()}
    config = model.config
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    n = ids.shape[1]
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(n, dtype=torch.float64)[:, None] * frequencies
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def rotate(x):
        half = size // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def norm(x, name):
        return weights[name] * x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()

    hidden = weights["model.embed_tokens.weight"][ids[0]].requires_grad_()
    causal = torch.ones(n, n).triu(1).bool()
    attentions = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        x = norm(hidden, name + "input_layernorm.weight")
        q, k, v = ((x @ weights[f"{name}self_attn.{part}_proj.weight"].T).view(n, -1, size).transpose(0, 1) for part in "qkv")
        q, k, v = rotate(q), rotate(k).repeat_interleave(heads // kv, 0), v.repeat_interleave(heads // kv, 0)
        a = (q @ k.transpose(1, 2) * size**-0.5).masked_fill(causal, -torch.inf).softmax(-1)
        a.retain_grad()
        attentions.append(a)
        hidden = hidden + (a @ v).transpose(0, 1).reshape(n, -1) @ weights[name + "self_attn.o_proj.weight"].T
        x = norm(hidden, name + "post_attention_layernorm.weight")
        gate, up = x @ weights[name + "mlp.gate_proj.weight"].T, x @ weights[name + "mlp.up_proj.weight"].T
        hidden = hidden + (torch.nn.functional.silu(gate) * up) @ weights[name + "mlp.down_proj.weight"].T
    logits = norm(hidden[position], "model.norm.weight") @ weights["model.embed_tokens.weight"].T
    results = []
    for scalar in (-logits.log_softmax(-1)[target], logits[target]):
        for a in attentions:
            a.grad = None
        scalar.backward(retain_graph=True)
        results.append(torch.stack([(a * a.grad).abs().detach() for a in attentions]))
    return results


def test_smollm2_agrees_with_float64(smollm2):
    text = (
        "Question: A farmer has 12 cows and buys 7 more, then sells 4 of them. How many cows are left? Let's think step by step. "
        "He has 12 + 7 - 4 ="
    )
    ids = torch.tensor([smollm2.tokenizer(text)["input_ids"]])
    n = ids.shape[1]
    segments = {"question": (2, n // 2), "prompt": (n // 2 + 1, n // 2 + 8), "rationale": (n // 2 + 8, n)}
    labels = torch.full((n,), -1)
    for index, (start, end) in enumerate(segments.values()):
        labels[start:end] = index
    onehot = torch.nn.functional.one_hot(labels + 1, 4)[:, 1:].double()
    target = smollm2.tokenizer(" 15")["input_ids"][0]
    before = _state(smollm2.model)
    truths = _float64_llama(smollm2.model, ids, n - 1, target)
    rec = FlowRecorder(smollm2, segments)
    for loss, truth in zip(("ce", "logit"), truths, strict=True):
        bins = onehot.T @ truth @ onehot
        error = (rec.run(ids, target_positions=n - 1, target_ids=target, loss=loss).sums[0].double() - bins).abs()
        there = bins > 1e-3 * bins.max()
        assert error.max() <= (2e-5 if loss == "ce" else 5e-6) * bins.max()
        assert (error[there] / bins[there]).max() <= 7e-5
    assert _state(smollm2.model) == before


def test_suffix_behind_a_cached_prefix_is_exact():
    model = _model("Llama")
    ids, _, _, _ = _batch()
    segments = {"question": (0, 8), "prompt": (9, 13), "rationale": (13, 19)}
    same = ids[:1].expand(2, -1).clone()
    same[1, 8:] = ids[1, 8:]  # two continuations of one prefix
    full = FlowRecorder(model, segments).run(same, target_positions=18, target_ids=4)
    cache = prefix_cache(model, same[:1, :8])
    rec = FlowRecorder(model, segments, prefix_cache=cache).run(same[:, 8:], target_positions=18, target_ids=4)
    for source, destination in (("question", "prompt"), ("question", "rationale"), ("prompt", "rationale")):
        torch.testing.assert_close(rec.flow(source, destination), full.flow(source, destination), rtol=2e-5, atol=1e-9)
    assert torch.equal(rec.counts, full.counts)
    assert cache.get_seq_length() == 8, "the given cache must not grow"
    with pytest.raises(ValueError, match="cached prefix"):
        rec.flow("question", "question")


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_padded_and_packed_batches_equal_singles(family):
    model = _model(family)
    ids, segments, _, _ = _batch()
    single = [
        FlowRecorder(model, segments[:1, :12]).run(ids[:1, :12], target_positions=11, target_ids=7).sums[0],
        FlowRecorder(model, segments[1:, :20]).run(ids[1:], target_positions=19, target_ids=7).sums[0],
    ]
    for left in (True, False):
        padded, labels, mask = torch.zeros_like(ids), torch.full_like(ids, -1), torch.zeros_like(ids)
        where = slice(8, 20) if left else slice(0, 12)
        padded[0, where], labels[0, where], mask[0, where] = ids[0, :12], segments[0, :12], 1
        padded[1], labels[1], mask[1] = ids[1], segments[1], 1
        rec = FlowRecorder(model, labels).run(padded, mask, torch.tensor([where.stop - 1, 19]), torch.tensor([7, 7]))
        for b in range(2):
            torch.testing.assert_close(rec.sums[b], single[b], rtol=5e-5, atol=1e-9)
    packed = torch.cat([ids[:1, :12], ids[1:]], 1)
    with pytest.raises(ValueError, match="several documents"):
        FlowRecorder(model, torch.cat([segments[:1, :12], segments[1:]], 1)).run(
            packed, None, 31, 7, position_ids=torch.cat([torch.arange(12), torch.arange(20)])[None]
        )
    positions = torch.cat([torch.arange(12), torch.arange(20)])[None]
    labels = torch.cat([segments[:1, :12], torch.where(segments[1:] >= 0, segments[1:] + 3, -1)], 1)  # own ids a document
    rec = FlowRecorder(model, labels).run(
        packed, None, torch.tensor([[11, 31]]), torch.tensor([[7, 7]]), loss="margin", position_ids=positions
    )
    alone = [
        FlowRecorder(model, s).run(i, target_positions=i.shape[1] - 1, target_ids=7, loss="margin").sums[0]
        for i, s in ((ids[:1, :12], segments[:1, :12]), (ids[1:], segments[1:]))
    ]
    torch.testing.assert_close(rec.sums[0, ..., :3, :3], alone[0], rtol=5e-5, atol=1e-8)
    torch.testing.assert_close(rec.sums[0, ..., 3:, 3:], alone[1], rtol=5e-5, atol=1e-8)
    assert not rec.sums[0, ..., 3:, :3].any()


def test_packing_padding_and_per_token_outputs_agree():
    """Unequal lengths run end to end; outputs with an entry a token keep the padded layout. Segments are interleaved, one is empty."""
    model = _model("Gemma2")
    ids, segments, _, targets = _batch()
    segments = torch.arange(20).remainder(3).expand(2, -1).clone()
    segments[1] = segments[1].clamp(max=1)  # segment 2 is empty in the second sequence
    positions = torch.tensor([9, 17])
    packed = FlowRecorder(model, segments).run(ids, None, positions, targets)
    padded = FlowRecorder(model, segments, outputs=("abs", "row_by_seg")).run(ids, None, positions, targets)
    assert packed.packing is not None
    assert padded.packing is None
    torch.testing.assert_close(packed.sums, padded.sums, rtol=5e-5, atol=1e-9)
    torch.testing.assert_close(padded.bins("row_by_seg").sum(-2).sum(-1), padded.sums.sum((-1, -2)), rtol=1e-4, atol=1e-9)
    assert torch.equal(packed.counts, padded.counts)
    assert not packed.sums[1, ..., 2].any()
    assert packed.flow("2", "0")[1].isnan().all()
    assert packed.flow("2", "0", empty="zero")[1].eq(0).all()
    with pytest.raises(ValueError, match="empty='raise'"):
        packed.flow("2", "0", empty="raise")
    both = torch.tensor([[5, 9], [17, 3]])  # signed bins are linear in the loss, so those of two targets add up
    together = FlowRecorder(model, segments, outputs=("signed",)).run(ids, None, both, targets[:, None], loss="logit")
    singles = [FlowRecorder(model, segments, outputs=("signed",)).run(ids, None, at, targets, loss="logit") for at in both.T]
    torch.testing.assert_close(together.bins("signed"), sum(one.bins("signed") for one in singles), rtol=1e-3, atol=1e-6)
    assert together.one_minus_p.shape == (2, 2)


def test_a_suffix_batch_of_unequal_lengths_equals_full_passes():
    for family in ("Qwen3", "Mistral", "GPT2"):
        model = _model(family)
        ids, _, _, _ = _batch()
        ids[1, :9] = ids[0, :9]
        segments = [{"question": (1, 8), "prompt": (9, 12), "rationale": (12, end)} for end in (20, 15)]
        cache = prefix_cache(model, ids[:1, :9])
        rec = FlowRecorder(model, segments, prefix_cache=cache).run(ids[:, 9:], None, torch.tensor([19, 14]), torch.tensor([4, 5]))
        assert rec.packing is not None
        for b, end in enumerate((20, 15)):
            full = FlowRecorder(model, segments[b]).run(ids[b : b + 1, :end], target_ids=4 + b)
            for source, destination in (("question", "prompt"), ("question", "rationale"), ("prompt", "rationale")):
                torch.testing.assert_close(rec.flow(source, destination)[b], full.flow(source, destination)[0], rtol=5e-5, atol=1e-9)
            assert torch.equal(rec.counts[b], full.counts[0])


def test_counts_know_the_window_of_tokens_behind_the_target():
    model = _model("Mistral", sliding_window=9)
    ids, segments, _, _ = _batch()
    rec = FlowRecorder(model, segments[:1]).run(ids[:1], target_positions=7, target_ids=3)  # 8 tokens run: the window hides none of them
    distance = torch.arange(20)[:, None] - torch.arange(20)
    onehot = torch.nn.functional.one_hot(segments[0] + 1, 4)[:, 1:]
    assert torch.equal(rec.counts[0, 0], onehot.T @ ((distance >= 0) & (distance < 9)).long() @ onehot)


def test_restricted_cross_entropy_slices_the_logits_first():
    """Trap T3: the label-words loss is cross-entropy over the candidates only."""
    model = _model("Llama")
    ids, segments, positions, targets = _batch()
    candidates = torch.tensor([9, 3, 5, 60])
    ours = FlowRecorder(model, segments).run(ids, None, positions, targets, loss="ce_restricted", candidates=candidates)
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, output_attentions=True, use_cache=False)
    for a in out.attentions:
        a.retain_grad()
    logits = out.logits[torch.arange(2), positions][:, candidates]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2]), reduction="none")
    loss.sum().backward()
    onehot = torch.nn.functional.one_hot(segments + 1, 4)[..., 1:].float()
    truth = torch.stack([onehot.transpose(1, 2)[:, None] @ (a * a.grad).abs() @ onehot[:, None] for a in out.attentions], 1)
    assert (ours.sums - truth).abs().max() <= 3e-6 * truth.abs().max()
    torch.testing.assert_close(ours.loss, loss.detach(), rtol=1e-5, atol=1e-6)


def test_peak_memory_stays_within_15_percent_of_flash_attention():
    """n = 2048, 2 layers of 8 heads: the matrices alone would be 268 MB."""
    code = (
        "import gc, torch, transformers\n"
        "from pathlib import Path\n"
        "from llmcore.attention import FlowRecorder\n"
        "torch.set_num_threads(1)\n"
        "config = transformers.LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=2,\n"
        "    num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048)\n"
        "model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)\n"
        "def flash(n):\n"
        "    ids = torch.arange(n)[None] % 64\n"
        "    h = model.get_input_embeddings()(ids).requires_grad_()\n"
        "    model(inputs_embeds=h, use_cache=False, logits_to_keep=1).logits.sum().backward()\n"
        "def ours(n):\n"
        "    FlowRecorder(model, {'a': (0, n // 2), 'b': (n // 2, n)}).run(torch.arange(n)[None] % 64, target_ids=3)\n"
        "def status(name):\n"
        "    return int(next(l for l in open('/proc/self/status') if l.startswith(name)).split()[1])\n"
        "for step in (flash, ours):\n"
        "    step(64), gc.collect()\n"
        "    Path('/proc/self/clear_refs').write_text('5')\n"
        "    before = status('VmRSS')\n"
        "    step(2048)\n"
        "    print(status('VmHWM') - before)"
    )
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **settings})
    assert run.returncode == 0, run.stderr
    flash, ours = map(int, run.stdout.split())
    assert ours <= 1.15 * flash + 2048, (flash, ours)  # kilobytes


def test_losses_are_related_exactly():
    model = _model("Qwen2")
    ids, segments, positions, targets = _batch()
    rec = FlowRecorder(model, segments, outputs=("abs", "signed"))
    ce = rec.run(ids, None, positions, targets).sums.clone()
    from_ce = rec.bins("abs", loss="margin").clone()
    signed = rec.bins("signed").clone()
    margin = rec.run(ids, None, positions, targets, loss="margin").sums
    torch.testing.assert_close(from_ce, margin, rtol=1e-6, atol=0)
    torch.testing.assert_close(ce, margin * rec.one_minus_p.view(-1, 1, 1, 1, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(signed, -rec.bins("signed") * rec.one_minus_p.view(-1, 1, 1, 1, 1), rtol=1e-5, atol=1e-9)
    several = FlowRecorder(model, segments).run(ids, None, torch.stack([positions, positions], 1), torch.stack([targets, targets], 1))
    torch.testing.assert_close(several.sums, 2 * ce, rtol=1e-4, atol=1e-9)
    restricted = FlowRecorder(model, segments).run(ids, None, positions, targets, loss="ce_restricted", candidates=list(range(97)))
    torch.testing.assert_close(restricted.sums, ce, rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="candidates must hold every target"):
        rec.run(ids, None, positions, targets, loss="ce_restricted", candidates=[3, 4])


def test_start_layer_checkpointing_and_pairs_change_nothing():
    model = _model("Llama")
    ids, segments, positions, targets = _batch()
    full = FlowRecorder(model, segments).run(ids, None, positions, targets).sums
    late = FlowRecorder(model, segments, layers=[1, -1]).run(ids, None, positions, targets).sums
    assert torch.equal(late, full[:, 1:])
    before = _state(model)
    recomputed = FlowRecorder(model, segments, checkpoint=True).run(ids, None, positions, targets).sums
    assert torch.equal(recomputed, full)  # counted once although the forward ran twice
    assert _state(model) == before
    pruned = FlowRecorder(model, segments, pairs=[("0", "2")]).run(ids, None, positions, targets)
    torch.testing.assert_close(
        pruned.flow("0", "2"), FlowRecorder(model, segments).run(ids, None, positions, targets).flow("0", "2"), rtol=1e-6, atol=0
    )
    with pytest.raises(ValueError, match="pruned"):
        pruned.flow("2", "0")
    first = FlowRecorder(model, segments).run(ids, None, positions, targets).sums
    assert torch.equal(first, full), "two runs, same bits"


@pytest.mark.parametrize(("family", "kinds"), [("Llama", 1), ("Gemma2", 2)])
def test_layers_of_one_mask_share_a_plan(family, kinds, monkeypatch):
    import llmcore.attention

    made = []
    monkeypatch.setattr(llmcore.attention, "plan_saliency_flow", lambda *a, **k: made.append(plan(*a, **k)) or made[-1])
    plan = llmcore.kernels.saliency_flow.plan_saliency_flow
    model = _model(family)
    recorder = FlowRecorder(model, {"a": (2, 6), "b": (6, 12)})
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, 5] = 0  # a hole: rows of unequal length would be packed otherwise
    ids = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(0))
    for runs in (1, 2):
        recorder.run(ids, mask, target_ids=5)
        assert len(made) == runs * kinds


def test_the_last_layer_is_read_by_one_row_only():
    model = _model("Llama")
    ids, _, _, _ = _batch()
    rec = FlowRecorder(model, {"a": (0, 10), "b": (10, 19), "answer": (19, 20)}).run(ids, target_positions=19, target_ids=3)
    assert not rec.sums[:, -1, :, :2].any()
    assert (rec.flow("a", "answer")[:, -1] > 0).all()
    assert (rec.flow("b", "a") == 0).all()
    assert (rec.flow("a", "b")[:, 0] > 0).all()


def test_failures_are_named_and_leave_the_model_as_found(monkeypatch):
    model = _model("Llama")
    model.model.embed_tokens.weight.requires_grad_(False)  # flags that must survive
    ids, segments, positions, targets = _batch()
    before = _state(model)
    rec = FlowRecorder(model, segments)
    cases = [
        (lambda: rec.run(ids, torch.ones(2, 1, 20, 20), positions, targets), "2-D padding mask"),
        (lambda: rec.run(ids, None, 20, targets), "target_positions must be in"),
        (lambda: rec.run(ids, None, positions, 97), "target_ids must be in"),
        (lambda: rec.run(ids, torch.tensor([[1] * 19 + [0], [1] * 20]), 19, targets), "point at padding"),
        (lambda: rec.run(ids, None, positions, targets, loss="nll"), "loss must be one of"),
        (lambda: FlowRecorder(model, {"a": (0, 5), "b": (4, 6)}).run(ids, None, positions, targets), "overlaps"),
        (lambda: FlowRecorder(model, {"a": (0, 25)}).run(ids, None, positions, targets), "leaves the sequence"),
        (lambda: FlowRecorder(model, segments, layers=[3]), "layers must be indices"),
    ]
    for call, words in cases:
        with pytest.raises(ValueError, match=words):
            call()
        assert _state(model) == before

    def poisoned(grad):
        return torch.full_like(grad, torch.nan)

    handle = model.model.layers[1].self_attn.o_proj.register_full_backward_pre_hook(lambda _, grads: (poisoned(grads[0]),))
    expected = _state(model)
    with pytest.raises(ValueError, match="layer 1"):
        rec.run(ids, None, positions, targets)
    assert _state(model) == expected
    handle.remove()

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states), None))
    with pytest.raises(RuntimeError, match=r"layers \[1\] never reached"):
        rec.run(ids, None, positions, targets)
    monkeypatch.undo()
    assert _state(model) == before

    def explode(*_, **__):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(model.model.layers[2].mlp, "forward", explode)
    with pytest.raises(RuntimeError, match="in the middle"):
        rec.run(ids, None, positions, targets)
    assert _state(model) == before
    monkeypatch.undo()
    assert torch.isfinite(rec.run(ids, None, positions, targets).sums).all()

    class Plain(torch.nn.Module):
        pass

    with pytest.raises(ValueError, match="Plain does not"):
        FlowRecorder(Plain(), segments)


def test_dropout_unknown_keywords_and_chunked_masks_are_refused():
    ids, segments, positions, targets = _batch()
    model = _model("Llama", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="dropout"):
        FlowRecorder(model, segments).run(ids, None, positions, targets)
    assert model.training
    from llmcore.attention_interface import attention, check_mask_form

    with pytest.raises(RuntimeError, match="inside FlowRecorder"):
        attention(model.model.layers[0].self_attn, *(torch.zeros(1, 4, 3, 8),) * 3, None)
    check_mask_form(lambda b, h, q, k: k <= q, 20, 20, 0, 0)
    check_mask_form(lambda b, h, q, k: (k <= q) & (k > q - 5), 20, 20, 0, 0)
    with pytest.raises(ValueError, match="chunked"):
        check_mask_form(lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), 20, 20, 0, 0)
    with pytest.raises(ValueError, match="neither"):
        check_mask_form(lambda b, h, q, k: (k <= q) & (k % 2 == q % 2), 20, 20, 0, 0)


def test_an_unknown_keyword_is_refused():
    model = _model("Llama")
    ids, segments, positions, targets = _batch()
    original = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *args, **kwargs: original(*args, position_bias=torch.zeros(1), **kwargs)
    with pytest.raises(ValueError, match="position_bias"):
        FlowRecorder(model, segments).run(ids, None, positions, targets)


def test_results_travel_with_their_metadata(tmp_path):
    from safetensors import safe_open

    model = _model("Llama")
    ids, segments, positions, targets = _batch()
    rec = FlowRecorder(model, segments).run(ids, None, positions, targets)
    rec.save(tmp_path / "flow.safetensors")
    with safe_open(tmp_path / "flow.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("sums"), rec.sums)
        assert '"loss": "ce"' in file.metadata()["llmcore"]
    assert '"quantity": "|A * dL/dA|"' in rec.to_json()
    assert not list(tmp_path.glob("*.part"))


def test_token_segments_and_memory_estimate():
    offsets = [(0, 0), (0, 4), (4, 9), (9, 10), (10, 15)]
    assert token_segments(offsets, {"a": (0, 6), "b": [(6, 10), (12, 15)]}) == {"a": [(1, 3)], "b": [(3, 4)]}
    model = _model("Llama")
    small, large = estimate_memory(model, 100), estimate_memory(model, 200)
    assert large["activations"] == 2 * small["activations"]
    assert large["eager_attention"] == 4 * small["eager_attention"]
