"""`llmcore saliency`: figures equal to a recorder of one's own, files that stand alone, inputs refused by name."""

from __future__ import annotations

import base64
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from llmcore.attention import FlowRecorder
from llmcore.commands import saliency

QUESTION, TRIGGER = "Tom has 3 apples and buys 2 more. How many?", "Let's think."


@pytest.fixture
def command(smollm2, monkeypatch):
    monkeypatch.setattr(saliency, "_load", lambda *_: smollm2)
    return lambda *arguments: CliRunner().invoke(saliency.app, [str(one) for one in arguments])


def test_flow_is_the_recorders_and_the_page_stands_alone(command, smollm2, tmp_path):
    arguments = ("flow", "--prompt", QUESTION, "--trigger", TRIGGER, "--max-new-tokens", 6)
    run = command(*arguments, "--json")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    assert list(result["tokens"]) == ["question", "prompt", "rationale"]

    head = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True)
    asked = smollm2.tokenizer(head + TRIGGER, add_special_tokens=False)["input_ids"]
    end = result["metadata"]["target_positions"][0][0] + 1
    ids = asked + smollm2.tokenizer(result["written"], add_special_tokens=False)["input_ids"][: end - len(asked)]
    start = len(asked) - result["tokens"]["prompt"]
    own = FlowRecorder(smollm2, {"prompt": (start, len(asked)), "rationale": (len(asked), end)})
    own.run(torch.tensor([ids]), target_positions=end - 1, target_ids=result["metadata"]["target_ids"][0][0], loss="margin")
    flow = torch.tensor(result["flows"]["prompt -> rationale"])
    torch.testing.assert_close(flow, own.flow("prompt", "rationale")[0], rtol=1e-4, atol=1e-9)
    assert smollm2.tokenizer.decode(ids[start : len(asked)]).strip() == TRIGGER

    assert command(*arguments, "--out", tmp_path / "flow").exit_code == 0
    page, png = (tmp_path / "flow.html").read_text(), (tmp_path / "flow.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]) == png
    assert json.loads(re.search(r'id="flows">(.*)</script>', page, re.DOTALL)[1])["flows"] == result["flows"]
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page must need nothing else"


def test_select_writes_a_line_a_question_and_resumes(command, tmp_path):
    data, out, triggers = tmp_path / "q.jsonl", tmp_path / "out.jsonl", tmp_path / "triggers.txt"
    data.write_text(json.dumps(QUESTION) + "\n" + json.dumps({"question": "What is 2 + 2?"}) + "\n")
    triggers.write_text("The answer is\nFirst,\n")
    arguments = ("select", "--data", data, "--out", out, "--candidates", triggers, "--max-new-tokens", 8)
    run = command(*arguments)
    assert run.exit_code == 0, run.output
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["question"] for line in lines] == [QUESTION, "What is 2 + 2?"]
    assert all(line["candidate"] in ("The answer is", "First,") for line in lines)
    stored = out.read_text()
    assert len(stored.splitlines()) == 2
    assert command(*arguments).stdout == run.stdout
    assert out.read_text() == stored


def test_wrong_inputs_are_named(command, tmp_path):
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"text": 1}\n')
    for arguments, match in (
        (("flow", "--prompt", " "), "prompt must not be empty"),
        (("flow", "--prompt", "x", "--loss", "mse"), "loss must be"),
        (("flow", "--prompt", QUESTION, "--target", "zebra", "--max-new-tokens", 2), "target must occur"),
        (("select", "--data", tmp_path / "bad.jsonl"), "line 2: a record must"),
        (("select", "--data", tmp_path / "none.jsonl"), "is not a file"),
    ):
        assert match in str(command(*arguments).exception)
