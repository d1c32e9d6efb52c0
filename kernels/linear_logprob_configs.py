"""Tiles and schedules of the Triton fused linear log-probability: one row per architecture, and the candidates a row can be replaced by.

Keyed by what changes the code: pass, operand width, architecture; never by a row count. No row has been measured: no device was at hand.
The rows in use are the conservative ones, chosen by tile traffic and by the registers and shared memory of the compiled binary
(python -m llmcore.kernels.aot). `python bench/tune_linear_logprob.py` times every candidate on a device and prints the row to paste here,
together with the device, the date and the figures that justify it.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
from llmcore.kernels.linear_logprob_core import VOCAB_BLOCK

OFFSET_BLOCK = 256  # columns that share one int16 offset: BLOCK_V of every forward configuration for 16-bit operands
CHUNK_BYTES = 320 << 20  # what backward holds of one vocabulary chunk: da, the vendor schedule's products, float32 d_weight
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile of a GEMM kernel. group: row blocks that sweep the vocabulary together.

    schedule, forward: "grid" is one program a tile with pointer loads; "persistent" one program a processor, operands by TMA descriptor
    (Hopper and later; a weight that a descriptor cannot address, by its strides, is served by "grid").
    schedule, backward: "tile" recomputes the logits inside the kernel that forms their gradient; "vendor" lets the library's GEMM write a
    chunk of float32 products that the same kernel turns into gradients (8 more bytes moved per logit, contraction at the library's rate).
    """

    block_m: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 16
    schedule: str = "grid"


def _tile(block_m: int, block_v: int, block_k: int, num_warps: int, num_stages: int, schedule: str = "tile") -> Config:
    return Config(block_m, block_v, block_k, num_warps, num_stages, schedule=schedule)


# Every option of the forward shares one tile, or the options would change the last bits of a row.
CONFIGS = {
    ("forward", "half", "sm_80"): Config(64, 256, 32, 8, 3),
    ("forward", "half", "sm_90"): Config(64, 256, 64, 8, 4),
    ("forward", "half", "sm_100"): Config(64, 256, 64, 8, 4),
    ("forward", "half", "gfx942"): Config(64, 256, 32, 8, 2),
    ("backward", "half", "sm_80"): _tile(128, 128, 64, 8, 3),
    ("backward", "half", "sm_90"): _tile(128, 128, 64, 8, 4),
    ("backward", "half", "sm_100"): _tile(128, 128, 64, 8, 4),
    ("backward", "half", "gfx942"): _tile(64, 128, 32, 8, 2),
    **{("forward", "full", target): Config(64, 64, 32, 4, 2) for target in TARGETS},
    **{("backward", "full", target): _tile(64, 64, 32, 8, 2) for target in TARGETS},
}
RESIDENT = _tile(8, 256, 64, 8, 1)  # elementwise over the resident tile; block_k is not used
PRODUCT = _tile(8, 256, 64, 8, 1, schedule="vendor")  # elementwise over the vendor GEMM's products

# What a run on a device has to choose from, beside the row in use.
CANDIDATES = {
    ("forward", "half", "sm_90"): (Config(64, 256, 64, 8, 4, schedule="persistent"),),
    ("forward", "half", "sm_100"): (Config(64, 256, 64, 8, 4, schedule="persistent"),),
    **{("backward", "half", target): (PRODUCT,) for target in TARGETS},
    **{("backward", "full", target): (PRODUCT,) for target in TARGETS},
}


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the table that serves a device; the interpreter takes the Hopper one."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


def config(step: str, half: bool, target: str) -> Config:
    return CONFIGS[step, "half" if half else "full", target]


@functools.cache
def processors(device: torch.device) -> int:
    """Programs of a persistent launch; the interpreter's few make it walk over several tiles."""
    return 3 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def row_grid(num_rows: int, config: Config) -> tuple[int, int]:
    """(row blocks in a group, groups): groups of equal size cover at least every row block."""
    blocks = triton.cdiv(num_rows, config.block_m)
    groups = triton.cdiv(blocks, config.group)
    return triton.cdiv(blocks, groups), groups


def chunk_columns(num_rows: int, hidden_size: int, vocab_size: int, logit_bytes: int) -> int:
    """Columns of one chunk: multiples of VOCAB_BLOCK whose logit_bytes a row and float32 d_weight fit CHUNK_BYTES, at least one."""
    fitting = CHUNK_BYTES // (num_rows * logit_bytes + hidden_size * 4) // VOCAB_BLOCK * VOCAB_BLOCK
    return min(max(fitting, VOCAB_BLOCK), -(-vocab_size // VOCAB_BLOCK) * VOCAB_BLOCK)
