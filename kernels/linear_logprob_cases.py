"""The Triton configurations of the fused linear log-probability, for compilation ahead of time (kernels/aot.py)."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from llmcore.kernels import linear_logprob_configs as configs
from llmcore.kernels.aot import AotCase
from llmcore.kernels.linear_logprob_configs import Config
from llmcore.kernels.linear_logprob_tiles import (
    _direction_kernel,
    _dlogits_kernel,
    _merge_kernel,
    _stats_kernel,
    _stats_persistent_kernel,
)

_BARE = {
    "HAS_BIAS": False, "HAS_CAP": False, "SHIFTED": -1, "SUMSQ": -1, "SUMZ": -1, "FIRST": False, "KEEP": 0,
    "bias": None, "kept": None, "offsets": None,
}  # fmt: skip
_PLANES = {"SHIFTED": 2, "SUMSQ": 3, "SUMZ": 4}
_OFF = {
    "HAS_BIAS": False, "HAS_CAP": False, "HAS_SLOPE": False, "HAS_SCALE": False, "NEED_BIAS": False,
    "bias": None, "slope": None, "scale": None,
}  # fmt: skip
_SPILLS = {
    (f"linear_logprob.dlogits.{short}.all_options", "sm_100"): "four registers a thread with every option at once, outside the contraction"
    for short in ("bf16", "fp16")
}
_ON = {"HAS_BIAS": True, "HAS_CAP": True, "HAS_SLOPE": True, "HAS_SCALE": True, "NEED_BIAS": True}


def _without(constants: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in constants.items() if name not in names}


def _argument_types(short: str, kept: str) -> dict[str, str]:
    """Type of every argument by name; the kernels share their names."""
    pointers = {name: f"*{short}" for name in ("hidden", "weight", "bias", "grad", "kept_out")}
    floats = ("partial", "merged", "target", "lse", "lse_rest", "target_coef", "prob_coef", "slope", "scale", "bias_partial", "reference")
    wide = {name: "*i64" for name in ("rows", "labels", "slots", "first")}
    integers = (
        "num_rows", "vocab_size", "first_column", "vocab_start", "kept_rows", "num_blocks", "row_blocks", "column_blocks", "num_tiles",
        "stride_hidden", "stride_weight", "stride_kept", "stride_offsets", "stride_grad",
    )  # fmt: skip
    return {
        **pointers, **wide, "kept": f"*{kept}", "offsets": "*i16", "argmax": "*i32",
        **{name: "*fp32" for name in floats}, **{name: "i32" for name in integers},
        **{name: "fp32" for name in ("logit_scale", "softcap", "inverse_temperature", "factor")},
    }  # fmt: skip


def aot_cases() -> list[AotCase]:
    """What is launched, and every candidate of the configuration table: both GEMM kernels for each operand type, bare and with every
    option, and the small kernels."""
    return [case for target in configs.TARGETS for case in _cases_of(target)]


def _cases_of(target: str) -> list[AotCase]:
    cases = []

    def case(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], config: Config) -> None:
        signature = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
        divisible = tuple(name for name in ("stride_hidden", "stride_weight") if name in signature)
        name = f"linear_logprob.{name}"
        reason = _SPILLS.get((name, target))
        cases.append(
            AotCase(
                name, kernel, signature, constants, config.num_warps, config.num_stages, divisible=divisible, targets=(target,),
                spills_allowed={} if reason is None else {target: reason}, everyday=".fp16" not in name,
            )
        )  # fmt: skip

    for short, compute in (("bf16", tl.bfloat16), ("fp16", tl.float16), ("fp32", tl.float32)):
        half = compute != tl.float32
        types = _argument_types(short, "fp16" if half else "fp32")
        common = {"HIDDEN": 4096, "COMPUTE": compute, "PRECISION": "tf32" if half else "ieee"}
        # float16 alone lifts its gradients by a power of two, in every variant.
        lifted = {"HAS_SCALE": True} if compute == tl.float16 else {"HAS_SCALE": False, "scale": None}
        off, on = {**_without(_OFF, "scale"), **lifted}, {**_ON, **lifted}
        keep = {"KEEP": 2} if half else {"KEEP": 1, "offsets": None}
        with_options = {**_without(_BARE, "bias"), "HAS_BIAS": True, "HAS_CAP": True}
        variants = {
            "plain": _BARE,
            "metrics": {**with_options, **_PLANES, "FIRST": True},
            "resident": {**_without(with_options, "kept", "offsets"), **keep},
        }
        width = "half" if half else "full"
        for tile in (configs.config("forward", half, target), *configs.CANDIDATES.get(("forward", width, target), ())):
            sizes = {"BLOCK_M": tile.block_m, "BLOCK_V": tile.block_v, "BLOCK_K": tile.block_k}
            for variant, options in variants.items():
                if tile.schedule == "grid":
                    case(f"stats.{short}.{variant}", _stats_kernel, types, {**common, **sizes, **options}, tile)
                    continue
                boxes = {
                    "hidden": f"tensordesc<{short}[{tile.block_m}, {tile.block_k}]>",
                    "weight": f"tensordesc<{short}[{tile.block_v}, {tile.block_k}]>",
                }
                name = f"stats_persistent_{tile.block_m}x{tile.block_v}.{short}.{variant}"
                case(name, _stats_persistent_kernel, types | boxes, {**common, **sizes, **options}, tile)
        recompute = {"SOURCE": 0, "kept": None, "offsets": None, "slots": None}
        product = {"SOURCE": 3, "offsets": None, "slots": None}
        stored = {"SOURCE": 2} if half else {"SOURCE": 1, "offsets": None}
        recomputed = configs.config("backward", half, target)
        for variant, tile, source, kept in (
            ("plain", recomputed, {**recompute, **off}, {}),
            ("all_options", recomputed, {**recompute, **on}, {}),
            ("resident", configs.RESIDENT, {**stored, **on}, {}),
            ("vendor", configs.PRODUCT, {**product, **on}, {"kept": "*fp32"}),
        ):
            sizes = {"BLOCK_M": tile.block_m, "BLOCK_V": tile.block_v, "BLOCK_K": tile.block_k}
            case(f"dlogits.{short}.{variant}", _dlogits_kernel, types | kept, {**common, **sizes, **source}, tile)
        block_v = configs.config("forward", half, target).block_v
        direction = {"HAS_CAP": True, **stored, "BLOCK_M": 16, "BLOCK_V": block_v}
        case(f"direction.{short}", _direction_kernel, types, direction, configs.RESIDENT)
    merge = {**_PLANES, "FIRST": True, "NUM_BLOCKS": 501, "BLOCK_R": 32, "BLOCK_C": 32}
    case("merge", _merge_kernel, _argument_types("bf16", "fp16"), merge, Config(32, 32, 1, 4, 1))
    return cases
