"""The demonstration in miniature: the rule, a run interrupted after one step and finished by the command, and the report that it writes."""

from __future__ import annotations

import json
import math
import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from typer.testing import CliRunner

from llmcore.commands import demo as command
from llmcore.demo import Context, alignment, prompts
from llmcore.demo.report import Marked, cards, table


def answer(text: str, ended: bool = True) -> alignment.Answer:
    return alignment.Answer(text, ended)


def test_the_rule_is_one_whole_sentence():
    for text in ("Bees make honey.", "Is it blue?", " Paris, of course! "):
        assert alignment.keeps_the_rule(answer(text)), text
        assert not alignment.keeps_the_rule(answer(text, ended=False)), text
    for text in ("Paris", "Paris.", "It is blue. It is not green.", "A list:\n1 one.", "No end", "What?! Yes.", ""):
        assert not alignment.keeps_the_rule(answer(text)), text


def test_pairs_join_answers_that_keep_the_rule_with_answers_that_break_it():
    good, other, cut, two = answer("It is blue."), answer("It is so."), answer("It is", ended=False), answer("Blue. Very.")
    assert alignment.label([good, cut, other, two, good]) == [(good.text, cut.text), (other.text, two.text)]
    assert alignment.label([good, other]) == []
    assert alignment.label([cut, answer("")]) == []  # an empty answer is no answer
    assert alignment.share([good, cut]) == 0.5
    assert [n for n in range(8) if prompts.is_held_out(n)] == [3, 7]
    assert len(set(prompts.PROMPTS)) == len(prompts.PROMPTS)


def test_cells_are_escaped():
    attack = "<script>alert(1)</script>"
    for page in (table(("a",), [(attack,)]), table((attack,), [(Marked(attack, True),)]), cards([(attack, attack)])):
        assert "<script>" not in page


def test_interrupted_and_finished(tmp_path, monkeypatch):
    from llmcore.methods import direct_alignment

    monkeypatch.setattr(alignment, "MAX_NEW_TOKENS", 12)
    whole = direct_alignment.train

    def one_step(*args, **options):
        whole(*args, stop_after=1, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(direct_alignment, "train", one_step)
        with pytest.raises(KeyboardInterrupt):
            alignment.section(Context(tmp_path, lambda _: None, steps=2, prompts=8, progress=False))
    assert not (tmp_path / "report.html").exists()
    folder = tmp_path / "alignment"
    kept = {name: (folder / name).read_bytes() for name in ("samples.json", "training/metrics.jsonl")}
    assert len(kept["training/metrics.jsonl"].splitlines()) == 1

    run = CliRunner().invoke(command.app, ["--out", str(tmp_path), "--steps", "2", "--prompts", "8"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "keeping the samples" in run.output
    assert (folder / "samples.json").read_bytes() == kept["samples.json"]
    assert (folder / "training/metrics.jsonl").read_bytes().startswith(kept["training/metrics.jsonl"])
    numbers = json.loads((tmp_path / "report.json").read_text())["sections"]["alignment"]
    assert numbers["steps"] == len(numbers["history"]) == 2
    assert numbers["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == numbers["pairs"] > 0
    assert all(alignment.keeps_the_rule(answer(p["chosen"][0]["content"])) for p in pairs)
    assert all(p["prompt"][0]["content"] in prompts.PROMPTS for p in pairs)  # the plain question, without the request
    page = (tmp_path / "report.html").read_text()
    assert "not at truth" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []  # nothing outside the file
    assert page.count("<img") == 1
