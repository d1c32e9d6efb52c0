"""`llmcore saliency`: how the answer's gradient flowed through attention, as a picture; the best trigger sentence for each question."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Saliency flow through attention: pictures, prompt selection.")

MODEL = typer.Option("smollm2", help="directory, hub id, .gguf file or 'smollm2'")
DEVICE = typer.Option(None, help="cpu, cuda, …; default: the GPU when there is one")
DTYPE = typer.Option(None, help="float32, bfloat16, …; default: the checkpoint's")
DRAWN = ("question", "prompt", "rationale")


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    import torch

    from llmcore.models import load_model

    return load_model(model, device=device, dtype=getattr(torch, dtype) if dtype else None)


def measure(model: Any, question: str, trigger: str = "", *, loss: str = "margin", max_new_tokens: int = 32, target: str = "last") -> dict:
    """Flows (layers, heads) between question, trigger and rationale, of one greedily written answer.

    target: "last", the last token written, or a text, whose last occurrence in what was written is explained (its first token).
    Returns: text, tokens, target, loss, metadata and flows, a mapping "question -> rationale" (read -> reader) -> layers x heads.
    """
    import torch

    from llmcore.attention import FlowRecorder, token_segments
    from llmcore.generation import Sampling, complete

    if not question.strip():
        raise ValueError("prompt must not be empty")
    tokenizer = model.tokenizer
    question, trigger = question.strip(), trigger.strip()
    head = question + "\n"
    if getattr(tokenizer, "chat_template", None):
        head = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    start = head.rfind(question)
    if start < 0:
        raise ValueError("the chat template changed the prompt's text, so its tokens cannot be found")
    asked = tokenizer(head + trigger, add_special_tokens=False, return_offsets_mapping=True)
    before = list(asked["input_ids"])
    spans = {"question": (start, start + len(question))}
    if trigger:
        spans["prompt"] = (len(head), len(head) + len(trigger))
    segments = token_segments([tuple(pair) for pair in asked["offset_mapping"]], spans)
    completion = complete(model, [before], Sampling(temperature=0.0, max_new_tokens=max_new_tokens))[0]
    written = [int(token) for token in completion.token_ids if int(token) not in model.stop_ids]
    if not written:
        raise ValueError("the model wrote nothing behind this prompt, so there is no answer to explain; add --trigger or change the prompt")
    index = len(written) - 1
    if target != "last":
        # Prefixes are decoded rather than the text encoded again: tokens merge differently across borders.
        lengths = [len(tokenizer.decode(written[: i + 1])) for i in range(len(written))]
        at = tokenizer.decode(written).rfind(target)
        if not target or at < 0:
            raise ValueError(f"target must occur in what the model wrote, {tokenizer.decode(written)!r}, got {target!r}")
        index = next(i for i, length in enumerate(lengths) if length > at)
    ids = before + written[:index]
    if index > 0:
        segments["rationale"] = [(len(before), len(ids))]
    names = [name for name in DRAWN if segments.get(name)]
    pairs = [(source, reader) for i, source in enumerate(names) for reader in names[i:]]
    recorder = FlowRecorder(model, {name: segments[name] for name in names}, pairs=pairs)
    recorder.run(torch.tensor([ids], device=model.device), target_positions=len(ids) - 1, target_ids=written[index], loss=loss)
    assert recorder.loss is not None
    assert recorder.one_minus_p is not None
    return {
        "text": tokenizer.decode(before + written), "written": tokenizer.decode(written), "target": tokenizer.decode([written[index]]),
        "tokens": {name: sum(b - a for a, b in segments[name]) for name in names},
        "loss": float(recorder.loss[0]), "p_target": 1 - float(recorder.one_minus_p[0]),
        "flows": {f"{source} -> {reader}": recorder.flow(source, reader)[0].tolist() for source, reader in pairs},
        "metadata": recorder.metadata,
    }  # fmt: skip


def draw(result: dict[str, Any]) -> bytes:
    """PNG: a segment diagram (arrows from what is read to its reader) above one layers x heads heat map for each flow."""
    import math

    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    flows = {name: numpy.asarray(values) for name, values in result["flows"].items()}
    means = {name: float(values.mean()) for name, values in flows.items()}
    top = max(means.values()) or 1.0
    columns = min(3, len(flows))
    lines = math.ceil(len(flows) / columns)
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.0 + 4.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[2.6] + [4.2] * lines)

    diagram = figure.add_subplot(grid[0, :])
    diagram.set_xlim(-0.6, len(result["tokens"]) - 0.4)
    diagram.set_ylim(-0.6, 1.5)
    diagram.axis("off")
    diagram.set_title(f"mean |A · dL/dA|, loss {result['metadata']['loss']}, target {result['target']!r}, p = {result['p_target']:.3f}")
    place = {name: x for x, name in enumerate(result["tokens"])}
    for name, x in place.items():
        diagram.text(
            x, 0, f"{name}\n{result['tokens'][name]} tokens", ha="center", va="center", bbox={"boxstyle": "round,pad=0.5", "fc": "#e8eef7"}
        )
    for name, mean in means.items():
        source, reader = name.split(" -> ")
        width = 0.5 + 5.5 * mean / top
        if source == reader:
            diagram.text(place[source], -0.45, f"within itself {mean:.1e}", ha="center", va="center", fontsize=8, color="#555555")
            continue
        distance = place[reader] - place[source]
        bend = -0.35 if distance == 1 else -0.3
        diagram.annotate(
            "", (place[reader] - 0.05, 0.22), (place[source] + 0.05, 0.22),
            arrowprops={"arrowstyle": "-|>", "lw": width, "color": "#b5432a", "alpha": 0.8, "connectionstyle": f"arc3,rad={bend}"},
        )  # fmt: skip
        diagram.text(
            (place[reader] + place[source]) / 2, 0.4 if distance == 1 else 1.0, f"{mean:.1e}", ha="center", va="center", fontsize=9,
            bbox={"fc": "white", "ec": "none", "pad": 1.0},
        )  # fmt: skip
    for index, (name, values) in enumerate(flows.items()):
        axes = figure.add_subplot(grid[1 + index // columns, index % columns])
        image = axes.imshow(values, aspect="auto", cmap="magma", vmin=0.0)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, format="%.1e")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def page(result: dict[str, Any], png: bytes) -> str:
    """One HTML file that needs nothing else: text, picture, the figures as JSON."""
    shown = json.dumps(result).replace("</", "<\\/")
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{sum(map(sum, v)) / sum(map(len, v)):.3e}</td></tr>" for name, v in result["flows"].items()
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>Saliency flow</title>'
        "<style>body{font:15px sans-serif;max-width:70em;margin:2em auto}pre{white-space:pre-wrap;background:#f4f4f4;padding:1em}"
        "img{max-width:100%}td{padding:.1em 1em}</style>"
        f"<h1>Saliency flow</h1><pre>{html.escape(result['text'])}</pre>"
        f"<p>Target {html.escape(repr(result['target']))}, loss {html.escape(result['metadata']['loss'])} = {result['loss']:.4f}, "
        f"p = {result['p_target']:.4f}. Read &rarr; reader, mean over pairs, layers and heads:</p><table>{rows}</table>"
        f'<img alt="segment diagram and heat maps" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f'<script type="application/json" id="flows">{shown}</script>'
    )


@app.command()
def flow(
    prompt: str = typer.Option(..., help="the question"),
    trigger: str = typer.Option("", help="sentence that opens the answer, a segment of its own"),
    target: str = typer.Option("last", help="'last' token written, or a text that the model writes"),
    loss: str = typer.Option("margin", help="margin, ce (fades as the model gets sure) or logit"),
    out: Path = typer.Option(Path("flow"), help="writes OUT.png and OUT.html"),
    as_json: bool = typer.Option(False, "--json", help="print the figures as JSON and draw nothing"),
    max_new_tokens: int = typer.Option(32, min=1),
    model: str = MODEL,
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Flow between question, trigger and rationale: heat maps of layers x heads and a segment diagram."""
    if loss not in ("margin", "ce", "logit"):
        raise ValueError(f"loss must be margin, ce or logit, got {loss!r}")
    result = measure(_load(model, device, dtype), prompt, trigger, loss=loss, max_new_tokens=max_new_tokens, target=target)
    if as_json:
        typer.echo(json.dumps(result))
        return
    png = draw(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".png", png), (".html", page(result, png).encode())):
        path = out.with_name(out.name + suffix)
        path.write_bytes(content)
        typer.echo(f"written: {path}")


def read_questions(path: Path) -> list[str]:
    """Questions of a JSONL file: strings, or objects with "question" or "prompt"."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; name a JSONL file of questions")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        found = value if isinstance(value, str) else (value.get("question") or value.get("prompt")) if isinstance(value, dict) else None
        if not isinstance(found, str):
            raise ValueError(f'{path}, line {number}: a record must be a string or have "question" or "prompt", got {line[:80]!r}')
        questions.append(found)
    return questions


@app.command()
def select(
    data: Path = typer.Option(..., help='JSONL file: strings, or objects with "question" or "prompt"'),
    out: Path = typer.Option(None, help="JSONL file of results; finished questions are not run again"),
    strategy: str = typer.Option("mv", help="mv: vote of the k best; ss: the first above --threshold"),
    k: int = typer.Option(3, min=1),
    threshold: float = typer.Option(None, help="of ss; depends on model, data and loss"),
    loss: str = typer.Option("ce", help="ce, margin or logit"),
    answer: str = typer.Option("number", help="number, option or yesno"),
    candidates: Path = typer.Option(None, help="text file, one trigger a line; default: nine built-in ones"),
    max_new_tokens: int = typer.Option(512, min=1),
    model: str = MODEL,
    device: str = DEVICE,
    dtype: str = DTYPE,
) -> None:
    """Instance-adaptive prompting: the trigger sentence and answer for every question, one JSON line each."""
    from llmcore.methods.instance_adaptive import CANDIDATES, IAPConfig, IAPResult, InstanceAdaptivePrompting

    questions = read_questions(data)
    chosen = CANDIDATES
    if candidates is not None:
        chosen = tuple(line.strip() for line in candidates.read_text(encoding="utf-8").splitlines() if line.strip())
    config = IAPConfig(
        candidates=chosen, strategy=strategy, k=k, threshold=threshold, loss=loss, answer=answer, max_new_tokens=max_new_tokens
    )
    iap = InstanceAdaptivePrompting(_load(model, device, dtype), config=config)
    failed = 0
    for question in questions:
        result = iap.answer_many([question], out)[0]
        if isinstance(result, IAPResult):
            scored = result.per_candidate[result.chosen]
            line = {
                "question": question, "answer": result.answer, "candidate": scored.candidate, "score": scored.score, "reason": result.reason
            }  # fmt: skip
        else:
            failed += 1
            line = dict(result)
        typer.echo(json.dumps(line))
    if failed:
        raise typer.Exit(1)
