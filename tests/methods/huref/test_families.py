"""Every layout against the model itself: a rewrite through the claimed rows and columns keeps the logits of the real transformers model.

Per key/value group q is multiplied by c and k divided by it, v is mixed by an invertible matrix and o by its inverse, and neurons change
places. One half of a rewrite alone must change the logits, or the test would say nothing.
"""

from __future__ import annotations

import pytest
import torch
from llmcore.methods.huref.adapters import open_checkpoint
from llmcore.methods.huref.families import FAMILIES
from llmcore.methods.huref.layouts import find_layout
from safetensors.torch import load_file, save_file

COMMON = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 32,
         **COMMON}
WIDE = {**SMALL, "head_dim": 8, "num_key_value_heads": 2}  # head_dim is not hidden_size / heads
GROUPED = {**SMALL, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
FALCON = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, **COMMON}
# name -> (model type of FAMILIES, settings for AutoConfig)
KINDS = {
    **{kind: (kind, WIDE) for kind in ("llama", "mistral", "qwen3", "granite", "seed_oss", "gemma", "gemma2", "gemma3_text", "arcee")},
    "helium": ("helium", {**GROUPED, "head_dim": 4}),
    **{kind: (kind, GROUPED) for kind in ("qwen2", "smollm3", "stablelm", "olmo", "olmo2", "cohere", "phi", "phi3", "starcoder2")},
    "ministral": ("ministral", {**WIDE, "sliding_window": 16}),
    "mixtral": ("mixtral", {**WIDE, "num_local_experts": 3}),
    "qwen2_moe": ("qwen2_moe", {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 12, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **EXPERTS, "num_experts": 4, "decoder_sparse_step": 1}),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, **COMMON}),
    "gpt_neo": ("gpt_neo", {"hidden_size": 24, "num_layers": 2, "num_heads": 6, "attention_types": [[["global"], 2]],
                            "intermediate_size": 20, "max_position_embeddings": 32, **COMMON}),
    "gptj": ("gptj", {"n_embd": 24, "n_layer": 2, "n_head": 6, "n_positions": 32, "rotary_dim": 2, **COMMON}),
    "gpt_neox": ("gpt_neox", SMALL),
    "bloom": ("bloom", {"hidden_size": 24, "n_layer": 2, "n_head": 6, **COMMON}),
    "falcon grouped": ("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon multi-query": ("falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon one norm": ("falcon", {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "falcon per head": ("falcon", {**FALCON, "multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True,
                                   "parallel_attn": False}),
    "mpt": ("mpt", {"d_model": 24, "n_heads": 6, "n_layers": 2, "max_seq_len": 32, **COMMON}),
    "opt": ("opt", {"hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 2, "num_attention_heads": 6, "word_embed_proj_dim": 24,
                    "max_position_embeddings": 32, **COMMON}),
}  # fmt: skip
NO_CODE = {"chatglm", "qwen", "internlm2", "baichuan", "internlm", "yi"}  # not in transformers any more; internlm and yi are llama's layout
NORMALISED = {"olmo2", "olmoe", "qwen3", "qwen3_moe", "gemma3_text"}  # queries and keys pass a norm: scaling them is no rewrite
SINGLE = {"gpt_neo", "gptj", "cohere"}  # their attention or rotation computes in float32 whatever the weights are


def test_every_family_is_here_or_named_as_unchecked():
    assert {kind for kind, _ in KINDS.values()} | NO_CODE == set(FAMILIES)


class Rewriter:
    """Changes stored tensors through the rows and the orientation that a layout claims."""

    def __init__(self, folder):
        self.state = {k: v.double() for k, v in load_file(folder / "model.safetensors").items()}
        with open_checkpoint(folder) as reader:
            self.layout = find_layout(reader)
            self.layers = [self.layout.layer(i) for i in range(self.layout.num_layers)]

    def rows(self, matrix, rows, change):
        """change(values (n, in) or bias (n, 1)) on logical output rows."""
        stored = torch.from_numpy(matrix.rows)[rows] if matrix.rows is not None else rows
        weight = self.state[matrix.name]
        weight = weight.T if matrix.transposed else weight
        weight[stored] = change(weight[stored])
        bias = matrix.name.removesuffix("weight") + "bias"
        if bias in self.state:
            self.state[bias][stored] = change(self.state[bias][stored][:, None])[:, 0]

    def columns(self, matrix, columns, change):
        """change(values (out, n)) on input columns."""
        weight = self.state[matrix.name]
        weight = weight.T if matrix.transposed else weight
        weight[:, columns] = change(weight[:, columns])

    def apply(self, *, query=False, key=False, value=False, output=False, neurons=False):
        shape, generator = self.layout, torch.Generator().manual_seed(0)
        ratio, d = shape.num_heads // shape.num_kv_heads, shape.head_dim
        for layer in self.layers:
            for g in range(shape.num_kv_heads):
                c = 0.6 + g
                mix = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0] * (1.5 + 0.3 * g)
                own, group = torch.arange(g * d, (g + 1) * d), torch.arange(g * ratio * d, (g + 1) * ratio * d)
                if query:
                    self.rows(layer.query, group, lambda w, c=c: w * c)
                if key:
                    self.rows(layer.key, own, lambda w, c=c: w / c)
                if value:
                    self.rows(layer.value, own, lambda w, mix=mix: mix @ w)
                if output:
                    for head in group.view(ratio, d):
                        self.columns(layer.output, head, lambda w, mix=mix: w @ torch.linalg.inv(mix))
            for gate, up, down in layer.experts if neurons else ():
                order = torch.randperm(up.out_size, generator=generator)
                for matrix in (up,) if gate is None else (gate, up):
                    self.rows(matrix, torch.arange(up.out_size), lambda w, order=order: w[order])
                self.columns(down, torch.arange(up.out_size), lambda w, order=order: w[:, order])
        return self


@pytest.mark.parametrize("kind", KINDS)
def test_rewrites_through_the_layout_keep_the_logits(kind, tmp_path):
    import transformers

    model_type, settings = KINDS[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    options = {"experts_implementation": "eager"} if "moe" in kind or kind == "mixtral" else {}
    net = transformers.AutoModelForCausalLM.from_config(config, **options).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    net.save_pretrained(tmp_path)
    ids = torch.arange(3, 15)[None]

    def logits(**what):
        rewriter = Rewriter(tmp_path).apply(**what)
        folder = tmp_path / ("-".join(what) or "same")
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
        save_file({k: v.contiguous() for k, v in rewriter.state.items()}, folder / "model.safetensors", {"format": "pt"})
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
        with torch.no_grad():
            return model(input_ids=ids).logits[0]

    truth, scaled = logits(), model_type not in NORMALISED
    both = {"query": scaled, "key": scaled, "value": True, "output": True, "neurons": True}
    spread = truth.std()
    assert (logits(**both) - truth).abs().max() < (1e-5 if model_type in SINGLE else 1e-9) * spread
    for half in ("query", "value") if scaled else ("value",):
        assert (logits(**{half: True}) - truth).abs().max() > 1e-3 * spread, half
