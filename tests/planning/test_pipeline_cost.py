"""What a plan says of a pipeline, against the formulas of the page on pipelines, worked out by hand."""

import pytest

from maxlm.planning.layout import Cost
from maxlm.planning.pipeline_cost import Pipelined
from maxlm.planning.roofline import roofline
from maxlm.planning.topology import parse_topology
from tests import tiny

SIZES = {"pipeline": 4, "data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
MODEL = {**tiny.LLAMA, "n_layers": 6}


def config(**pipeline):
    sections = {"train": {"global_batch_tokens": 1024}, "mesh": {"pipeline": 4, "fsdp": 2}}
    return tiny.config(model=MODEL, pipeline={"microbatches": 8, **pipeline}, **sections)


def test_bubble_ticks_and_padding_are_those_of_the_formulas():
    said = Pipelined.of(config(), SIZES).to_dict()
    # 6 layers on 4 stages are 2 each, and 2 of padding; 8 microbatches take 8 + 3 ticks.
    assert (said["layers_a_turn"], said["padding"], said["ticks"], said["turns_kept"]) == (2, 2, 11, 7)
    assert said["bubble"] == pytest.approx(3 / 11)
    assert Pipelined.of(config(), SIZES).stretch == pytest.approx(8 / 6 * 11 / 8)
    assert Pipelined.of(config(), {**SIZES, "pipeline": 1}) is None


def test_weights_are_gathered_twice_a_tick_or_once_a_step():
    said = Pipelined.of(config(), SIZES).to_dict()["gathered_bytes"]
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64  # q and o, k and v, MLP, norms
    received = 6 / 4 * layer * 4 / 2  # of a stage's share, float32, half of it from the other device
    assert said == {"layer": pytest.approx(received * 11 * 3), "step": pytest.approx(received * (1 + 11))}


def test_streams_are_handed_on_in_every_tick_and_layers_go_to_their_stages_and_back():
    found = {}

    def cost(kind, n_bytes, *axes):
        assert axes == ("pipeline",)
        found[kind] = n_bytes
        return Cost(ici_bytes=n_bytes)

    total = Pipelined.of(config(), SIZES).cost(cost).ici_bytes
    assert found["collective-permute"] == 2 * 32 * 64 * 4  # two rows of 32 tokens a device and microbatch
    assert total == 22 * found["collective-permute"] + 2 * found["all-to-all"]


def test_the_roofline_waits_for_the_bubble_and_a_longer_one_takes_longer():
    topology = parse_topology("v5p:2x2x2", 1)

    def seconds(microbatches):
        parts = roofline(config(microbatches=microbatches), topology, SIZES).parts
        return sum(part.compute_seconds for part in parts if "mlp" in part.name)

    assert seconds(2) / seconds(8) == pytest.approx((5 / 2) / (11 / 8))


def test_an_encoder_decoders_stages_have_the_decoders_weights():
    run = tiny.config(model=tiny.BART, mesh={"pipeline": 2}, pipeline={"schedule": "gpipe", "microbatches": 4})
    weights = Pipelined.of(run, {**SIZES, "pipeline": 2}).stage_weights()
    assert weights
    assert {weight.stack for weight in weights} == {"decoder.0"}
