"""`llmcore huref`: say where a checkpoint comes from, without loading it.

Exit codes: 0 same base (or done), 1 related, 2 no evidence, 3 error.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from llmcore.commands.startup import import_torch

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
index_app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="A folder of fingerprints: add checkpoints, ask for likely ancestors."
)
app.add_typer(index_app, name="index")

_EXIT = {"same base": 0, "related": 1, "no evidence": 2}
_JSON = typer.Option(False, "--json", help="machine-readable output")
_TOKENS = typer.Option(None, "--tokens", help="token list: JSON, or one id a line with the most frequent first")
_MEMORY = typer.Option(None, "--max-memory", help="budget for blocks and factors, such as 2G or 500M")


def _guarded(*, traces: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Errors of the inputs end with status 3 and one line; 1 and 2 are verdicts here. traces: it runs models, which needs all of torch."""

    def guard(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            import_torch(traces=traces)
            from llmcore.methods.huref.opening import give_back_blocks

            gc.set_threshold(200_000, 20, 20)  # vocabularies are no garbage
            give_back_blocks()
            try:
                function(*args, **kwargs)
            except typer.Exit:
                raise
            except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:
                print(f"error: {error}", file=sys.stderr)
                raise typer.Exit(3) from None

        return run

    return guard


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = (text[:-1], units.get(text[-1].upper())) if text[-1:].isalpha() else (text, 0)
    try:
        if unit is None:
            raise ValueError
        return int(float(number) * 2**unit)
    except ValueError:
        raise ValueError(f"--max-memory must be a number of bytes with an optional K, M, G or T, got {text!r}") from None


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.5f}"


@app.command()
@_guarded()
def compare(
    paths: list[str] = typer.Argument(..., metavar="A B [...]", help="checkpoints: directories, files, stored fingerprints"),
    k: int = typer.Option(512, "--tokens-used", "-K", help="number of tokens; published scores use 4096"),
    quick: bool = typer.Option(False, "--quick", help="256 tokens"),
    tokens: Path | None = _TOKENS,
    gqa: str = typer.Option("interleave", help="interleave, or tile for published numbers"),
    compat: str | None = typer.Option(None, help="published: the splits of fused tensors of the published code"),
    pcs: bool = typer.Option(False, "--pcs", help="read everything for the parameter cosine too"),
    match_layers: bool = typer.Option(False, "--match-layers", help="find corresponding layers first (pruned or extended copies)"),
    base: str | None = typer.Option(None, help="base model of an adapter directory given as B"),
    picture: Path | None = typer.Option(None, help="write a heat map of all pairs (PNG)"),
    max_memory: str | None = _MEMORY,
    as_json: bool = _JSON,
) -> None:
    """Compare two checkpoints, or all pairs of several.

    Examples: llmcore huref compare base/ suspect/        llmcore huref compare a/ b/ c.gguf --picture map.png
    """
    from llmcore.methods import huref

    k = 256 if quick else k
    chosen = str(tokens) if tokens is not None else None
    if len(paths) < 2:
        raise ValueError(f"two checkpoints or more are needed, got {len(paths)}")
    if len(paths) > 2 or picture is not None:
        matrix = huref.compare_many(paths, K=k, tokens=chosen, gqa=gqa, max_memory=_bytes(max_memory) or 2 << 30)
        if picture is not None:
            matrix.picture(picture)
        if as_json:
            print(json.dumps(matrix.to_json()))
            return
        _print_matrix(matrix)
        if matrix.errors:
            raise typer.Exit(3)
        return
    sides = [huref.load(p) if p.endswith(".huref.safetensors") else p for p in paths]
    found = huref.compare(
        sides[0],
        sides[1],
        K=k,
        tokens=chosen,
        gqa=gqa,
        compat=compat,
        pcs=pcs,
        match_layers=match_layers,
        base_b=base,
        max_memory=_bytes(max_memory),
    )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _print_comparison(found)
    raise typer.Exit(_EXIT[found.verdict])


def _print_comparison(found: Any) -> None:
    print(
        f"{found.verdict}: ICS {_number(found.ics)} (paper), {_number(found.ics_hardened)} (hardened), z {found.null_z:.1f} "
        f"against permuted tokens ({found.null_mean:+.4f} ± {found.null_std:.4f})"
    )
    if found.pcs is not None:
        print(f"parameter cosine {found.pcs:.5f}, {len(found.skipped)} tensors skipped")
        for name, elements, reason in found.skipped[:20]:
            print(f"  skipped {name} ({elements} numbers): {reason}")
    by_layer: dict[tuple[int, int], dict[str, float]] = {}
    for score in found.per_channel:
        by_layer.setdefault((score.layer_a, score.layer_b), {})[score.name] = score.correlation
    names = list(dict.fromkeys(score.name for score in found.per_channel))
    print(f"{'layers':<10}" + "".join(f"{name:>10}" for name in names))
    for (a, b), values in by_layer.items():
        print(f"{f'{a} / {b}':<10}" + "".join(f"{_number(values.get(name)):>10}" for name in names))
    overlap = found.token_overlap
    print(
        f"{found.num_tokens} tokens ({overlap['common']} common, {overlap['dropped_a']} and {overlap['dropped_b']} without counterpart); "
        f"read {_size(found.bytes_read)} in {found.seconds:.2f} s"
    )
    for note in found.notes:
        print(f"note: {note}")


def _print_matrix(matrix: Any) -> None:
    names = [Path(p).name[-24:] for p in matrix.paths]
    for i, name in enumerate(names):
        print(f"[{i}] {name}" + (f"   failed: {matrix.errors[matrix.paths[i]]}" if matrix.paths[i] in matrix.errors else ""))
    for title, scores in (("paper", matrix.scores), ("hardened", matrix.scores_hardened)):
        print(f"{title:<9}" + "".join(f"{f'[{j}]':>9}" for j in range(len(names))))
        for i, row in enumerate(scores):
            print(f"{f'[{i}]':<9}" + "".join(f"{_number(v):>9}" for v in row))
    print(f"{matrix.num_tokens} common tokens; read {_size(matrix.bytes_read)} in {matrix.seconds:.2f} s")


@app.command()
@_guarded()
def fingerprint(
    path: str,
    out: Path = typer.Option(..., "--out", "-o", help="file to write, NAME.huref.safetensors"),
    k: int = typer.Option(4096, "--tokens-used", "-K"),
    tokens: Path | None = _TOKENS,
    base: str | None = typer.Option(None, help="base model of an adapter directory"),
    max_memory: str | None = _MEMORY,
    as_json: bool = _JSON,
) -> None:
    """Write a compact fingerprint of one checkpoint.

    Example: llmcore huref fingerprint model/ -o model.huref.safetensors
    """
    from llmcore.methods import huref

    found = huref.fingerprint(path, K=k, tokens=str(tokens) if tokens else None, base=base, max_memory=_bytes(max_memory))
    found.save(out)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print(
            f"{out}: {len(found.channels)} channels, {found.header['num_tokens']} tokens, read {_size(found.header['bytes_read'])} "
            f"in {found.header['seconds']:.2f} s"
        )


@index_app.command("add")
@_guarded()
def index_add(
    folder: Path,
    paths: list[Path] = typer.Argument(..., help="checkpoints, or directories that hold several"),
    k: int = typer.Option(512, "--tokens-used", "-K"),
    as_json: bool = _JSON,
) -> None:
    """Add checkpoints; those already there are passed over, so an interrupted run is resumed by running it again.

    Example: llmcore huref index add zoo-index/ models/
    """
    from llmcore.methods import huref
    from llmcore.methods.huref.index import find_checkpoints

    index = huref.Index(folder, K=k)
    wanted = [p for path in paths for p in (find_checkpoints(path) if path.is_dir() and not (path / "config.json").exists() else [path])]
    found = index.add_many(wanted, progress=None if as_json else lambda name: print(f"adding {name}", flush=True))
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print(f"{len(found.added)} added, {len(found.present)} already there, {len(found.failed)} failed; {len(index)} in the index")
        for name, reason in found.failed.items():
            print(f"failed {name}: {reason}")
    if found.failed:
        raise typer.Exit(3)


@index_app.command("query")
@_guarded()
def index_query(folder: Path, path: str, top: int = typer.Option(10, help="how many to show"), as_json: bool = _JSON) -> None:
    """The models of an index most like a checkpoint.

    Example: llmcore huref index query zoo-index/ suspect/
    """
    from llmcore.methods import huref

    index = huref.Index(folder)
    found = index.query(huref.load(path) if path.endswith(".huref.safetensors") else path, top=top)
    if as_json:
        print(json.dumps([m.to_json() for m in found]))
    else:
        for match in found:
            print(
                f"{match.score:8.4f}  paper {_number(match.ics)}  hardened {_number(match.ics_hardened)}  {match.verdict:<12} {match.model}"
            )
    raise typer.Exit(_EXIT[found[0].verdict])


@app.command()
@_guarded()
def plan(
    path: str,
    b: str | None = typer.Argument(None, help="second checkpoint, for a comparison"),
    k: int = typer.Option(512, "--tokens-used", "-K"),
    max_memory: str | None = _MEMORY,
    as_json: bool = _JSON,
) -> None:
    """What a fingerprint or a comparison will read, compute and hold; headers are read, nothing else.

    Example: llmcore huref plan model/ -K 4096 --max-memory 2G
    """
    from llmcore.methods import huref

    found = huref.plan(path, b, K=k, max_memory=_bytes(max_memory))
    if as_json:
        print(json.dumps(found.to_json()))
        return
    print(f"{found.path}: {found.model_type}, layers {found.layers}, K = {found.num_tokens}, terms {', '.join(found.terms)}")
    print(f"reads {_size(found.read_bytes)} of {_size(found.total_bytes)} ({100 * found.read_bytes / max(1, found.total_bytes):.2g} %)")
    print(f"computes {found.chain_flops / 1e9:.4g} GFLOP for the factors, {found.sum_flops / 1e9:.4g} GFLOP for the sums")
    print(f"holds at most {_size(found.peak_bytes)}" + (f"; K up to {found.largest_tokens} fits" if max_memory else ""))
    for name, channel in found.channels.items():
        print(f"{name}: {channel.reason}")


@app.command()
@_guarded(traces=True)
def attack(
    path: str,
    out: Path,
    attacks: list[str] = typer.Argument(..., help="names of rewrites, applied in order"),
    seed: int = typer.Option(0),
    as_json: bool = _JSON,
) -> None:
    """Write a disguised copy of a checkpoint that computes the same function, to test this and other tools.

    Example: llmcore huref attack model/ copy/ residual_permutation rotation --seed 7
    """
    from llmcore.methods.huref import attacks as rewrites

    report = rewrites.apply(path, out, attacks, seed=seed)
    print(json.dumps(report.to_json()) if as_json else f"{report.path}: {', '.join(report.attacks)} (seed {report.seed})")
