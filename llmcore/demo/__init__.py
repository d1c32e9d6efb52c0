"""The demonstration: every method it shows is one section, run for real on the embedded model and written into one report.

A section is a module with `section(context) -> Section`. Its name in SECTIONS is its place in the report. A section keeps what it needs
to go on after an interruption in a folder of its own under `context.out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECTIONS = ("alignment",)  # modules of llmcore.demo, in the order of the report


@dataclass
class Section:
    """One part of the report: a heading, HTML below it, and the same numbers for machines."""

    title: str
    html: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a section is given: the output folder, how much to do, and a way to tell the person what is happening."""

    out: Path
    say: Callable[[str], None]
    steps: int = 30
    prompts: int | None = None  # use only the first prompts; None = all
    progress: bool = True
