"""A run belongs to one configuration, and its steps are done once."""

import pytest

from megatron_dmc.runs.directory import configuration_hash, flattened, open_run

SETTINGS = {"steps": 10, "dmc": {"target_cr": 4.0}}


def finish(path, settings, **options):
    """Open a run and do one step; the times it was worked on."""
    worked = []
    with open_run(path, settings, **options) as run:
        result = run.step("one", lambda: worked.append(1) or {"value": 3})
    assert result == {"value": 3}
    return len(worked)


def test_a_step_is_done_once(tmp_path):
    assert finish(tmp_path / "run", SETTINGS) == 1
    assert finish(tmp_path / "run", SETTINGS) == 0


def test_an_interrupted_step_is_done_again(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run", SETTINGS) as run:
        run.step("one", interrupted)
    assert finish(tmp_path / "run", SETTINGS) == 1


def test_another_configuration_is_refused_and_shown(tmp_path):
    finish(tmp_path / "run", SETTINGS)
    other = {"steps": 10, "dmc": {"target_cr": 2.0}}
    with pytest.raises(ValueError, match=r"dmc\.target_cr: 4\.0 there, 2\.0 here(.|\n)*--overwrite"):
        finish(tmp_path / "run", other)
    assert finish(tmp_path / "run", SETTINGS) == 0
    assert finish(tmp_path / "run", other, overwrite=True) == 1


def test_a_run_that_finished_nothing_may_change(tmp_path):
    with open_run(tmp_path / "run", SETTINGS):
        pass
    assert finish(tmp_path / "run", {"steps": 1}) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_something_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no run"), open_run(tmp_path, SETTINGS, overwrite=overwrite):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_two_processes_do_not_share_a_run(tmp_path):
    with open_run(tmp_path / "run", SETTINGS), pytest.raises(ValueError, match="another process works on"):
        finish(tmp_path / "run", SETTINGS)


def test_hash_ignores_the_order_of_keys():
    assert configuration_hash({"a": 1, "b": 2}) == configuration_hash({"b": 2, "a": 1})
    assert flattened({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
