"""Ranks come from torchrun, from srun, or the process is alone."""

import pytest

from megatron_dmc.seam.processes import complete_environment


def test_torchrun_is_left_alone():
    environment = {"RANK": "3", "WORLD_SIZE": "8"}
    complete_environment(environment)
    assert environment == {"RANK": "3", "WORLD_SIZE": "8"}


def test_a_single_process_meets_itself():
    environment: dict[str, str] = {}
    complete_environment(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert 0 < int(environment["MASTER_PORT"]) < 65536


def test_srun_gives_the_ranks():
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }
    complete_environment(environment)
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == ("5", "1", "8")


def test_srun_without_an_address_is_refused_and_does_not_fall_back_to_localhost():
    environment = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT"):
        complete_environment(environment)
    assert "RANK" not in environment
