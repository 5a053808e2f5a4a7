"""The bytes that the roofline counts of attention over shared rows are those of the program."""

import pytest

from maxlm.kernels.masks import Mask
from maxlm.planning.context_cost import context_cost, ring_shares
from maxlm.planning.layout import Cost
from tests import latents, tiny
from tests.kernels.test_ring_attention import KEYS_AND_VALUES, sent

BIG = {"seq_len": 512, "global_batch_tokens": 8 * 512}


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("window", [None, 30, 100, 300])
def test_shares_of_keys_are_what_the_program_passes_on(devices, window):
    mask, share = Mask(window=window), KEYS_AND_VALUES * 512 // devices * 2 * 4 * 4
    forward, home = ring_shares(mask, devices, 512, 512)
    assert sent(mask, devices, backward=False)[1] == forward * share
    assert sent(mask, devices, backward=True)[1] == (2 * forward + home) * share


def counted(kind, n_bytes, *axes):
    assert axes == ("context",)
    return Cost(ici_bytes=n_bytes, dcn_bytes=1.0 if kind == "all-to-all" else 0.0)


def bytes_of(model, context, **mesh):
    run = tiny.config(model={**tiny.LLAMA, "max_seq_len": 512, **model}, train=BIG)
    return context_cost(run, {"context": context, **mesh}, counted).ici_bytes


def test_a_step_counts_every_layer_forward_again_and_backward():
    keys = 8 * 512 // 4 * 2 * 2 * 16  # tokens, heads, keys and values, width
    assert bytes_of({}, 1) == 0
    assert bytes_of({}, 4) == 3 * 4 * keys * (3 + 3 + 4)
    assert bytes_of({"remat": {"policy": "full"}}, 4) == 3 * 4 * keys * (3 + 3 + 3 + 4)
    assert bytes_of({"remat": {"policy": "names", "names": ["flash_out", "flash_lse"]}}, 4) == bytes_of({}, 4)
    assert bytes_of({}, 4, data=2, tensor=2) == bytes_of({}, 4) / 4
    assert bytes_of({"attention_window": 20}, 4) == 3 * 4 * keys * (1 + 1 + 1)


def test_exchanges_count_queries_outputs_and_key_heads_as_often_as_they_are_repeated():
    tokens = 8 * 512 // 4 * 16 * 4  # times width and bytes
    ours = {"context_attention": "all_to_all"}
    assert bytes_of(ours, 4) == 3 * 2 * tokens * 2 * (4 + 4)
    assert bytes_of({**ours, "n_kv_heads": 4}, 4) == bytes_of(ours, 4)
    widths = latents.LATENT["latent"]
    both = (widths["nope_head_dim"] + widths["rope_head_dim"] + widths["v_head_dim"]) / 2
    assert (
        bytes_of({**latents.LATENT, "max_seq_len": 512, **ours}, 4)
        == bytes_of({**ours, "n_kv_heads": 4}, 4) * both / 16
    )


def test_lengths_of_sides_are_their_own():
    run = tiny.config(model={**tiny.T5, "max_seq_len": 512}, train=BIG, data={"objective": {"kind": "span_corruption"}})
    lengths = run.row_lengths
    keys = 8 // 2 * 4 * 2 * 20 * 4  # rows over devices, heads, keys and values, width, bytes
    shares = 2 * (1 + 1 + 2)
    layers = {"encoder": 2, "decoder": 3}
    once = layers["encoder"] * lengths.encoder + layers["decoder"] * (lengths.decoder + lengths.encoder)
    assert context_cost(run, {"context": 2}, counted).ici_bytes == once * keys * shares / 2
