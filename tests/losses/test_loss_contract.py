"""The contract of a LossTerm, proven by one artificial term that uses all of it.

programs/proof_term.py owns two banks, a connector and a head with rates of their own, a schedule,
and a tap of each network on each view; here it goes through training, two ranks, SIGKILL and
resume. test_loss_contract_papers.py trains the losses of the papers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Where the resumed run goes on: (epoch, step), both from 0.
PROOF = {
    "proof, before step 2": (0, 2),
    "proof, before step 5": (1, 1),
    "proof, inside save 3": (0, 3),
    "proof on two ranks, before step 3": (0, 3),
    "proof on two ranks, before step 5": (1, 1),
}


@pytest.fixture(scope="module")
def proof(
    killed_runs: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("proof")
    return folder, killed_runs(folder, *PROOF)


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    (path,) = (folder / name.replace(" ", "-") / "runs" / "tiny" / "kd").glob("*/last.pt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", PROOF)
def test_a_killed_run_with_everything_ends_bit_identical(
    proof: tuple[Path, dict[str, Any]], name: str
) -> None:
    found = proof[1][name]
    epoch, step = PROOF[name]
    assert found["codes"][0] == [-9] * len(found["codes"][0])
    assert set(found["codes"][1]) == {0}, found["log"]
    assert f"resumed tiny/kd at epoch {epoch + 1} of 2, step {step} of 4" in found["log"]
    # Parameters of student and term, banks, batch norms, optimizer, average, rows: all of last.pt.
    assert found["different"] == []


@pytest.mark.parametrize("name", PROOF)
def test_the_bank_saw_every_sample_once_an_epoch(
    proof: tuple[Path, dict[str, Any]], name: str
) -> None:
    term = checkpoint(proof[0], name)["terms"]["proof"]
    assert term["times_K"].tolist() == [2] * 57
    norms = term["rows_KD"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(57))


def test_ranks_end_with_the_same_student_connector_and_bank(
    proof: tuple[Path, dict[str, Any]],
) -> None:
    mine, other = proof[1]["proof on two ranks, before step 3"]["states"]
    assert mine == other
    assert {"terms.1.rows_KD", "terms.1.times_K", "terms.1.connector.0.weight"} <= set(mine)


def test_the_term_has_its_own_rates(proof: tuple[Path, dict[str, Any]]) -> None:
    saved = checkpoint(proof[0], "proof, before step 2")
    student, connector, head = saved["optimizer"]["param_groups"]
    assert connector["lr"] == pytest.approx(0.1 * student["lr"])
    assert head["lr"] == pytest.approx(2.0 * student["lr"])
    decays = [group["weight_decay"] for group in (student, connector, head)]
    assert decays == [5e-4, 5e-4, 0.0]
    assert len(saved["optimizer"]["state"]) == sum(
        len(group["params"]) for group in (student, connector, head)
    )
