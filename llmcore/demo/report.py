"""One HTML file that needs nothing beside it: style and pictures are inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcore.demo import Section
from llmcore.files import write_bytes

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1,h2,h3{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid #d0d7de;padding-bottom:.3rem}
table{border-collapse:collapse;margin:1rem 0;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid #d0d7de}
img{max-width:100%;height:auto}.note{background:#fff8e5;border-left:4px solid #d4a72c;padding:.6rem 1rem}
code{background:#f3f4f6;padding:.1rem .3rem}
"""


def picture(figure: Any, alt: str) -> str:
    """A matplotlib figure as an <img> whose PNG is inside the address; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; every cell is escaped."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def write_report(path: Path, sections: Sequence[Section], *, machine: Mapping[str, Any]) -> None:
    """Write the page atomically. `machine` (what ran where) becomes the last part: plain values, and mappings as tables."""
    parts = [f"<h2>{html.escape(section.title)}</h2>\n{section.html}" for section in sections]
    plain = [(name, value) for name, value in machine.items() if not isinstance(value, Mapping)]
    parts.append("<h2>What this ran on</h2>" + table(("", ""), plain))
    for name, value in machine.items():
        if not isinstance(value, Mapping):
            continue
        nested = any(isinstance(entry, Mapping) for entry in value.values())
        rows = [(k, inner, state) for k, entry in value.items() for inner, state in entry.items()] if nested else list(value.items())
        parts.append(f"<h3>{html.escape(name)}</h3>" + table(("family", "backend", "here") if nested else ("", ""), rows))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>llmcore demo</title><style>{_STYLE}</style></head><body><h1>llmcore demo</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )
    write_bytes(path, page.encode())
