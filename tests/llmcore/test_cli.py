"""The command line: every listed command answers --help, wrong input ends with code 2 and one line, doctor is machine-readable."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import typer.testing

from llmcore.cli import COMMANDS


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


def test_doctor_is_machine_readable():
    report = json.loads(_run("doctor", "--json").stdout)
    assert report["versions"]["torch"]
    assert "reference" in report["backends"]["linear_logprob"]
