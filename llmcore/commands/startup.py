"""Torch for a command that reads and computes: imported without a garbage collector at work, and without what only tracing needs."""

from __future__ import annotations

import gc
import importlib
import sys
import types
from importlib import metadata

_TRACING = "torch._meta_registrations"
# torch/__init__.py of these imports _TRACING last, for its side effects alone (read in their sources, and run).
_VERSIONS = ("2.13",)


def import_torch(*, traces: bool) -> None:
    """Import torch; unless the command traces, without the formulas that work on shapes alone: 0.5 s and 20 MB of every start.

    The formulas are torch._meta_registrations with torch._decomp, _refs and _prims. An empty module stands in for the first while torch is
    imported and is taken away again. A process that has torch so can compute, but neither torch.compile nor torch.export, nor make a
    torch.Generator (which torch._prims completes), before import_torch(traces=True) imports the rest, in the order that torch has.
    Versions of torch for which this was not seen to hold are imported whole.
    """
    if "torch" not in sys.modules:
        try:
            version = metadata.version("torch")
        except metadata.PackageNotFoundError:  # built in place; or not there, as the import below will say
            version = ""
        stands_in = not traces and version.rsplit(".", 1)[0] in _VERSIONS
        if stands_in:
            sys.modules[_TRACING] = types.ModuleType(_TRACING)
        gc.disable()  # imports are a million objects and no garbage, to be looked at by no later collection either
        try:
            import torch

            gc.freeze()
            if stands_in:
                vars(torch).pop(_TRACING.removeprefix("torch."), None)
        finally:
            gc.enable()
            if stands_in:
                del sys.modules[_TRACING]
    if traces:
        importlib.import_module(_TRACING)
