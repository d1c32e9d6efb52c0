"""Names and order of the matrices inside a layer, for every family of models that the invariant terms know.

The splits of fused tensors: "thirds" [Q | K | V], "heads" per head [q | k | v] (H, 3, d), "groups" per key/value head [r queries | k | v]
(G, r + 2, d). layouts.py turns a family and a configuration into matrices of a given checkpoint.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Family:
    """Names inside one layer. fused: None, "thirds" [Q | K | V], "heads" (H, 3, d), "groups" (G, r + 2, d)."""

    embedding: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{}."
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    qkv: str | None = None
    fused: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate_up: str | None = None  # one tensor, [gate | up]
    experts: tuple[str, str, str] | None = None  # gate, up, down with {} for the expert
    norms: tuple[str | None, str | None, str | None, str | None] = ("input_layernorm", "post_attention_layernorm", None, None)
    norm_offset: float = 0.0
    transposed: bool = False
    rotary: bool = True


_LLAMA = Family()
_GPT = {"layer": "transformer.h.{}.", "embedding": "transformer.wte.weight", "gate": None, "norms": ("ln_1", "ln_2", None, None)}
_NEOX = {
    "gate": None,
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
    "qkv": "attention.query_key_value",
    "fused": "heads",
    "output": "attention.dense",
}
_GEMMA2_NORMS = ("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
_MOE = Family(experts=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "internlm",
            "yi",
            "granite",
            "smollm3",
            "stablelm",
            "seed_oss",
            "helium",
        ),
        _LLAMA,
    ),
    "arcee": Family(gate=None),
    "baichuan": Family(qkv="self_attn.W_pack", fused="thirds"),
    "gemma": Family(norm_offset=1.0),
    "gemma2": Family(norms=_GEMMA2_NORMS, norm_offset=1.0),
    "gemma3_text": Family(norms=_GEMMA2_NORMS, norm_offset=1.0),
    "olmo": Family(norms=(None, None, None, None)),
    "olmo2": Family(norms=(None, None, "post_attention_layernorm", "post_feedforward_layernorm")),
    "cohere": Family(norms=("input_layernorm", "input_layernorm", None, None)),
    "phi": Family(
        output="self_attn.dense", gate=None, up="mlp.fc1", down="mlp.fc2", norms=("input_layernorm", "input_layernorm", None, None)
    ),
    "phi3": Family(qkv="self_attn.qkv_proj", fused="thirds", gate_up="mlp.gate_up_proj"),
    "starcoder2": Family(gate=None, up="mlp.c_fc", down="mlp.c_proj"),
    "mixtral": Family(experts=("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2")),
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
    "olmoe": _MOE,
    "internlm2": Family(
        embedding="model.tok_embeddings.weight",
        qkv="attention.wqkv",
        fused="groups",
        output="attention.wo",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
        norms=("attention_norm", "ffn_norm", None, None),
    ),
    "gpt2": Family(
        **_GPT,
        qkv="attn.c_attn",
        fused="thirds",
        output="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",  # type: ignore[arg-type]
        transposed=True,
        rotary=False,
    ),
    "gpt_neo": Family(
        **_GPT,
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",  # type: ignore[arg-type]
        output="attn.attention.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        rotary=False,
    ),
    "gptj": Family(
        **{**_GPT, "norms": ("ln_1", "ln_1", None, None)},
        query="attn.q_proj",
        key="attn.k_proj",  # type: ignore[arg-type]
        value="attn.v_proj",
        output="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
    ),
    "qwen": Family(
        layer="transformer.h.{}.",
        embedding="transformer.wte.weight",
        qkv="attn.c_attn",
        fused="thirds",
        output="attn.c_proj",
        gate="mlp.w2",
        up="mlp.w1",
        down="mlp.c_proj",
        norms=("ln_1", "ln_2", None, None),
    ),
    "gpt_neox": Family(**_NEOX, embedding="gpt_neox.embed_in.weight", layer="gpt_neox.layers.{}."),  # type: ignore[arg-type]
    "bloom": Family(
        **{**_NEOX, "qkv": "self_attention.query_key_value", "output": "self_attention.dense"},  # type: ignore[arg-type]
        embedding="transformer.word_embeddings.weight",
        layer="transformer.h.{}.",
        rotary=False,
    ),
    "falcon": Family(
        **{
            **_NEOX,
            "qkv": "self_attention.query_key_value",
            "output": "self_attention.dense",  # type: ignore[arg-type]
            "norms": ("input_layernorm", "input_layernorm", None, None),
        },
        embedding="transformer.word_embeddings.weight",
        layer="transformer.h.{}.",
    ),
    "mpt": Family(
        gate=None,
        layer="transformer.blocks.{}.",
        embedding="transformer.wte.weight",
        qkv="attn.Wqkv",
        fused="thirds",
        output="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
        norms=("norm_1", "norm_2", None, None),
        rotary=False,
    ),
    "opt": Family(
        gate=None,
        layer="model.decoder.layers.{}.",
        embedding="model.decoder.embed_tokens.weight",
        output="self_attn.out_proj",
        up="fc1",
        down="fc2",
        norms=("self_attn_layer_norm", "final_layer_norm", None, None),
        rotary=False,
    ),
    "chatglm": Family(
        embedding="transformer.embedding.word_embeddings.weight",
        layer="transformer.encoder.layers.{}.",
        qkv="self_attention.query_key_value",
        fused="thirds",
        output="self_attention.dense",
        gate_up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
}
REFUSED = {
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "minicpm3": "multi-head latent attention",
    "kimi_k2": "multi-head latent attention",
    "mamba": "no attention",
    "rwkv": "no attention",
    "t5": "an encoder-decoder model",
    "bart": "an encoder-decoder model",
}
