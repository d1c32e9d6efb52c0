"""Copies of the embedded model on disk, made once: rewritten, noisy, random, four-bit, adapted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch


@pytest.fixture(scope="session")
def base():
    """Safetensors directory of the embedded model."""
    from llmcore.models import embedded_path

    return embedded_path()


WHOLE = {"all", "random", "vocabulary"}


@pytest.fixture(scope="session")
def tail(base, tmp_path_factory):
    """The last two layers of the embedded model as a checkpoint of their own: the terms are those of the whole model, at a quarter of its
    size."""
    from llmcore import files
    from llmcore.checkpoints import CheckpointReader

    folder, tensors = tmp_path_factory.mktemp("tail"), {}
    with CheckpointReader(base) as reader:
        config = {**reader.config, "num_hidden_layers": 2}
        for name in reader.names():
            parts = name.split(".")
            if parts[1] == "layers":
                if int(parts[2]) < reader.config["num_hidden_layers"] - 2:
                    continue
                parts[2] = str(int(parts[2]) - reader.config["num_hidden_layers"] + 2)
            tensors[".".join(parts)] = reader.read(name)
    files.write_safetensors(folder / "model.safetensors", tensors)
    files.write_json(folder / "config.json", config)
    shutil.copy(base / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="session")
def copies(base, tail, tmp_path_factory):
    """name -> directory of a rewritten copy, written when first asked for: of the whole model for WHOLE, of its last two layers else."""
    from llmcore.methods.huref import attacks

    folder, made = tmp_path_factory.mktemp("copies"), {}

    def get(*names: str, **options):
        key = "+".join(names) + "".join(f"-{k}{v}" for k, v in sorted(options.items()))
        if key not in made:
            attacks.apply(base if WHOLE & set(names) else tail, folder / key, list(names), **options)
            made[key] = folder / key
        return made[key]

    return get


@pytest.fixture(scope="session")
def four_bit(tail, tmp_path_factory):
    """(matrices, embedding) -> GGUF file of the model's tail in these types, with llama's names and row order, written by gguf."""
    gguf = pytest.importorskip("gguf")
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def get(matrices: str, embedding: str):
        key = f"{matrices}-{embedding}"
        if key not in made:
            kinds = [gguf.GGMLQuantizationType[k] for k in (matrices, embedding)]
            made[key] = _write_gguf(gguf, tail, folder / f"{key}.gguf", *kinds)
        return made[key]

    return get


def _write_gguf(gguf, base, path, matrices, embedding):
    import numpy as np

    from llmcore.checkpoints import CheckpointReader

    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {t["id"] for t in tokenizer["added_tokens"]}
    with CheckpointReader(base) as reader:
        config = reader.config
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(pieces)
        writer.add_token_types([3 if i in special else 1 for i in range(len(pieces))])
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in tokenizer["model"]["merges"]])
        stems = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
                 "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
                 "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
        for name in reader.names():
            value = reader.read(name, dtype=torch.float32).numpy()
            if name == "model.embed_tokens.weight":
                stored = "token_embd.weight"
            elif name == "model.norm.weight":
                stored = "output_norm.weight"
            else:
                _, _, layer, *rest = name.removesuffix(".weight").split(".")
                stored = f"blk.{layer}.{stems['.'.join(rest)]}.weight"
            for side, heads in (("attn_q", config["num_attention_heads"]), ("attn_k", config["num_key_value_heads"])):
                if f".{side}." in stored:  # llama files interleave the two halves of a head
                    value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            kind = matrices if value.ndim == 2 else gguf.GGMLQuantizationType.F32
            kind = embedding if stored == "token_embd.weight" else kind
            writer.add_tensor(stored, gguf.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    """A LoRA adapter directory as peft writes it, rank 8 on q, v and down of the last two layers, with a change of real size."""
    from llmcore import files
    from llmcore.checkpoints import CheckpointReader

    folder = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    with CheckpointReader(base) as reader:
        for layer in (28, 29):
            for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
                name = f"model.layers.{layer}.{module}"
                rows, columns = reader.shape(f"{name}.weight")
                scale = 0.3 * float(reader.read(f"{name}.weight").std()) / 8**0.5 / 2
                tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(8, columns, generator=generator)
                tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * scale
    files.write_safetensors(folder / "adapter_model.safetensors", tensors)
    files.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": str(base)})
    return folder
