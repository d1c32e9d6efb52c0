"""Which implementation serves a kernel call, and why not another.

A kernel family declares its backends once (`declare`); each public function asks `choose` with the device of its tensors and
the reasons, if any, why a backend cannot serve this particular call. `"auto"` takes the first that can; a backend asked for by name
(argument or LLMCORE_BACKEND) that cannot serve raises and says why: nothing falls back silently. `report()` shows the whole picture.

    reference  plain differentiable PyTorch, any device and float dtype        torch   chunked PyTorch, bounded memory
    cpp        compiled CPU operators (llmcore._C)                             triton  GPU, or CPU tensors with TRITON_INTERPRET=1
    cuda       compiled CUDA operators (llmcore._C)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType

import torch

BACKENDS = ("cpp", "cuda", "triton", "torch", "reference")
PREFERENCE = {"cpu": ("cpp", "torch", "reference"), "cuda": ("cuda", "triton", "torch", "reference")}

_families: dict[str, dict[str, str | None]] = {}  # family -> backend -> operator name that shows it is compiled (None: Python only)


@functools.cache
def _load(module: str) -> tuple[ModuleType | None, str | None]:
    """Import a compiled module after torch, keeping the reason when it is not there."""
    try:
        return importlib.import_module(f"llmcore.{module}"), None
    except ImportError as error:
        return None, f"llmcore.{module} is not built ({error}); run `pip install --no-build-isolation -e .` with a C++ compiler"


def extension_error() -> str | None:
    """Why the compiled operators are missing, or None when they are loaded."""
    return _load("_C")[1]


def native() -> ModuleType:
    """The compiled non-tensor module `llmcore._native`. Raises RuntimeError, saying why, when it is not built."""
    module, error = _load("_native")
    if module is None:
        raise RuntimeError(error)
    return module


def native_error() -> str | None:
    """Why `llmcore._native` is missing, or None when it is loaded."""
    return _load("_native")[1]


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def declare(family: str, **operators: str | None) -> None:
    """Declare the backends of a kernel family: name -> compiled operator ("llmcore::…") that serves it, or None for Python code.

    `reference` is always declared. Example: declare("linear_logprob", torch=None, cpp="llmcore::linear_logprob_fwd", triton=None)
    """
    unknown = set(operators) - set(BACKENDS)
    if unknown:
        raise ValueError(f"backend names must be among {BACKENDS}, got {sorted(unknown)}")
    _families[family] = {**operators, "reference": None}


def _compiled(operator: str, key: str) -> bool:
    """Whether the loaded extension defines `operator` (an older build may not know it) and implements it for the dispatch key."""
    namespace, name = operator.split("::")
    return hasattr(getattr(torch.ops, namespace), name) and torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def unavailable(family: str, backend: str, device_type: str) -> str | None:
    """Why `backend` of `family` cannot serve tensors on `device_type`, or None when it can."""
    operators = _families[family]
    if backend not in operators:
        return f"{family} has no {backend} implementation"
    if backend in ("cpp", "cuda"):
        wanted = "cpu" if backend == "cpp" else "cuda"
        if device_type != wanted:
            return f"{backend} serves {wanted} tensors, got {device_type}"
        if extension_error() is not None:
            return extension_error()
        operator = operators[backend]
        if operator is not None and not _compiled(operator, wanted.upper()):
            return f"llmcore._C was built without {operator} for {wanted}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed; run `pip install triton`"
        if device_type == "cpu" and not interpreting():
            return "triton serves CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None


def choose(family: str, backend: str, device: torch.device, refused: Mapping[str, str] | None = None) -> str:
    """The backend that serves this call.

    Args:
        family: a declared kernel family.
        backend: "auto" or a backend's name; LLMCORE_BACKEND replaces "auto" for the whole process.
        device: device of the call's tensors.
        refused: backend -> why it cannot serve this call (an unsupported dtype or option).

    Raises:
        ValueError: unknown backend name. RuntimeError: the backend asked for cannot serve the call.
    """
    refused = refused or {}
    if backend == "auto":
        backend = os.environ.get("LLMCORE_BACKEND", "auto")
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {backend!r}")
        reason = unavailable(family, backend, device.type) or refused.get(backend)
        if reason:
            raise RuntimeError(f"backend={backend!r} cannot serve {family} here: {reason}")
        return backend
    for candidate in PREFERENCE.get(device.type, ("torch", "reference")):
        if candidate in _families[family] and candidate not in refused and unavailable(family, candidate, device.type) is None:
            return candidate
    return "reference"


# torch.compile takes the choice as a constant (torch.compiler.assume_constant_result, without its import of the compiler).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def report() -> dict[str, dict[str, str]]:
    """Family -> backend -> "serves cpu", "serves cuda", … or why it does not serve, on this machine."""
    for module in ("linear_logprob", "zeroth_order", "invariants", "saliency_flow"):
        if importlib.util.find_spec(f"llmcore.kernels.{module}") is not None:
            importlib.import_module(f"llmcore.kernels.{module}")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    result: dict[str, dict[str, str]] = {}
    for family, operators in _families.items():
        result[family] = {}
        for name in BACKENDS:
            if name in operators:
                reasons = {device: unavailable(family, name, device) for device in devices}
                serves = [device for device, reason in reasons.items() if reason is None]
                result[family][name] = f"serves {', '.join(serves)}" if serves else str(next(iter(reasons.values())))
    return result
