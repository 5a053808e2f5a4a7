"""How layers of several kinds are cut into stacks."""

import random

import pytest

from maxlm.models.stacks import LayerKind, places, segments

GLOBAL, LOCAL, EXPERTS = LayerKind(), LayerKind(local=True), LayerKind(experts=True)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ((GLOBAL,) * 126, [[126]]),
        ((*(LOCAL,) * 5, GLOBAL) * 10 + (LOCAL,) * 2, [[10] * 6, [2]]),  # Gemma 3 27B
        ((LOCAL, GLOBAL) * 13, [[13, 13]]),  # Gemma 2 2B
        ((GLOBAL,) * 3 + (EXPERTS,) * 58, [[3], [58]]),  # DeepSeek-V3
        ((GLOBAL,) * 28 + (LOCAL,) * 4, [[28], [4]]),  # Qwen2's max_window_layers
    ],
    ids=["alike", "gemma3", "gemma2", "deepseek", "qwen2"],
)
def test_patterns_of_public_models_are_found(kinds, expected):
    found = [[len(stack.layers) for stack in segment] for segment in segments(kinds)]
    assert found == expected


def test_any_layers_are_run_in_their_order_each_once():
    rng = random.Random(0)
    for _ in range(200):
        kinds = tuple(rng.choice((GLOBAL, LOCAL, EXPERTS)) for _ in range(rng.randint(1, 14)))
        run = [
            (stack.layers[turn], stack.kind)
            for segment in segments(kinds)
            for turn in range(len(segment[0].layers))
            for stack in segment
        ]
        assert run == list(enumerate(kinds))
        names = [stack.name for segment in segments(kinds) for stack in segment]
        assert names == [str(i) for i in range(len(names))]
        for layer, kind in enumerate(kinds):
            place = places(kinds)[layer]
            stack = next(s for segment in segments(kinds) for s in segment if s.name == place.stack)
            assert (stack.layers[place.index], stack.kind) == (layer, kind)
