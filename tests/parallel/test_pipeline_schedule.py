"""Ticks, bubble and memory of pipelines by formula, against schedules that are played out tick by tick."""

import itertools

import pytest
from pydantic import ValidationError

from maxlm.parallel.pipeline_schedule import PipelineConfig, Turns

SIZES = list(itertools.product((2, 3, 5), (1, 2, 4, 9), (1, 2, 3)))


def turns(schedule, stages, microbatches, repeats=1, units=12):
    return Turns(schedule, stages, microbatches, repeats, units)


def played(stages, microbatches, repeats):
    """The tick in which each microbatch is run by each stage in each repeat, if each is run as early as can be, in the
    order of repeats."""
    done, free = {}, [0] * stages
    for repeat, micro in itertools.product(range(repeats), range(microbatches)):
        for stage in range(stages):
            before = (repeat, micro, stage - 1) if stage else (repeat - 1, micro, stages - 1)
            done[repeat, micro, stage] = free[stage] = max(free[stage], done.get(before, -1) + 1)
            free[stage] += 1
    return done


@pytest.mark.parametrize(("stages", "microbatches", "repeats"), SIZES)
def test_forward_takes_as_many_ticks_as_when_each_turn_comes_as_early_as_it_can(stages, microbatches, repeats):
    if repeats > 1 and microbatches < stages:
        pytest.skip("refused: a microbatch would come around before the last has entered")
    ticks = played(stages, microbatches, repeats)
    found = turns("interleaved" if repeats > 1 else "gpipe", stages, microbatches, repeats)
    assert found.forward_ticks == max(ticks.values()) + 1
    idle = found.forward_ticks - repeats * microbatches
    assert found.bubble == pytest.approx(idle / found.forward_ticks)


@pytest.mark.parametrize(("stages", "microbatches"), [(p, m) for p, m, v in SIZES if v == 1])
def test_1f1b_keeps_order_in_its_ticks_and_needs_a_ring_of_2p_minus_1_places(stages, microbatches):
    forward = {(m, s): m + s for m in range(microbatches) for s in range(stages)}
    backward = {(m, s): m + 2 * stages - 2 - s for m, s in forward}
    for m, s in forward:
        assert s == 0 or forward[m, s] > forward[m, s - 1]
        assert s == stages - 1 or backward[m, s] > backward[m, s + 1]
        assert backward[m, s] >= forward[m, s]
    found = turns("1f1b", stages, microbatches)
    warm, both, cool = found.scans
    assert max(backward.values()) + 1 == warm + both + cool
    assert max(forward.values()) < warm + both
    assert min(backward.values()) == warm
    # A place is written again in the tick after it was last read, or later.
    for (m, s), tick in forward.items():
        assert all(backward[n, s] < tick for n in range(m) if n % found.kept == m % found.kept)
    # In time of forward f and backward b the stages are busy M (f + b) of it.
    f, b = 1.0, 2.0
    whole = warm * f + both * (f + b) + cool * b
    assert found.bubble == pytest.approx(1 - microbatches * (f + b) / whole)


@pytest.mark.parametrize(("units", "repeats"), [(12, 1), (13, 2), (1, 1), (7, 3)])
def test_units_that_do_not_divide_are_padded_by_as_few_as_can_be(units, repeats):
    found = turns("interleaved", 4, 8, repeats, units)
    assert 0 <= found.padding < 4 * repeats
    assert found.per_turn * 4 * repeats == units + found.padding


def test_more_repeats_make_a_smaller_bubble_and_more_passing_on():
    once, twice = turns("gpipe", 4, 8), turns("interleaved", 4, 8, 2)
    assert twice.bubble == 3 / 19 < once.bubble == 3 / 11
    assert twice.passed_on > once.passed_on


@pytest.mark.parametrize(("schedule", "repeats"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 3)])
def test_gathering_once_a_step_moves_each_weight_once_and_by_layer_twice_a_tick(schedule, repeats):
    found = turns(schedule, 4, 8, repeats)
    once, by_layer = PipelineConfig(gather_weights="step"), PipelineConfig(gather_weights="layer")
    # Of a stage's 1200 bytes, each of 4 devices has 300.
    assert found.gathered_bytes(once, 1200, 4)[0] == 900
    ticks = 8 * repeats + 3
    assert found.gathered_bytes(by_layer, 1200, 4) == pytest.approx((2 * ticks * 900 / repeats, ticks * 900 / repeats))
    assert found.gathered_bytes(once, 1200, 4)[1] == found.gathered_bytes(by_layer, 1200, 4)[1]


@pytest.mark.parametrize(("schedule", "repeats"), [("1f1b", 2), ("gpipe", 2), ("interleaved", 1)])
def test_repeats_belong_to_the_interleaved_schedule(schedule, repeats):
    with pytest.raises(ValidationError, match=f"{schedule}.*repeats = {repeats}"):
        PipelineConfig(schedule=schedule, repeats=repeats)
