"""Build llmcore: two optional compiled modules around a pure-Python package.

`llmcore._C`       tensor operators on LibTorch's stable ABI (csrc/bindings.cpp, csrc/cpu, csrc/cuda)
`llmcore._native`  native code that is not tensors (csrc/native), pybind11

No compiler gives a pure-Python install and says so. LLMCORE_BUILD_EXT=1 makes a failed build an error, =0 skips the build.
"""

import os
import sys
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
WANTED = os.environ.get("LLMCORE_BUILD_EXT", "auto")
MAPPED = {"llmcore": "llmcore", "llmcore.kernels": "kernels", "llmcore.methods": "methods"}
STABLE_ABI = "0x020a000000000000"  # torch 2.10: one build serves every later torch


def say(text: str) -> None:
    print(f"llmcore setup: {text}", file=sys.stderr, flush=True)


def sources(*folders: str, suffix: str = ".cpp") -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).glob(f"*{suffix}"))


def extensions() -> tuple[list, dict]:
    if WANTED == "0":
        say("LLMCORE_BUILD_EXT=0: no compiled modules; CPU kernels use their chunked torch versions")
        return [], {}
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if WANTED == "1":
            raise
        say(f"{error}; installing without compiled modules (pip install torch pybind11, then --no-build-isolation)")
        return [], {}
    cuda = torch.version.cuda is not None and CUDA_HOME is not None and sources("csrc/cuda", suffix=".cu") != []
    say(f"C++ operators{' and CUDA kernels' if cuda else ''} for torch {torch.__version__}")
    # -g0 undoes the -g that Python's own flags carry: debug symbols would be nine tenths of the wheel.
    cxx = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-unknown-pragmas"]
    macros = [("TORCH_TARGET_VERSION", STABLE_ABI), ("Py_LIMITED_API", "0x030A0000")]
    operators = (CUDAExtension if cuda else CppExtension)(
        "llmcore._C",
        ["csrc/bindings.cpp", *sources("csrc/cpu"), *(sources("csrc/cuda", suffix=".cu") if cuda else [])],
        include_dirs=[str(ROOT / "csrc")], define_macros=macros + ([("USE_CUDA", "1")] if cuda else []), py_limited_api=True,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-std=c++20"]} if cuda else cxx, libraries=["dl"],
    )
    native = CppExtension("llmcore._native", sources("csrc/native"), include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
                          extra_compile_args=cxx)

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:  # compilers and torch fail in many types; said aloud below, an error with LLMCORE_BUILD_EXT=1
                if WANTED == "1":
                    raise
                say(f"building failed ({type(error).__name__}: {error}); installing pure Python, CPU kernels use their torch versions")
                self.extensions.clear()

    modules = [operators] + ([native] if sources("csrc/native") else [])
    return modules, {"build_ext": Build.with_options(no_python_abi_suffix=True)}


packages = [name for prefix, folder in MAPPED.items()
            for name in [prefix, *(f"{prefix}.{sub}" for sub in find_namespace_packages(folder))] if "__pycache__" not in name]
ext_modules, cmdclass = extensions()
setup(packages=packages, package_dir=MAPPED, package_data={"llmcore": ["py.typed"]},
      ext_modules=ext_modules, cmdclass=cmdclass)
