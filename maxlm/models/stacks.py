"""Which layers of a model are alike, and how they are stacked to be run by a scan. Needs no JAX.

Layers differ in kind: attention may be local or global, the feed-forward block one or many experts. The kinds of a
model's layers, in order, are cut into segments, each a pattern of kinds that repeats. A position of a segment's pattern
is a stack: its layers' parameters lie in one array each, `[layers, ...]`, under the stack's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple


class LayerKind(NamedTuple):
    """What makes one layer unlike another of the same model."""

    local: bool = False
    """attention sees a window or a chunk of positions only"""
    experts: bool = False
    """the feed-forward block is a mixture of experts"""
    causal: bool = True
    """attention sees no later positions"""
    cross: bool = False
    """the layer also attends to the encoder's result"""


class Stack(NamedTuple):
    """Layers of one kind whose parameters are stacked: `layers[i]` is the number, in the model, of the i-th."""

    name: str
    kind: LayerKind
    layers: range


class Place(NamedTuple):
    """Where a layer's parameters lie: the stack's name and its number in it."""

    stack: str
    index: int
    kind: LayerKind


# A segment: its stacks are run in turn, one layer of each, as often as each has layers.
Segment = tuple[Stack, ...]


@cache
def segments(kinds: tuple[LayerKind, ...]) -> tuple[Segment, ...]:
    """Cuts layers into segments, with the fewest stacks in all: each is a body that is compiled.

    40 equal layers are one stack of 40; ten times five local layers and a global one are six stacks of 10; 3 dense
    layers before 58 of experts are stacks of 3 and of 58.
    """
    found: list[Segment] = []
    first = n_stacks = 0
    for period, repeats in _patterns(kinds):
        found.append(
            tuple(
                Stack(
                    str(n_stacks + place),
                    kinds[first + place],
                    range(first + place, first + period * repeats, period),
                )
                for place in range(period)
            )
        )
        n_stacks += period
        first += period * repeats
    return tuple(found)


@cache
def places(kinds: tuple[LayerKind, ...]) -> tuple[Place, ...]:
    """Where the parameters of every layer are, in order."""
    found = {
        layer: Place(stack.name, index, stack.kind)
        for segment in segments(kinds)
        for stack in segment
        for index, layer in enumerate(stack.layers)
    }
    return tuple(found[layer] for layer in range(len(kinds)))


def longest(segments: tuple[Segment, ...]) -> Segment:
    """The segment that stages share: the one with most layers. All stages run the others alike."""
    return max(segments, key=lambda segment: sum(len(stack.layers) for stack in segment))


def _patterns(kinds: Sequence[LayerKind]) -> list[tuple[int, int]]:
    """The period and repeats of each segment. Of cuts with equally many stacks, one with few and long segments.

    Found from the last layer back: the best cut of the last n layers is a first segment and the best cut behind it.
    """
    best: list[tuple[int, int, list[tuple[int, int]]]] = [(0, 0, [])]
    for n_left in range(1, len(kinds) + 1):
        layers, choices = kinds[len(kinds) - n_left :], []
        for period in range(1, n_left + 1):
            repeats = 1
            while layers[:period] == layers[(repeats - 1) * period : repeats * period]:
                stacks, n_segments, behind = best[n_left - repeats * period]
                choices.append((period + stacks, n_segments + 1, -repeats * period, [(period, repeats), *behind]))
                repeats += 1
        stacks, n_segments, _, cut = min(choices)
        best.append((stacks, n_segments, cut))
    return best[-1][2]
