"""One HTML file that needs nothing beside it: style and pictures are inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmcore.demo import Section
from llmcore.files import write_bytes

_STYLE = """
:root{color-scheme:light}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1b1f24;background:#fff;max-width:62rem;margin:2.5rem auto;
padding:0 1.25rem}
h1{font-size:1.9rem;margin-bottom:.2rem}h1,h2,h3{line-height:1.25;letter-spacing:-.01em}
h2{margin-top:2.75rem;border-bottom:1px solid #d8dee4;padding-bottom:.35rem}h3{margin-top:2rem}
.sub,.caption{color:#57606a}.caption{font-size:.9rem;margin:.3rem 0 .8rem}
table{border-collapse:collapse;margin:.8rem 0 1.2rem;width:100%;font-size:.9rem}
th{font-weight:600;color:#57606a;border-bottom:2px solid #d8dee4}
th,td{text-align:left;vertical-align:top;padding:.4rem .7rem .4rem 0}td{border-bottom:1px solid #eaeef2}
table.answers{table-layout:fixed}table.answers th:first-child{width:24%}
td.yes::before{content:"\\2713\\00a0";color:#1a7f37;font-weight:700}td.no{color:#57606a}
img{max-width:100%;height:auto;display:block;margin:1rem 0 .2rem}
.note{background:#fff8e5;border-left:4px solid #d4a72c;padding:.7rem 1rem;border-radius:0 .3rem .3rem 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.8rem;margin:1.2rem 0}
.card{border:1px solid #d8dee4;border-radius:.5rem;padding:.7rem .9rem}
.card b{display:block;font-size:1.35rem;font-weight:650;font-variant-numeric:tabular-nums;white-space:nowrap}
.card span{color:#57606a;font-size:.87rem;line-height:1.35;display:block;margin-top:.15rem}
code{background:#f3f4f6;padding:.1rem .3rem}
"""


def picture(figure: Any, alt: str) -> str:
    """A matplotlib figure as an <img> whose PNG is inside the address; the figure is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


class Marked(NamedTuple):
    """A cell with a verdict: a tick when `kept`."""

    text: str
    kept: bool


def _cell(cell: Any) -> str:
    if isinstance(cell, Marked):
        return f'<td class="{"yes" if cell.kept else "no"}">{html.escape(cell.text)}</td>'
    return f"<td>{html.escape(str(cell))}</td>"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, classes: str = "") -> str:
    """An HTML table; every cell is escaped."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
    head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    opening = f'<table class="{classes}">' if classes else "<table>"
    return f"{opening}{head}<tbody>{body}</tbody></table>"


def cards(figures: Sequence[tuple[str, str]]) -> str:
    """The few numbers to see first, each with what it is."""
    inner = "".join(f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>' for value, what in figures)
    return f'<div class="cards">{inner}</div>'


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
        f"<title>llmcore demo</title><style>{_STYLE}</style></head><body><h1>llmcore demo</h1>\n"
        '<p class="sub">What the library does, run on the embedded model; nothing on this page was prepared.</p>\n'
        + "\n".join(parts)
        + "</body></html>\n"
    )
    write_bytes(path, page.encode())
