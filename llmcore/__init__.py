"""llmcore: performance-engineered kernels for aligning, auditing and interpreting large language models.

Kernels live in `llmcore.kernels.<family>`, methods in `llmcore.methods.<paper>`; importing this package loads neither.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the folders kernels/ and methods/ stand beside this one; an installation maps them into the package.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str):
    if name == "load_model":
        from llmcore.models import load_model

        return load_model
    raise AttributeError(f"module 'llmcore' has no attribute {name!r}")
