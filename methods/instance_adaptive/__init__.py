"""Instance-adaptive zero-shot chain of thought: pick the trigger sentence of each question by how information flowed inside the model.

Zero-shot chain of thought appends a trigger ("Let's think step by step.") to a question; the model writes a rationale and an answer. No
trigger
is best for every question. For a question q, trigger p and rationale r the method measures, at the step that produces the answer token,

    I_qp, I_qr, I_pr = mean of |A · dL/dA| over pairs (reader in p, read in q), (r, q), (r, p)        per layer and head
    S = mean over layers and heads of  l1·I_qp + l2·I_qr + l3·I_pr,   l1 + l2 + l3 = 1

and takes the first trigger whose S passes a threshold ("ss", sequential substitution) or votes among the k best ("mv", majority vote). No
label, no
reward model, no training. Paper: Yuan et al., "Instance-adaptive zero-shot chain-of-thought prompting", NeurIPS 2024, arXiv 2409.20441.

With the paper's cross-entropy, S carries the factor 1 - p(answer): flow and confidence mixed. loss="margin" is the same flow without it.

Cost of M triggers: one batched decode, one forward of the tokens that all M texts share (their keys and values are then constants: exact,
since a
gradient at a row never passes through earlier rows), and one forward + activation-only backward of the M suffixes.
"""

from llmcore.methods.instance_adaptive.answers import PATTERNS, find_answer, normalise
from llmcore.methods.instance_adaptive.config import CANDIDATES, FLOWS, PLAIN_TEMPLATE, IAPConfig, IAPResult, Scored
from llmcore.methods.instance_adaptive.method import InstanceAdaptivePrompting, flow_map
from llmcore.methods.instance_adaptive.selection import Threshold, calibrate_lambdas, calibrate_threshold, select_mv, select_ss

__all__ = [
    "CANDIDATES",
    "FLOWS",
    "PATTERNS",
    "PLAIN_TEMPLATE",
    "IAPConfig",
    "IAPResult",
    "InstanceAdaptivePrompting",
    "Scored",
    "Threshold",
    "calibrate_lambdas",
    "calibrate_threshold",
    "find_answer",
    "flow_map",
    "normalise",
    "select_mv",
    "select_ss",
]
