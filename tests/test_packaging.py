"""What ``setup.py`` asks for is what the code needs, and every remedy that names a package satisfies it."""

import runpy
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_dmc.seam import doctor
from megatron_dmc.support.versions import EXTRAS, REQUIRED

ROOT = Path(__file__).parents[1]


@pytest.fixture
def declared(monkeypatch):
    """The arguments of ``setup()``."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_setup_declares_the_table(declared):
    assert {str(Requirement(text)) for text in declared["install_requires"]} == {
        str(Requirement(package + releases)) for package, releases in REQUIRED.items()
    }
    assert declared["extras_require"].keys() == EXTRAS.keys() == doctor.PURPOSES.keys()


def test_installing_the_extra_satisfies_the_exported_model(declared):
    """The remedy that ``megatron_dmc.hf`` names must bring a transformers that it accepts."""
    brought = {Requirement(text).name: Requirement(text).specifier for text in declared["extras_require"]["hf"]}
    assert "5.16" not in brought["transformers"]
    assert brought["transformers"] == SpecifierSet(EXTRAS["hf"]["transformers"])


def test_pinned_versions_are_allowed():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for package, releases in [*REQUIRED.items(), *(item for extra in EXTRAS.values() for item in extra.items())]:
        name = package.partition("[")[0]
        assert name not in pins or pins[name].split()[0] in SpecifierSet(releases), name


def test_doctor_names_an_extra_that_is_too_old():
    found = {finding.name: finding for finding in doctor._extras({"transformers": "5.4"})}["extra [hf] transformers"]
    assert (found.status, found.remedy) == ("warning", "pip install 'megatron_dmc[hf]'")
    assert "needed >=5.17" in found.detail


def test_task_files_are_shipped(declared):
    package = "megatron_dmc.evaluation.harness"
    (pattern,) = declared["package_data"][package]
    assert package in declared["packages"]
    assert len(list(ROOT.joinpath(*package.split(".")).glob(pattern))) == 8
