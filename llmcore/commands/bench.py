"""`llmcore bench`: the short form of a checkout's benches, each beside its peers in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import typer

import llmcore

app = typer.Typer(add_completion=False)


def benches() -> dict[str, Path]:
    """Bench name -> file, of the checkout that llmcore is imported from. Raises FileNotFoundError where there is none."""
    folder = Path(llmcore.__file__).resolve().parent.parent / "bench"
    found = {path.stem.removeprefix("bench_").replace("_", "-"): path for path in sorted(folder.glob("bench_*.py"))}
    if not found:
        raise FileNotFoundError(f"no benches beside the package (looked in {folder}): they are part of the repository, not of the "
                                "installed package; clone it and install with `pip install --no-build-isolation -e .`")
    return found


@app.command()
def bench(
    family: str = typer.Argument(None, help="which bench; all of them when left out"),
    list_only: bool = typer.Option(False, "--list", help="print the names and end"),
) -> None:
    """Run benches in their short form (about a minute each) and print their tables, peers side by side.

    Each bench file's first lines say how its full result is made and saved.

    Example: llmcore bench saliency-flow
    """
    known = benches()
    if list_only:
        print("\n".join(known))
        return
    name = family.replace("_", "-") if family else None
    if name is not None and name not in known:
        raise ValueError(f"family must be one of {', '.join(known)}, got {family!r}")
    files = [known[name]] if name else list(known.values())
    raise typer.Exit(subprocess.call([sys.executable, "-m", "pytest", "-q", "-s", *map(str, files)], cwd=files[0].parent.parent))
