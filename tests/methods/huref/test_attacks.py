"""Rewritten checkpoints on disk: the logits stay, the weights do not, and what cannot be kept is refused."""

from __future__ import annotations

import json

import pytest
import torch
from llmcore.methods.huref import attacks

from llmcore.checkpoints import CheckpointReader
from llmcore.models import load_model

LOSSLESS = [name for name, rewrite in attacks.ATTACKS.items() if rewrite.lossless]
TINY = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 64, "initializer_range": 0.15}
KINDS = {"llama": ("LlamaConfig", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
         "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
         "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
         "mistral": ("MistralConfig", "MistralForCausalLM", {"tie_word_embeddings": False}),
         "gemma": ("GemmaConfig", "GemmaForCausalLM", {})}


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, a few merges and two special tokens: 300 ids, so that a copy's tokenizer costs nothing to rewrite and to load."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as parts
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "aeiou" for b in "nrstlm"] + [("t", "h"), ("th", "e")]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "<end>", *letters, *(a + b for a, b in merges)])}
    built = Tokenizer(parts.BPE(vocabulary | {f"spare{i}": i for i in range(len(vocabulary), 300)}, merges))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    built.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="<end>")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """One small model of every supported type, norms and biases far from their initial values."""
    import transformers

    made = {}
    for kind, (config, model, extra) in KINDS.items():
        torch.manual_seed(1)
        settings = getattr(transformers, config)(**TINY, **extra, pad_token_id=None, bos_token_id=1, eos_token_id=2)
        net = getattr(transformers, model)(settings)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if parameter.ndim == 1:
                    parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.0 if kind == "gemma" or "bias" in name else 1.0))
        folder = tmp_path_factory.mktemp(kind)
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[kind] = folder
    return made


def _cosine(a, b) -> float:
    """Parameter cosine over the matrices of the layers."""
    with CheckpointReader(a) as first, CheckpointReader(b) as second:
        sums = torch.zeros(3, dtype=torch.float64)
        for name in first.names():
            if name.startswith("model.layers.") and len(first.shape(name)) == 2:
                x, y = first.read(name, dtype=torch.float64), second.read(name, dtype=torch.float64)
                sums += torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
        return float(sums[0] / (sums[1] * sums[2]).sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_every_lossless_rewrite_keeps_the_logits_of_every_model_type(tiny, tmp_path, kind):
    original = load_model(tiny[kind], device="cpu")
    for name in LOSSLESS:
        if (kind, name) == ("qwen3", "qk_scaling"):
            with pytest.raises(ValueError, match=r"qk_scaling: model_type 'qwen3' normalises queries and keys"):
                attacks.apply(tiny[kind], tmp_path / name, name)
            assert not (tmp_path / name).exists()
            continue
        report = attacks.apply(tiny[kind], tmp_path / name, name, seed=3)
        assert report.lossless
        change = attacks.logit_change(original, tmp_path / name)
        assert change.relative < 2e-5, (name, change)
        if name not in ("identity_layers", "vocabulary"):
            assert _cosine(tiny[kind], tmp_path / name) < 0.99, name


def test_smollm2_disguised_by_everything(smollm2, tmp_path):
    """Nine heads in three groups: the real model, written, read back, its logits unchanged and its parameters unrecognisable."""
    report = attacks.apply("smollm2", tmp_path / "copy", ["all", "rotation", "norm_shift"], seed=0, num_shards=3)
    assert report.attacks == (*attacks.COVERED, "rotation", "norm_shift")
    assert json.loads((tmp_path / "copy" / "attack.json").read_text())["seed"] == 0
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) == 3
    change = attacks.logit_change(smollm2, tmp_path / "copy")
    assert change.max_abs < 4e-4 < 1 < change.std
    assert abs(_cosine(smollm2.path, tmp_path / "copy")) < 0.01


# rewrite -> the paper's score of the copy (section 7 B of the specification: 0.691 and 0.842 on its seeds), within what other seeds give
SINGLE = {**dict.fromkeys(attacks.COVERED, (1 - 1e-6, 1 + 1e-6)), "rotation": (0.6, 0.78), "norm_shift": (0.75, 0.93)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_each_rewrite_of_the_whole_model(smollm2, tmp_path, name):
    from llmcore.methods import huref

    attacks.apply("smollm2", tmp_path / "copy", name, seed=0)
    assert attacks.logit_change(smollm2, tmp_path / "copy").max_abs < 4e-4
    found = huref.compare(smollm2.path, tmp_path / "copy", K=256)
    assert SINGLE[name][0] < found.ics < SINGLE[name][1]
    assert abs(found.ics_hardened - 1) < 1e-6


def test_rewrites_depend_on_the_seed_and_nothing_else(tiny, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        attacks.apply(tiny["llama"], tmp_path / name, "all", seed=seed)
    raw = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert raw[0] == raw[1] != raw[2]


def test_lossy_copies_say_so(tiny, tmp_path):
    for name in ("noise", "random"):
        assert not attacks.apply(tiny["llama"], tmp_path / name, name, seed=1).lossless
        assert attacks.logit_change(tiny["llama"], tmp_path / name).relative > 0.05
    with CheckpointReader(tiny["llama"]) as before, CheckpointReader(tmp_path / "noise") as after:
        name = "model.layers.1.mlp.up_proj.weight"
        old, new = before.read(name), after.read(name)
        assert 0.09 < ((new - old).std() / old.std()).item() < 0.11
        assert after.read("model.norm.weight").equal(before.read("model.norm.weight"))


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2 ** -8), ("float16", 2 ** -11), ("float8_e4m3", 2 ** -4)])
def test_narrow_storage_rounds_once(tiny, tmp_path, dtype, bound):
    attacks.apply(tiny["llama"], tmp_path / "wide", "all", seed=2)
    attacks.apply(tiny["llama"], tmp_path / "narrow", "all", seed=2, dtype=dtype, num_shards=4)
    with CheckpointReader(tmp_path / "wide") as wide, CheckpointReader(tmp_path / "narrow") as narrow:
        assert len({entry.file.path for entry in narrow._entries.values()}) == 4
        for name in wide.names():
            a, b = wide.read(name), narrow.read(name, dtype=torch.float32)
            # below the type's smallest normal number the error is absolute
            floor = 2e-3 * a.abs().max() if dtype == "float8_e4m3" else 1e-7
            assert bool(((a - b).abs() <= 1.001 * bound * a.abs() + floor).all()), name


def test_permuted_and_extended_vocabulary(tiny, tmp_path):
    attacks.apply(tiny["qwen2"], tmp_path / "copy", "vocabulary", seed=4, strength=37)
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(p) for p in (tiny["qwen2"], tmp_path / "copy"))
    assert len(after) >= 300 + 37
    text = "The other sentence, with 3 parts.<end>"
    assert before.convert_ids_to_tokens(before(text).input_ids) == after.convert_ids_to_tokens(after(text).input_ids)
    vocabulary = after.get_vocab()
    moved = sum(vocabulary[token] != index for token, index in before.get_vocab().items() if index < 300)
    assert moved > 250
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["vocab_size"] == 300 + 37
    assert after.convert_ids_to_tokens(config["eos_token_id"]) == before.convert_ids_to_tokens(2)
    with CheckpointReader(tiny["qwen2"]) as first, CheckpointReader(tmp_path / "copy") as second:
        name = "model.embed_tokens.weight"
        ids = [5, 270, 290]
        assert first.rows(name, ids).equal(second.rows(name, after.convert_tokens_to_ids(before.convert_ids_to_tokens(ids))))


def test_what_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"attacks must be among .* got 'rotate'"):
        attacks.apply(tiny["llama"], tmp_path / "x", "rotate")
    with pytest.raises(ValueError, match="dtype must be one of"):
        attacks.apply(tiny["llama"], tmp_path / "x", "all", dtype="int8")
    with pytest.raises(ValueError, match=r"num_shards must lie in \[1, 4\]"):
        attacks.apply(tiny["llama"], tmp_path / "x", "all", num_shards=9)
    with pytest.raises(FileExistsError):
        attacks.apply(tiny["llama"], tmp_path, "all")
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, other / "model.safetensors")
    with pytest.raises(ValueError, match=r"model_type 'gpt2' is not supported"):
        attacks.apply(other, tmp_path / "x", "all")
    assert not (tmp_path / "x").exists()
