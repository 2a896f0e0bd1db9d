"""Pictures of training: a panel for everything that was logged."""

import pytest

pytest.importorskip("matplotlib", reason="pictures need the extra [plot]")

from megatron_dmc.report import figures
from megatron_dmc.report.curve import Curve


@pytest.mark.parametrize("teacher", [False, True])
def test_a_panel_for_the_teacher_where_there_was_one(teacher, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    logged = {"lm_loss": 2.0, "measured_cr": 1.5, "target_cr": 1.4} | ({"distillation_loss": 0.25} if teacher else {})
    retrofit = Curve([1, 2], [logged, logged], [(0, "retrofit")])
    figures.training_figure(tmp_path / "training.png", "title", retrofit, None)
    labels = [axes.get_ylabel().split(",")[0].split("\n")[0] for axes in drawn[0].axes]
    assert labels == ["LM loss", *(["KL from the teacher"] if teacher else []), "compression ratio"]
    if teacher:
        assert drawn[0].axes[1].lines[0].get_ydata().tolist() == [0.25, 0.25]
