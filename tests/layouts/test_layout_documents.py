"""With ``--dataloader-inter-document-masking`` every rank knows where documents start, middle stages too."""

import pytest

from tests.layouts import documents
from tests.layouts.cases import DOCUMENTS, LAYOUTS
from tests.layouts.laboratory import VOCAB_SIZE

END_OF_DOCUMENT = VOCAB_SIZE - 1


def _seen(laboratory, ranks, switches=()):
    argv = laboratory.arguments(DOCUMENTS, switches, train_iters=1, pretrained_checkpoint=laboratory.base(DOCUMENTS))
    return laboratory.run(documents.train, ranks, argv)


def test_layout_documents_start_after_the_end_of_the_former(laboratory):
    (seen,) = _seen(laboratory, 1)
    for starts, tokens in seen:
        for row, found in zip(tokens, starts, strict=True):
            ends = [position for position, token in enumerate(row[:-1]) if token == END_OF_DOCUMENT]
            assert found == [0, *(end + 1 for end in ends)]
    assert max(len(row) for starts, _ in seen for row in starts) >= 3


@pytest.mark.parametrize("layout", ["pp4", pytest.param("cp2_tp2_sp", marks=pytest.mark.exhaustive)])
def test_layout_documents_reach_every_rank(laboratory, layout):
    where = LAYOUTS[layout]
    (alone,) = _seen(laboratory, 1)
    for seen in _seen(laboratory, where.ranks, where.switches):
        assert [starts for starts, _ in seen] == [starts for starts, _ in alone]
