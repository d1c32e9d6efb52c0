"""Losses by the name that the table gives them."""

from __future__ import annotations

from dataclasses import fields
from types import ModuleType
from typing import Any

from llmcore.losses import pairs, unpaired
from llmcore.losses.base import PairLoss
from llmcore.losses.unpaired import KTO

Loss = PairLoss | KTO


def _named(module: ModuleType) -> dict[str, type[Loss]]:
    """The losses that a module defines, in its order."""
    classes = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Loss)]
    return {loss.table_name: loss for loss in classes if loss.__module__ == module.__name__ and loss.table_name}


_TABLE: dict[str, type[Loss]] = {"cdpo": pairs.DPO, **_named(pairs), **_named(unpaired)}
LOSS_NAMES = tuple(_TABLE)

_IPO = ("there is no loss named 'ipo', because two conventions share that name and differ by the completion's length: 'ipo_sum' pulls the "
        "margin of whole sequences to 1/(2 beta) nats (the DPO authors' code), 'ipo_mean' pulls the margin per token to 1/(2 beta) nats "
        "(TRL, HALOs); for 30-token completions the second asks for a 30 times larger sequence margin at the same beta. Name one of them")


def loss_from_name(name: str, **options: Any) -> PairLoss | KTO:
    """The loss that the table calls `name`, with its defaults replaced by `options`.

    Example: loss_from_name("simpo", beta=2.5, gamma=1.0). Names: see `LOSS_NAMES`.

    Raises:
        ValueError: unknown name ('ipo' among them: say 'ipo_sum' or 'ipo_mean'), an option that this loss does not have, or a bad value.
    """
    if name == "ipo":
        raise ValueError(_IPO)
    if name not in _TABLE:
        raise ValueError(f"loss name must be one of {', '.join(LOSS_NAMES)}; got {name!r}")
    loss = _TABLE[name]
    if name == "cdpo":
        options = {"label_smoothing": 0.1, **options}
        if options["label_smoothing"] == 0:
            raise ValueError("cdpo needs label_smoothing > 0; without smoothing it is 'dpo'")
    known = [f.name for f in fields(loss)]
    if "label_smoothing" in options and (name == "dpo" or "label_smoothing" not in known):
        if options["label_smoothing"] != 0:
            remedy = "ask for 'cdpo'" if name == "dpo" else "it acts on cdpo, robust, exo_pair, aot, aot_unpaired, simpo and cpo only"
            raise ValueError(f"label_smoothing has no meaning for {name!r}: {remedy}; got {options['label_smoothing']!r}")
        options = {k: v for k, v in options.items() if k != "label_smoothing"}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"{name!r} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    return loss(**options)
