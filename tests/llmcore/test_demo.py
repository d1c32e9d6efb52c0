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
from llmcore.demo import Context, alignment
from llmcore.demo.report import table


def test_the_rule_pairs_shortest_with_longest_and_drops_ties():
    assert alignment.label(["a b c d", "a", "a b c", "a b"]) == [("a", "a b c d"), ("a b", "a b c")]
    assert alignment.label(["x y", "z w"]) == []
    assert alignment.label(["", "one", "one two"]) == [("one", "one two")]  # an empty answer is no answer
    assert [n for n in range(8) if alignment.is_held_out(n)] == [3, 7]


def test_cells_are_escaped():
    assert "<script>" not in table(("a",), [("<script>alert(1)</script>",)])


def test_interrupted_and_finished(tmp_path, monkeypatch):
    from llmcore.methods import direct_alignment

    monkeypatch.setattr(alignment, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(alignment, "TEMPERATURE", 1.5)  # so that eight tokens differ in their number of words
    whole = direct_alignment.train

    def one_step(*args, **options):
        whole(*args, stop_after=1, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(direct_alignment, "train", one_step)
        with pytest.raises(KeyboardInterrupt):
            alignment.section(Context(tmp_path, lambda _: None, steps=2, prompts=4, progress=False))
    assert not (tmp_path / "report.html").exists()
    folder = tmp_path / "alignment"
    kept = {name: (folder / name).read_bytes() for name in ("samples.json", "training/metrics.jsonl")}
    assert len(kept["training/metrics.jsonl"].splitlines()) == 1

    run = CliRunner().invoke(command.app, ["--out", str(tmp_path), "--steps", "2", "--prompts", "4"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "keeping the samples" in run.output
    assert (folder / "samples.json").read_bytes() == kept["samples.json"]
    assert (folder / "training/metrics.jsonl").read_bytes().startswith(kept["training/metrics.jsonl"])
    numbers = json.loads((tmp_path / "report.json").read_text())["sections"]["alignment"]
    assert numbers["steps"] == len(numbers["history"]) == 2
    assert numbers["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == numbers["pairs"] > 0
    assert all(alignment.words(p["chosen"][0]["content"]) < alignment.words(p["rejected"][0]["content"]) for p in pairs)
    page = (tmp_path / "report.html").read_text()
    assert "no measure of quality" in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []  # nothing outside the file
    assert page.count("<img") == 1
