"""Whether two paths through one model agree: decisions first, then log-probabilities.

The paths are two roundings of one function. A decision whose logit is within rounding of the threshold may fall
either way; from there on the sequence is another one and is left out. Everything before must agree in float32.

Legend: S sequence, B batch, L layers, G KV heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.evaluation.scores import Scores
from megatron_dmc.support.errors import CheckFailed

LOGIT_TOLERANCE = 1e-4
"""A decision may differ only if its logit is this close to the threshold in both paths."""
LOG_PROB_TOLERANCE = 1e-4
SEQUENCES_PER_CUT = 1000
"""One sequence in so many may be cut at a differing decision (one in a smaller test)."""


@dataclass
class Agreement:
    """How well whole-sequence scores and decoding agree, over all batches added so far.

    Args:
        asserted: whether disagreement is a failure (float32) or a number to report (bfloat16, a cache of 8 bits).
        threshold: decision threshold of the model.
    """

    asserted: bool
    threshold: float = 0.0
    num_sequences: int = 0
    num_cut: int = 0
    """Sequences with a differing decision."""
    num_tokens: int = 0
    num_tokens_compared: int = 0
    """Tokens before the first differing decision of their sequence."""
    num_decisions: int = 0
    num_equal_decisions: int = 0
    largest_logit_of_difference: float = 0.0
    """Distance from the threshold, over the first differing decisions of all sequences and both paths."""
    largest_log_prob_difference: float = 0.0
    """Over the tokens compared."""
    mean_log_prob_difference: float = 0.0
    """Absolute, over all tokens, those after a differing decision included."""
    _sum_of_differences: float = field(default=0.0, repr=False)

    def add(self, whole: Scores, decoded: Scores) -> None:
        """Compare the two paths for one batch."""
        sequence_length, batch = whole.log_prob_SB.shape
        compared_SB = torch.ones_like(whole.log_prob_SB, dtype=torch.bool)
        if whole.alpha_LSBG is not None and decoded.alpha_LSBG is not None:
            compared_SB = self._compare_decisions(whole, decoded)
        difference_SB = (whole.log_prob_SB - decoded.log_prob_SB).abs().double()
        self.num_sequences += batch
        self.num_tokens += sequence_length * batch
        self.num_tokens_compared += int(compared_SB.sum())
        # NaN never compares as larger: it counts as infinitely far.
        largest = difference_SB.masked_fill(~compared_SB, 0.0).nan_to_num(nan=float("inf")).max().item()
        self.largest_log_prob_difference = max(self.largest_log_prob_difference, largest)
        self._sum_of_differences += difference_SB.sum().item()
        self.mean_log_prob_difference = self._sum_of_differences / self.num_tokens

    def failures(self) -> list[str]:
        """What does not hold, in words; empty where nothing is asserted."""
        if not self.asserted:
            return []
        found = []
        allowed = max(1, self.num_sequences // SEQUENCES_PER_CUT)
        if self.num_cut > allowed:
            found.append(f"decisions differ in {self.num_cut} of {self.num_sequences} sequences (at most {allowed})")
        if not self.largest_logit_of_difference < LOGIT_TOLERANCE:
            found.append(
                f"a decision differs whose logit is {self.largest_logit_of_difference:.2e} from the threshold "
                f"(below {LOGIT_TOLERANCE:.0e} is rounding)"
            )
        if not self.largest_log_prob_difference <= LOG_PROB_TOLERANCE:
            found.append(
                f"log-probabilities differ by {self.largest_log_prob_difference:.2e} (at most {LOG_PROB_TOLERANCE:.0e})"
            )
        if not self.num_tokens_compared:
            found.append("no token could be compared")
        return found

    def require(self) -> None:
        """Raise ``CheckFailed`` with all failures, if there are any."""
        if found := self.failures():
            raise CheckFailed(f"teacher-forced evaluation and decoding disagree: {'; '.join(found)}")

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        figures = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        equal = self.num_equal_decisions / self.num_decisions if self.num_decisions else 1.0
        return {**figures, "share_of_equal_decisions": equal, "failures": self.failures()}

    def _compare_decisions(self, whole: Scores, decoded: Scores) -> Tensor:
        """bool [S, B]: the positions before the first differing decision of each sequence."""
        assert whole.alpha_LSBG is not None
        assert decoded.alpha_LSBG is not None
        differs_LSBG = whole.alpha_LSBG != decoded.alpha_LSBG
        self.num_decisions += differs_LSBG.numel()
        self.num_equal_decisions += int((~differs_LSBG).sum())
        before_SB = differs_LSBG.any(dim=-1).any(dim=0).cumsum(dim=0) == 0
        cut_B = ~before_SB[-1]
        self.num_cut += int(cut_B.sum())
        for row in cut_B.nonzero().flatten().tolist():
            # Only the first difference is rounding's own: in higher layers and later tokens it has consequences.
            position = int(before_SB[:, row].sum())
            layer = int(differs_LSBG[:, position, row].any(dim=-1).int().argmax())
            heads = differs_LSBG[layer, position, row]
            for scores in (whole, decoded):
                assert scores.decision_logit_LSBG is not None
                logits = scores.decision_logit_LSBG[layer, position, row][heads]
                distance = (logits - self.threshold).abs().max().item()
                self.largest_logit_of_difference = max(self.largest_logit_of_difference, distance)
        return before_SB
