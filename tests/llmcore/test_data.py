"""Rows and token batches: reading, implicit prompts, boundaries, policies, masks, layouts, and errors that say where."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from llmcore.methods.direct_alignment import sequence_scores

from llmcore import data

ROW = {"prompt": "Say", "chosen": " yes", "rejected": " no, never"}


def tokenize(model, rows, **options):
    return data.tokenize(data.read_rows(rows), model.tokenizer, stop_ids=model.stop_ids, **options)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json"])
def test_files_give_the_rows_of_their_lines(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    text = json.dumps([ROW, ROW]) if suffix == "json" else json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    rows = data.read_rows(path)
    assert [(r.prompt, r.completions) for r in rows] == [("Say", (" yes", " no, never"))] * 2
    places = ["item 1", "item 2"] if suffix == "json" else ["1", "3"]
    assert [r.id for r in rows] == [f"{path}:{place}" for place in places]


def test_implicit_prompts():
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    row = data.read_rows([{"chosen": talk + " See you", "rejected": talk + " See nothing"}])[0]
    assert (row.prompt, row.completions) == (talk, (" See you", " See nothing"))
    row = data.read_rows([{"chosen": "The end is near", "rejected": "The end was far"}])[0]
    assert (row.prompt, row.completions) == ("The end", (" is near", " was far"))
    user = {"role": "user", "content": "Hi"}
    good, bad = ({"role": "assistant", "content": text} for text in ("Hello", "Go away"))
    row = data.read_rows([{"chosen": [user, good], "rejected": [user, bad]}])[0]
    assert (row.prompt, row.completions) == ([user], ([good], [bad]))


def test_a_conversation_is_the_template_and_ends_with_the_stop_id(smollm2):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    rows = [{"prompt": [user], "chosen": [answer], "rejected": [{"role": "assistant", "content": "No"}]}]
    chosen = tokenize(smollm2, rows).examples[0].sequences[0]
    assert chosen.ids[: chosen.start].tolist() == smollm2.chat_ids([user])
    assert smollm2.tokenizer.decode(chosen.ids[chosen.start :]) == "Hello<|im_end|>"


def test_completions_start_at_the_common_tokens_and_get_the_stop_id(smollm2):
    chosen = tokenize(smollm2, [ROW]).examples[0].sequences[0]
    prompt = smollm2.tokenizer("Say")["input_ids"]
    assert chosen.ids.tolist() == [*smollm2.tokenizer("Say yes")["input_ids"], smollm2.stop_ids[0]]
    assert chosen.start == len(prompt)
    # The space that ends this prompt merges into the completion's first word.
    with pytest.warns(UserWarning, match="merge across the boundary"):
        merged = tokenize(smollm2, [{"prompt": "Say ", "chosen": "yes", "rejected": "no"}])
    first = merged.examples[0].sequences[0]
    assert merged.counts["boundary_merged"] == 2
    assert (first.ids.tolist(), first.start) == (chosen.ids.tolist(), len(prompt))


def test_truncation(smollm2):
    rows = [ROW, {"prompt": "one two three four five six", "chosen": " seven", "rejected": " eight nine ten"}]
    whole = tokenize(smollm2, rows).examples[1].sequences
    with pytest.raises(ValueError, match=r"rows:2: 10 tokens exceed max_length 8"):
        tokenize(smollm2, rows, max_length=8)
    dropped = tokenize(smollm2, rows, max_length=8, truncation="drop")
    assert ([e.id for e in dropped.examples], dropped.counts["dropped_long"]) == (["rows:1"], 1)
    start = tokenize(smollm2, rows, max_length=8, truncation="keep_start").examples[1].sequences
    assert [s.ids.tolist() for s in start] == [s.ids[:8].tolist() for s in whole]
    end = tokenize(smollm2, rows, max_length=8, truncation="keep_end").examples[1].sequences
    assert [s.ids.tolist() for s in end] == [s.ids[2:].tolist() for s in whole]
    assert [s.start for s in end] == [s.start - 2 for s in whole]


def test_empty_completions(smollm2):
    rows = [ROW, {"prompt": "Say", "chosen": " yes", "rejected": " "}]
    with pytest.raises(ValueError, match=r"rows:2: field 'rejected' is an empty completion"):
        tokenize(smollm2, rows)
    dropped = tokenize(smollm2, rows, on_empty="drop")
    assert ([e.id for e in dropped.examples], dropped.counts["dropped_empty"]) == (["rows:1"], 1)
    zero = tokenize(smollm2, rows, on_empty="zero").examples
    assert [s.scored for s in zero[1].sequences] == [2, 0]
    with torch.no_grad():
        logp = sequence_scores(smollm2.model, data.batch_of(zero)).logp
    assert logp[3].item() == 0.0
    assert logp[2].item() < 0.0


def test_masks_come_from_lengths_though_padding_is_the_stop_id(smollm2):
    assert smollm2.pad_id == smollm2.stop_ids[0] == smollm2.tokenizer.eos_token_id
    batch = data.batch_of(tokenize(smollm2, [ROW]).examples)
    assert batch.counts.tolist() == [2, 4]
    stops = batch.cu_seqlens[1:].long() - 1
    assert batch.labels[stops].tolist() == [smollm2.stop_ids[0]] * 2, "the stop token is scored, padding or not"
    mask = batch.calls[0].inputs["attention_mask"]
    assert mask.sum(1).tolist() == [len(s.ids) for s in batch.sequences]


def test_layouts_give_the_padded_scores(smollm2):
    rows = [ROW, {"prompt": "one two three four", "chosen": " five", "rejected": " six seven"}]
    examples = tokenize(smollm2, rows).examples
    with torch.no_grad():
        padded = sequence_scores(smollm2.model, data.batch_of(examples)).logp
        shared = sequence_scores(smollm2.model, data.batch_of(examples, layout="shared")).logp
        packed = sequence_scores(smollm2.model, data.batch_of(examples, layout="packed")).logp
        alone = sequence_scores(smollm2.model, data.batch_of(examples, isolate=True)).logp
    for other in (shared, packed, alone):
        torch.testing.assert_close(other, padded, rtol=1e-5, atol=1e-4)


def test_batches_depend_on_seed_and_step_alone():
    tokens = data.Tokens(np.array([1, 2, 3]), 1)
    examples = [data.Example(str(i), (tokens, tokens)) for i in range(5)]
    first, again = (data.Batches(examples, batch_size=2, num_steps=6, seed=3) for _ in range(2))
    assert first.select(4) == again.select(4)
    assert sorted(i for step in range(3) for i in first.select(step)) == list(range(5))
    assert [len(b.ids) for b in first[1]] == [2]


GOOD = json.dumps(ROW).encode()


@pytest.mark.parametrize(
    ("content", "kind", "line", "says"),
    [
        (b'{"prompt": "a", "chosen": "b"}', "preference", 2, "field 'rejected' is missing"),
        (b'{"prompt": "a", "chosen": 3, "rejected": "b"}', "preference", 2, "field 'chosen' must be text"),
        (b'{"prompt": ["x"], "chosen": "b", "rejected": "c"}', "preference", 2, r"field 'prompt\[0\]' must be a message"),
        (b'{"chosen": "b", "rejected": []}', "preference", 2, "field 'rejected' must have the form of 'chosen'"),
        (b'{"prompt": "a", "completion": "b", "label": true}', "preference", 2, "'chosen' is missing.*unpaired loss"),
        (b'["a"]', "preference", 2, "expected an object"),
        (b'{"prompt": "a",', "preference", 2, "broken JSON at column"),
        (b'{"prompt": "\xff"}', "preference", 2, "not UTF-8"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, content, kind, line, says):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + content + b"\n")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:{line}: .*{says}|bad\.jsonl:{line}: {says}"):
        data.read_rows(path, kind)


@pytest.mark.parametrize("label", ['"yes"', "2", "-1", "0.5"])
def test_a_label_must_be_true_or_false(tmp_path, label):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "a", "completion": "b", "label": {label}}}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: field 'label' must be true or false"):
        data.read_rows(path, "unpaired")


def test_unusable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        data.read_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no rows"):
        data.read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress((GOOD + b"\n") * 50)[:-12])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.gz: damaged gzip data after line"):
        data.read_rows(tmp_path / "cut.jsonl.gz")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"rows\.csv: unknown file type"):
        data.read_rows(tmp_path / "rows.csv")


def test_an_id_beyond_the_vocabulary_names_the_row(smollm2):
    with pytest.raises(ValueError, match=r"rows:1: token id \d+ is out of range for vocab_size 10"):
        tokenize(smollm2, [ROW], vocab_size=10)
