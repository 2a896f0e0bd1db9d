"""What ``megatron-dmc evaluate`` prints for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_dmc.cli.output import aligned
from megatron_dmc.support.units import binary_bytes

if TYPE_CHECKING:
    from megatron_dmc.evaluation.against_reference import AgainstReference, Span
    from megatron_dmc.evaluation.greedy_match import GreedyMatch
    from megatron_dmc.evaluation.perplexity import Evaluation, PathResult

PERPLEXITIES = ("perplexity", "reference_perplexity", "perplexity_ratio")
AGAINST_HEADS = ("positions", "perplexity", "reference", "their ratio", "mean KL", "max KL", "same top token")


def lines_of(evaluation: Evaluation, match: GreedyMatch | None) -> list[str]:
    """The result as people read it."""
    lines = [f"{evaluation.num_sequences} sequences of {evaluation.seq_length} tokens, {evaluation.dtype}"]
    for name, result in _paths(evaluation):
        loss = f"loss {result.loss:.5f} +- {result.standard_error:.5f}"
        figures = f"perplexity {result.perplexity:.4f} ({loss}), compression ratio {result.compression_ratio:.3f}"
        lines.append(f"{name + ':':<15} {figures}, {result.seconds:.1f} s")
    shown = evaluation.decode or evaluation.teacher_forced
    assert shown is not None
    lines += _cache_lines(shown)
    for name, result in _paths(evaluation):
        if result.against_reference is not None:
            lines += [f"{name} against the reference:", *_against_lines(result.against_reference)]
    if match is not None:
        lines.append(
            f"greedy texts ({match.num_prompts} prompts of {match.prompt_length} tokens, {match.num_new_tokens} new): "
            f"{match.equal_tokens.mean:.1%} of tokens equal, {match.common_prefix.mean:.1%} before the first that "
            f"differs, {match.identical_texts:.0%} of texts identical"
        )
    if evaluation.agreement is not None:
        agreed = evaluation.agreement.to_dict()
        lines.append(
            f"agreement: {agreed['share_of_equal_decisions']:.6%} of decisions equal, largest log-probability "
            f"difference {agreed['largest_log_prob_difference']:.2e} over {agreed['num_tokens_compared']} of "
            f"{agreed['num_tokens']} tokens{'' if agreed['asserted'] else ' (reported only: not float32 throughout)'}"
        )
    return lines


def _cache_lines(result: PathResult) -> list[str]:
    """Size of the cache, and the ratio by layer and KV head."""
    held = f"mean over the evaluation: {result.mean_resident_entries:.1f} entries per head"
    if result.mean_resident_bytes is not None:
        held += f", {binary_bytes(int(result.mean_resident_bytes))} per sequence"
    lines = [] if result.cache is None else [result.cache.summary()]
    lines.append(f"{held} ({result.mean_resident_ratio:.2f} times fewer than uncompressed)")
    if result.compression_ratio > 1:
        lines.append("compression ratio by layer (rows) and KV head (columns):")
        for layer, ratios in enumerate(result.compression_ratio_per_layer_and_kv_head):
            lines.append(f"  {layer:>3}  " + " ".join(f"{ratio:7.2f}" for ratio in ratios))
    return lines


def _paths(evaluation: Evaluation) -> Iterator[tuple[str, PathResult]]:
    """The paths that were taken, by name."""
    for name, result in (("teacher-forced", evaluation.teacher_forced), ("decode", evaluation.decode)):
        if result is not None:
            yield name, result


def _against_lines(found: AgainstReference) -> list[str]:
    spans = [found.overall, *(found.by_position if len(found.by_position) > 1 else [])]
    return [f"  {line}" for line in aligned(AGAINST_HEADS, [_span_row(span) for span in spans])]


def _span_row(span: Span) -> tuple[str, ...]:
    figures = span.to_dict()
    return (
        f"{span.start}..{span.end - 1}",
        *(f"{figures[n]:.3f} +- {figures[n + '_standard_error']:.3f}" for n in PERPLEXITIES),
        f"{span.kl.mean:.5f} +- {span.kl.standard_error:.5f}",
        f"{span.max_kl:.3f}",
        f"{span.same_top.mean:.2%}",
    )


def table_of(evaluations: Sequence[Evaluation]) -> list[str]:
    """One line for each length and path."""
    heads = ("tokens, path", "sequences", "perplexity", "entries per head", "ratio")
    return aligned(
        heads,
        [
            (
                f"{evaluation.seq_length} {name}",
                str(evaluation.num_sequences),
                f"{result.perplexity:.3f}",
                f"{result.mean_resident_entries:.1f}",
                f"{result.mean_resident_ratio:.2f}",
            )
            for evaluation in evaluations
            for name, result in _paths(evaluation)
        ],
    )
