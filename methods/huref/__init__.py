"""HuRef: was this checkpoint derived from that one? Answered from the weights on disk, without loading a model.

After pre-training the direction of a model's parameters hardly moves in later training, and models trained separately are nearly
orthogonal.
Products of weights in which permutations and mixings of dimensions cancel keep that signal when somebody disguises a copy. Two layers and a
few embedding rows decide: 2 to 7 % of the bytes of a checkpoint.

    compare(a, b)          score, channels, verdict, null z-score        fingerprint(path)      a stored sketch to compare later
    compare_many(paths)    all pairs, a failed checkpoint costs one row   Index(folder)          ranked ancestors out of thousands
    invariant_terms(path)  the (C, K, K) terms themselves                plan(path)             bytes, arithmetic, memory beforehand
    pcs(a, b)              plain parameter cosine, what was skipped      attacks                function-keeping rewrites, the test oracle

Zeng, Wang, Hu, Xu, Zhou, Wang, Yu, Lin: HuRef: HUman-REadable Fingerprint for Large Language Models. NeurIPS 2024, arXiv 2312.04828.
"""

from __future__ import annotations

import importlib
from typing import Any

from llmcore.methods.huref.comparison import ChannelScore, Comparison, compare
from llmcore.methods.huref.cosine import ParameterCosine, pcs
from llmcore.methods.huref.fingerprints import Fingerprint, fingerprint, load
from llmcore.methods.huref.index import Added, Index, Match
from llmcore.methods.huref.matrix import ComparisonMatrix, compare_many, heat_map
from llmcore.methods.huref.opening import invariant_terms
from llmcore.methods.huref.plans import Plan, plan
from llmcore.methods.huref.tokens import TokenList, Vocabulary, align, read_vocabulary

__all__ = [
    "Added",
    "ChannelScore",
    "Comparison",
    "ComparisonMatrix",
    "Fingerprint",
    "Index",
    "Match",
    "ParameterCosine",
    "Plan",
    "TokenList",
    "Vocabulary",
    "align",
    "attacks",
    "compare",
    "compare_many",
    "fingerprint",
    "heat_map",
    "invariant_terms",
    "load",
    "pcs",
    "plan",
    "read_vocabulary",
]


def __getattr__(name: str) -> Any:
    # The rewrites need transformers to check logits; they are imported when asked for.
    if name == "attacks":
        return importlib.import_module("llmcore.methods.huref.attacks")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
