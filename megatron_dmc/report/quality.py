"""What a retrofit must reach: the ratio it was asked for, at little cost in perplexity, by both paths alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dmc.support.findings import Finding

RATIO_TOLERANCE = 0.10
PERPLEXITY_TOLERANCE = 0.10
NOT_YET = "not measured yet"


def quality(evaluations: Mapping[str, Mapping[str, Any]], target_cr: float | None) -> list[Finding]:
    """Judge the measured results of one run.

    Args:
        evaluations: results of ``base``, ``control`` and ``dmc``, as far as they exist.
        target_cr: ratio that was asked for; None where it is not known.
    """
    dmc, control = evaluations.get("dmc"), evaluations.get("control")
    return [_ratio(dmc, target_cr), _perplexity(dmc, control), _agreement(dmc)]


def _ratio(dmc: Mapping[str, Any] | None, target_cr: float | None) -> Finding:
    name = f"compression ratio within {RATIO_TOLERANCE:.0%} of the target"
    if dmc is None or dmc["decode"] is None or target_cr is None:
        return Finding(name, "warning", NOT_YET)
    ratio = dmc["decode"]["compression_ratio"]
    if abs(ratio / target_cr - 1) <= RATIO_TOLERANCE:
        return Finding(name, "ok", f"{ratio:.2f}, target {target_cr:g}")
    remedy = "more retrofit steps or a larger --dmc-loss-weight" if ratio < target_cr else "a lower learning rate"
    return Finding(name, "failed", f"{ratio:.2f}, target {target_cr:g}", remedy)


def _perplexity(dmc: Mapping[str, Any] | None, control: Mapping[str, Any] | None) -> Finding:
    name = f"perplexity at most {PERPLEXITY_TOLERANCE:.0%} above the control"
    if dmc is None or control is None:
        return Finding(name, "warning", NOT_YET)
    ours, theirs = dmc["teacher_forced"]["perplexity"], control["teacher_forced"]["perplexity"]
    detail = f"{ours:.3f}, control {theirs:.3f}: {ours / theirs - 1:+.1%}"
    if ours <= (1 + PERPLEXITY_TOLERANCE) * theirs:
        return Finding(name, "ok", detail)
    return Finding(name, "failed", detail, "more steps in retrofit and consolidate")


def _agreement(dmc: Mapping[str, Any] | None) -> Finding:
    name = "whole sequences and decoding through the cache agree"
    if dmc is None or dmc["agreement"] is None:
        return Finding(name, "warning", NOT_YET)
    agreement = dmc["agreement"]
    detail = (
        f"log-probabilities differ by at most {agreement['largest_log_prob_difference']:.1e} over "
        f"{agreement['num_tokens_compared']:,} tokens, {agreement['share_of_equal_decisions']:.4%} of decisions equal"
    )
    if not agreement["failures"]:
        return Finding(name, "ok", detail)
    return Finding(name, "failed", "; ".join(agreement["failures"]), "this is a defect: please report it")
