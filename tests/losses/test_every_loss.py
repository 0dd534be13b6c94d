"""Every registered loss has numbers of its authors, a gradient in float64, and a test on two ranks.

PROOFS says where. A loss without a row, a row whose test is gone, and a docstring whose `Tests:`
does not lead there fail here. Losses whose source prints or releases no number have what their
paper's formula gives, and say so.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

from fastkd.losses.base.catalogue import entry_of
from fastkd.losses.base.registry import term_names

TESTS = Path(__file__).parents[1]


class Proof(NamedTuple):
    """Tests as file::function, with [case] where one function tests many losses."""

    numbers: str
    """Equal to the numbers of the oracle, or of its authors' code (make_peer_losses.py)."""
    gradient: str
    """Equal to autograd of the formula in float64."""
    ranks: str
    """Two ranks against one process: the joined batch, or the mean over the ranks."""


LOGITS = "losses/test_peer_losses.py::test_specified_value"
GRADIENT = "losses/test_logit_losses.py::test_loss_and_gradient_are_those_of_the_formula"
JOINED = "losses/test_terms_on_ranks.py::test_two_ranks_are_one_process_on_the_joined_batch"
APART = "losses/test_terms_on_ranks.py::test_two_ranks_are_the_mean_over_ranks"
RELATIONS = (
    "losses/test_relations.py::test_released_values",
    "losses/test_relations.py::test_value_and_gradient_are_the_formulas",
    "losses/test_relations_on_ranks.py::test_relations",
)
PEERS = "losses/test_peer_losses.py"
MAPS = "losses/test_map_losses.py"
PROOFS = {
    "ce": Proof(
        f"{LOGITS}[ce]", "ops/test_kd_loss.py::test_cross_entropy_is_torchs", f"{JOINED}[ce]"
    ),
    "bce": Proof(
        "losses/test_multilabel.py::test_values_and_gradient",
        "losses/test_multilabel.py::test_values_and_gradient",
        f"{JOINED}[bce]",
    ),
    "kd": Proof(
        f"{LOGITS}[kd_T4]",
        "ops/test_kd_loss.py::test_error_against_float64_is_at_most_twice_eager",
        f"{JOINED}[kd]",
    ),
    "mixed_ce": Proof(
        "losses/test_mixed_targets.py::test_labels_of_both_images",
        "losses/test_mixed_targets.py::test_labels_of_both_images",
        "training/test_two_ranks.py::test_gradients_are_those_of_one_process"
        "[gradients, mixed targets]",
    ),
    "soft_ce": Proof(f"{GRADIENT}[soft_ce]", f"{GRADIENT}[soft_ce]", f"{JOINED}[soft_ce]"),
    "dkd": Proof(f"{LOGITS}[dkd_a1_b8_T4]", f"{GRADIENT}[dkd]", f"{JOINED}[dkd]"),
    "dist": Proof(f"{PEERS}::test_specified_parts_of_dist", f"{GRADIENT}[dist]", f"{JOINED}[dist]"),
    "at": Proof(
        "ops/test_attention_map.py::test_published_values",
        "ops/test_attention_map.py::test_error_against_float64_is_at_most_twice_eager",
        f"{JOINED}[at]",
    ),
    **{
        name: Proof(*(f"{test}[{name}]" for test in RELATIONS))
        for name in ("sp", "pkt", "cc", "rkd")
    },
    "ab": Proof(
        "losses/test_hints.py::test_released_values_of_ab",
        "losses/test_hints.py::test_ab_is_the_squared_distance_to_the_boundary",
        f"{JOINED}[ab]",
    ),
    "fsp": Proof(
        "losses/test_fsp.py::test_released_values",
        "losses/test_fsp.py::test_value_and_gradient_are_the_formula",
        f"{JOINED}[fsp]",
    ),
    "ft": Proof(
        "losses/test_factor_transfer.py::test_released_value",
        "losses/test_factor_transfer.py::test_values_and_gradients_are_the_formulas",
        f"{APART}[ft]",
    ),
    "fitnet": Proof(
        "losses/test_hints.py::test_released_value_of_fitnet",
        "losses/test_hints.py::test_fitnet_connects_every_size",
        f"{APART}[fitnet]",
    ),
    "vid": Proof(
        "losses/test_hints.py::test_released_value_of_vid",
        "losses/test_hints.py::test_vid_is_the_gaussian_likelihood",
        f"{JOINED}[vid]",
    ),
    "nst": Proof(
        "losses/test_nst.py::test_released_value",
        "losses/test_nst.py::test_value_and_gradient_are_the_formula",
        f"{JOINED}[nst]",
    ),
    "crd": Proof(
        "losses/test_crd.py::test_released_values",
        "losses/test_crd.py::test_value_and_gradient_are_the_formula",
        "losses/test_relations_on_ranks.py"
        "::test_crd_banks_and_normalizer_are_those_of_one_process[crd]",
    ),
    "cwd": Proof(
        "losses/test_dense.py::test_cwd_is_the_released_formula",
        "losses/test_dense.py::test_cwd_is_the_released_formula",
        f"{JOINED}[cwd]",
    ),
    "mgd": Proof(
        "losses/test_dense.py::test_mgd_is_the_released_formula",
        "losses/test_dense.py::test_mgd_is_the_released_formula",
        f"{APART}[mgd]",
    ),
    "reviewkd": Proof(
        f"{PEERS}::test_reviewkd_equals_its_peer",
        f"{PEERS}::test_reviewkd_equals_its_peer",
        f"{APART}[reviewkd]",
    ),
    "simkd": Proof(
        f"{PEERS}::test_simkd_equals_its_peer",
        f"{PEERS}::test_simkd_equals_its_peer",
        f"{APART}[simkd]",
    ),
    "stage_mse": Proof(
        f"{MAPS}::test_stage_mse", f"{MAPS}::test_stage_mse", f"{JOINED}[stage_mse]"
    ),
    "jointrd": Proof(
        f"{MAPS}::test_released_jointrd_has_the_factors_of_its_code",
        f"{MAPS}::test_jointrd_joined_equals_junction_by_junction",
        f"{JOINED}[jointrd]",
    ),
    "discriminator": Proof(
        f"{PEERS}::test_discriminator_equals_its_peer",
        f"{PEERS}::test_discriminator_equals_its_peer",
        f"{JOINED}[discriminator]",
    ),
}


def test_no_loss_without_its_proofs() -> None:
    assert sorted(PROOFS) == term_names()


@pytest.mark.parametrize("name", PROOFS)
def test_the_proofs_of_a_loss_exist(name: str) -> None:
    for proof in PROOFS[name]:
        file, _, test = proof.partition("::")
        function, _, case = test.partition("[")
        tree = ast.parse((TESTS / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not case or case.removesuffix("]") in words, proof


@pytest.mark.parametrize("name", PROOFS)
def test_the_docstring_leads_to_the_proofs_and_to_released_numbers(name: str) -> None:
    entry = entry_of(name)
    files = {f"tests/{proof.partition('::')[0]}" for proof in PROOFS[name]}
    assert files - set(entry.tests) == set()
    released = any(path.endswith(".json") for path in entry.tests)
    assert released != ("no released number" in entry.proof)
