"""What tokens send to experts on other devices, against the formulas of the page on them."""

import pytest

from maxlm.planning.expert_cost import expert_cost
from maxlm.planning.layout import Cost
from tests import tiny, tiny_moe

ROWS, LENGTH, WIDTH, CHOICES, LAYERS = 16, 32, 64, 2, 3


def bytes_of(remat="full", ragged=True, **moe):
    """Bytes that a device gives to collectives, by kind."""
    model = {**tiny_moe.MIXTRAL, "moe": {**tiny_moe.MIXTRAL["moe"], **moe}, "remat": {"policy": remat}}
    found = {}

    def cost(kind, n_bytes, *axes):
        assert axes == ("expert",)
        found[kind] = found.get(kind, 0) + n_bytes
        return Cost(ici_bytes=n_bytes)

    sizes = {"expert": 4, "fsdp": 2}
    total = expert_cost(tiny.config(model=model), sizes, cost, ragged=ragged)
    return found, total.ici_bytes


@pytest.mark.parametrize(("remat", "there"), [("full", 3), ("none", 2)])
def test_rows_travel_there_and_back_and_once_more_where_they_are_made_again(remat, there):
    found, total = bytes_of(remat, dispatch="all_to_all")
    rows = ROWS * LENGTH // 8 * CHOICES
    share, row = 4, WIDTH * 4
    assert found.keys() == {"all-to-all"}
    # Shares travel with the rows that experts take.
    assert total == LAYERS * rows * ((row + share) * there + row * 2)


def test_all_tokens_are_gathered_where_that_is_chosen():
    found, total = bytes_of(dispatch="all_gather")
    everything = ROWS * LENGTH // 2 * WIDTH * 4
    assert found == {"all-gather": everything, "reduce-scatter": everything}
    assert total == LAYERS * 5 * everything


def test_padding_travels_too_where_rows_are_not_ragged():
    ragged, padded = (
        bytes_of(ragged=ragged, dispatch="all_to_all", exchange_factor=1.5)[1] for ragged in (True, False)
    )
    assert padded == 1.5 * ragged
