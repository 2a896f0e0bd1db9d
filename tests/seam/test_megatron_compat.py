"""A change of Megatron's engine is checked by name, and made once."""

import sys
import types

import pytest

from megatron_dmc.seam import megatron_compat


def stand_in(monkeypatch, **symbols):
    module = types.ModuleType("engine_stand_in")
    for name, value in symbols.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_symbol_with_its_parameters_is_found(monkeypatch):
    module = stand_in(monkeypatch, work=lambda iteration, loss: None)
    assert megatron_compat.symbol("engine_stand_in", "work", ("iteration",)) == (module, module.work)


@pytest.mark.parametrize(("name", "parameters"), [("gone", ()), ("work", ("iteration", "moved"))])
def test_a_missing_symbol_or_parameter_is_named_with_the_versions(monkeypatch, name, parameters):
    stand_in(monkeypatch, work=lambda iteration: None)
    monkeypatch.setattr(megatron_compat, "check_version", lambda: "0.99")
    with pytest.raises(ImportError, match=rf"0\.99 has no engine_stand_in\.{name}.*0\.19\.2"):
        megatron_compat.symbol("engine_stand_in", name, parameters)


@pytest.mark.parametrize(("version", "warned"), [("0.19.2", False), ("0.19.2+719bd7e", False), ("0.19.3", True)])
def test_an_untested_version_is_told(monkeypatch, recwarn, version, warned):
    core, training = types.ModuleType("megatron.core"), types.ModuleType("megatron.training")
    core.__version__ = version
    package = types.ModuleType("megatron")
    package.core, package.training = core, training
    for module in (package, core, training):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert megatron_compat.check_version() == version
    assert bool(recwarn) == warned


def test_replacing_twice_wraps_once(monkeypatch):
    module = stand_in(monkeypatch, work=lambda: "original")
    for _ in range(2):
        megatron_compat._replace(module, "work", lambda original: lambda: f"wrapped {original()}")
    assert module.work() == "wrapped original"
