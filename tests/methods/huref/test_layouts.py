"""Every layout against the dense formula on weights pulled out of the real transformers model; splits, prefixes, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from llmcore.methods import huref
from llmcore.methods.huref.adapters import open_checkpoint
from llmcore.methods.huref.layouts import find_layout

from llmcore import files

COMMON = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 8, **COMMON}
# family -> (config class, settings, query heads, key/value heads)
KINDS = {
    "llama": ("LlamaConfig", {**LLAMA, "num_key_value_heads": 2}, 6, 2),
    "phi3": ("Phi3Config", {**{k: v for k, v in LLAMA.items() if k != "head_dim"}, "num_key_value_heads": 2}, 6, 2),
    "gpt2": ("GPT2Config", {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, **COMMON}, 6, 6),
    "gpt_neo": ("GPTNeoConfig", {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "attention_types": [[["global"], 2]],
                                 "intermediate_size": 40, **COMMON}, 6, 6),
    "gpt_neox": ("GPTNeoXConfig", {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
                                   **COMMON}, 6, 6),
    "bloom": ("BloomConfig", {"hidden_size": 24, "n_layer": 2, "n_head": 6, **COMMON}, 6, 6),
    "falcon_grouped": ("FalconConfig", {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2,
                                        "new_decoder_architecture": True, **COMMON}, 6, 2),
    "falcon_multi_query": ("FalconConfig", {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "multi_query": True,
                                            "new_decoder_architecture": False, **COMMON}, 6, 1),
    "opt": ("OPTConfig", {"hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "word_embed_proj_dim": 24,
                          "max_position_embeddings": 32, **COMMON}, 6, 6),
    "mpt": ("MptConfig", {"d_model": 24, "n_heads": 6, "n_layers": 2, "max_seq_len": 32, **COMMON}, 6, 6),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 3}, 6, 2),
    "gemma2": ("Gemma2Config", {**LLAMA, "num_key_value_heads": 2}, 6, 2),
}
IDS = list(range(20, 57))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (directory, state dict in float64), made when first asked for."""
    import transformers

    made = {}

    def get(kind):
        if kind not in made:
            name, settings, _, _ = KINDS[kind]
            torch.manual_seed(0)
            net = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            folder = tmp_path_factory.mktemp(kind)
            net.save_pretrained(folder)
            from safetensors.torch import load_file

            made[kind] = folder, {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        return made[kind]

    return get


def _dense(kind, state, layer):
    """(E, Wq, Wk, Wv, Wo, [(gate or None, up, down)]) by the models' own code: views and splits as in their forward passes."""
    _, _, heads, groups = KINDS[kind]
    if kind in ("llama", "phi3", "mixtral", "gemma2"):
        p = f"model.layers.{layer}."
        embedding = state["model.embed_tokens.weight"]
        if kind == "phi3":
            fused = state[p + "self_attn.qkv_proj.weight"]
            dim = fused.shape[0] // (heads + 2 * groups)
            q, k, v = fused.split([heads * dim, groups * dim, groups * dim])
            gate, up = state[p + "mlp.gate_up_proj.weight"].chunk(2)
            experts = [(gate, up, state[p + "mlp.down_proj.weight"])]
        else:
            q, k, v = (state[p + f"self_attn.{n}_proj.weight"] for n in "qkv")
            if kind == "mixtral":
                experts = [tuple(state[p + f"block_sparse_moe.experts.{e}.{n}.weight"] for n in ("w1", "w3", "w2")) for e in range(3)]
            else:
                experts = [tuple(state[p + f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))]
        return embedding, q, k, v, state[p + "self_attn.o_proj.weight"], experts
    if kind in ("gpt2", "gpt_neo"):
        p = f"transformer.h.{layer}."
        if kind == "gpt2":
            q, k, v = state[p + "attn.c_attn.weight"].T.chunk(3)
            o, up, down = (state[p + n].T for n in ("attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))
        else:
            q, k, v = (state[p + f"attn.attention.{n}_proj.weight"] for n in "qkv")
            o, up, down = (state[p + n] for n in ("attn.attention.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))
        return state["transformer.wte.weight"], q, k, v, o, [(None, up, down)]
    if kind in ("gpt_neox", "bloom", "falcon_grouped", "falcon_multi_query"):
        p = f"gpt_neox.layers.{layer}." if kind == "gpt_neox" else f"transformer.h.{layer}."
        attention = "attention" if kind == "gpt_neox" else "self_attention"
        fused = state[p + f"{attention}.query_key_value.weight"]
        if kind in ("gpt_neox", "bloom"):
            q, k, v = (x.flatten(0, 1) for x in fused.view(heads, 3, -1, fused.shape[1]).unbind(1))
        elif kind == "falcon_grouped":
            view = fused.view(groups, heads // groups + 2, -1, fused.shape[1])
            q, k, v = view[:, :-2].flatten(0, 2), view[:, -2].flatten(0, 1), view[:, -1].flatten(0, 1)
        else:
            dim = fused.shape[0] // (heads + 2)
            q, k, v = fused.split([heads * dim, dim, dim])
        embedding = state["gpt_neox.embed_in.weight" if kind == "gpt_neox" else "transformer.word_embeddings.weight"]
        return embedding, q, k, v, state[p + f"{attention}.dense.weight"], [(None, state[p + "mlp.dense_h_to_4h.weight"],
                                                                           state[p + "mlp.dense_4h_to_h.weight"])]
    if kind == "mpt":
        p = f"transformer.blocks.{layer}."
        q, k, v = state[p + "attn.Wqkv.weight"].chunk(3)
        return (state["transformer.wte.weight"], q, k, v, state[p + "attn.out_proj.weight"],
                [(None, state[p + "ffn.up_proj.weight"], state[p + "ffn.down_proj.weight"])])
    p = f"model.decoder.layers.{layer}."
    q, k, v = (state[p + f"self_attn.{n}_proj.weight"] for n in "qkv")
    return (state["model.decoder.embed_tokens.weight"], q, k, v, state[p + "self_attn.out_proj.weight"],
            [(None, state[p + "fc1.weight"], state[p + "fc2.weight"])])


def _terms(kind, state, layer, *, tile=False, ff="gate_times_up"):
    """M_qk, M_vo, M_ff head by head, as the formulas stand."""
    _, _, heads, groups = KINDS[kind]
    embedding, q, k, v, o, experts = _dense(kind, state, layer)
    x = embedding[IDS]
    dim = q.shape[0] // heads
    qk, vo = torch.zeros(len(x), len(x), dtype=torch.float64), torch.zeros(len(x), len(x), dtype=torch.float64)
    for h in range(heads):
        g = h % groups if tile else h // (heads // groups)
        rows, kv = slice(h * dim, (h + 1) * dim), slice(g * dim, (g + 1) * dim)
        qk += x @ q[rows].T @ k[kv] @ x.T
        vo += x @ v[kv].T @ o[:, rows].T @ x.T
    mlp = torch.zeros_like(qk)
    for gate, up, down in experts:
        inner = up if gate is None or ff == "up" else gate if ff == "gate" else gate * up
        mlp += x @ inner.T @ down.T @ x.T
    return qk, vo, mlp


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_the_formulas_in_float64(models, kind):
    folder, state = models(kind)
    found = huref.invariant_terms(folder, tokens=IDS)
    truth = torch.stack([m for layer in (0, 1) for m in _terms(kind, state, layer)])
    assert found.dtype == torch.float64
    assert (found - truth).abs().max() < 1e-10 * max(1.0, truth.abs().max().item())


def test_conventions_of_other_implementations(models):
    for kind in ("llama", "falcon_grouped"):
        folder, state = models(kind)
        tiled = huref.invariant_terms(folder, tokens=IDS, gqa="tile", layers=[-1])
        assert (tiled - torch.stack(_terms(kind, state, 1, tile=True))).abs().max() < 1e-10
        assert (tiled[0] - _terms(kind, state, 1)[0]).abs().max() > 1e-3
    for ff in ("up", "gate"):
        folder, state = models("llama")
        assert (huref.invariant_terms(folder, tokens=IDS, ff=ff, layers=[0])[2] - _terms("llama", state, 0, ff=ff)[2]).abs().max() < 1e-10


def test_published_splits(models):
    folder, state = models("gpt_neox")
    fused = state["gpt_neox.layers.1.attention.query_key_value.weight"].chunk(3)
    x = state["gpt_neox.embed_in.weight"][IDS]
    found = huref.invariant_terms(folder, tokens=IDS, compat="published", layers=[1])
    assert (found[0] - x @ fused[0].T @ fused[1] @ x.T).abs().max() < 1e-10
    folder, state = models("gpt2")
    right, wrong = (huref.invariant_terms(folder, tokens=IDS, compat=c, layers=[1]) for c in (None, "published"))
    assert (wrong[0] - right[0]).abs().max() < 1e-12
    assert (wrong[2] - right[2].T).abs().max() < 1e-12
    v = state["transformer.h.1.attn.c_attn.weight"].T.chunk(3)[2]
    x = state["transformer.wte.weight"][IDS]
    assert (wrong[1] - x @ v.T @ state["transformer.h.1.attn.c_proj.weight"].T @ x.T).abs().max() < 1e-10


def test_hardened_terms_take_the_gains_where_the_model_has_them(models):
    folder, state = models("gemma2")  # gains are 1 + weight, before and behind both sub-layers
    x, q, k, v, o, [(_, up, down)] = _dense("gemma2", state, 1)
    x = x[IDS]
    norm = {n: 1 + state[f"model.layers.1.{n}.weight"] for n in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                                                                 "post_feedforward_layernorm")}
    expand = [i for h in range(6) for i in range(8 * (h // 3), 8 * (h // 3) + 8)]
    before = norm["input_layernorm"]
    qk = x @ (q * before).T @ (k * before)[expand] @ x.T
    vo = x @ (v * before)[expand].T @ (o * norm["post_attention_layernorm"][:, None]).T @ x.T
    mlp = x @ (up * norm["pre_feedforward_layernorm"]).T @ (down * norm["post_feedforward_layernorm"][:, None]).T @ x.T
    found = huref.invariant_terms(folder, tokens=IDS, terms="hardened", layers=[-1])
    assert (found - torch.stack([qk, vo, mlp])).abs().max() < 1e-10
    both = huref.invariant_terms(folder, tokens=IDS, terms=("paper", "hardened"), layers=[-1])
    assert torch.equal(both[3:], found)


def test_small_blocks_give_the_same_factors(models):
    from llmcore.methods.huref.terms import embedding_rows, layer_factors

    for kind in ("llama", "falcon_grouped", "mixtral", "gpt2"):
        folder, _ = models(kind)
        reader = open_checkpoint(folder)
        layout = find_layout(reader)
        x = embedding_rows(reader, layout, IDS, torch.float64)
        small, whole = ([f.left @ f.right.T for f in layer_factors(reader, layout, 1, x, terms=("paper", "hardened"), block_bytes=b)]
                        for b in (64, 1 << 20))
        assert max((a - b).abs().max().item() for a, b in zip(small, whole, strict=True)) < 1e-12
        reader.close()


def test_what_is_not_supported_is_refused_by_name(models, tmp_path):
    folder, _ = models("llama")
    config = json.loads((folder / "config.json").read_text())

    def variant(**changes):
        target = tmp_path / f"v{len(list(tmp_path.iterdir()))}"
        target.mkdir()
        (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        files.write_json(target / "config.json", {**config, **changes})
        return target

    for model_type, words in (("deepseek_v3", "latent attention"), ("starfish", "layout= with one of")):
        with pytest.raises(ValueError, match=words):
            huref.invariant_terms(variant(model_type=model_type), tokens=IDS)
    assert huref.invariant_terms(variant(model_type="starfish"), tokens=IDS, layout="llama").shape == (6, len(IDS), len(IDS))
    with pytest.raises(ValueError, match=r"tensor 'model.layers.0.self_attn.q_proj.weight': shape \(48, 24\) does not fit"):
        huref.invariant_terms(variant(num_attention_heads=4), tokens=IDS)
    with pytest.raises(ValueError, match=r"no tensor .model\.layers\.5"):
        huref.invariant_terms(variant(num_hidden_layers=6), tokens=IDS, layers=[5])
    for ids, words in (([5, 128], r"\[0, 128\)"), ([5, 5], "distinct"), ([5], "at least 2")):
        with pytest.raises(ValueError, match=words):
            huref.invariant_terms(folder, tokens=ids)
    with pytest.raises(ValueError, match="layers"):
        huref.invariant_terms(folder, tokens=IDS, layers=[7])


def test_nan_is_named(models, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = models("llama")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN"):
        huref.invariant_terms(tmp_path, tokens=IDS)
