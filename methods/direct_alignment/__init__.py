"""Direct alignment: train a language model on preferences, without a reward model, by any loss of llmcore.losses.

A pair enters its loss through four sequence log-probabilities (policy and frozen reference, chosen and rejected). One step is one trunk
forward over both sides of each pair, one head pass over the *scored* rows only (llmcore.kernels.linear_logprob: the tokens x vocabulary
logits never exist), and O(pairs) of loss arithmetic. The reference costs nothing when its scores are cached, one trunk forward without
gradient otherwise.

    cost of a pair, prompt p tokens, completions c tokens each:
        trunk (p + 2c) x 6 x parameters FLOP (4 x with LoRA)        head 2c rows x 3 to 4 x 2DV FLOP

Rafailov et al., "Direct Preference Optimization" (2023); Azar et al. (IPO, 2023); Ethayarajh et al. (KTO, 2024); Rafailov, Chittepu, Park
et al., "Scaling Laws for Reward Model Overoptimization in Direct Alignment Algorithms" (2024), whose recipe is `Config.study()`.

    config scoring reference step metrics run kl, one idea a file.
"""

from llmcore.methods.direct_alignment.config import Config
from llmcore.methods.direct_alignment.kl import KLResult, kl_estimate, kl_to_reference, sample
from llmcore.methods.direct_alignment.metrics import summarize
from llmcore.methods.direct_alignment.reference import AdapterOff, CachedRef, RefModel, model_hash, reference_fingerprint, reference_logp
from llmcore.methods.direct_alignment.run import ScoreResult, prepare_examples, score, train, trunk_layout
from llmcore.methods.direct_alignment.scoring import Scores, scored_states, segment_sums, sequence_scores
from llmcore.methods.direct_alignment.step import PreferenceOutput, PreferenceStep, Totals, mismatched_baseline, preference_step

__all__ = [
    "AdapterOff",
    "CachedRef",
    "Config",
    "KLResult",
    "PreferenceOutput",
    "PreferenceStep",
    "RefModel",
    "ScoreResult",
    "Scores",
    "Totals",
    "kl_estimate",
    "kl_to_reference",
    "mismatched_baseline",
    "model_hash",
    "preference_step",
    "prepare_examples",
    "reference_fingerprint",
    "reference_logp",
    "sample",
    "score",
    "scored_states",
    "segment_sums",
    "sequence_scores",
    "summarize",
    "train",
    "trunk_layout",
]
