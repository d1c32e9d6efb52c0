"""Torch imported without what only tracing needs: left out at first, and complete as ever once it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from llmcore.commands import startup

_FORMULAS = "len(torch._C._dispatch_get_registrations_for_dispatch_key('Meta'))"


def _run(code: str) -> list[str]:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.mark.skipif(torch.__version__.rsplit(".", 1)[0] not in startup._VERSIONS, reason="this version of torch is imported whole, always")
def test_formulas_for_tracing_come_when_asked_for():
    (whole,) = _run(f"import torch; print({_FORMULAS})")
    before, stood_in, after, compiled = _run(
        "import gc, sys\nfrom llmcore.commands.startup import import_torch\nimport_torch(traces=False)\nimport torch\n"
        f"print({_FORMULAS})\nprint('torch._decomp' in sys.modules or 'torch._meta_registrations' in sys.modules or not gc.isenabled())\n"
        f"import_torch(traces=True)\nprint({_FORMULAS})\ntorch.Generator().manual_seed(0)\n"
        "f = torch.compile(lambda x: torch.fft.fft(x).abs().cumsum(0), backend='aot_eager', fullgraph=True)\n"
        "print(bool(torch.equal(f(torch.arange(3.0)), torch.fft.fft(torch.arange(3.0)).abs().cumsum(0))))"
    )
    assert int(before) < int(whole)
    assert stood_in == "False"
    assert after == whole
    assert compiled == "True"
