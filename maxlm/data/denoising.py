"""Objectives that are drawn: prefixes for decoders, masked tokens for encoders, missing spans for encoder-decoders.

What is drawn for a row is a pure function of the run's seed and the row's number, as its tokens are: from the bits of
Philox (Salmon et al. 2011), which are the same in every version of NumPy.

Shapes: B rows, T tokens in a row, of windows of T + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from maxlm.data.objective import Objective
from maxlm.data.objectives import causal_batch, uniform
from maxlm.data.sentence_pairs import N_DRAWS, Windows, pair_batch

# BERT's shares of chosen tokens that are masked, and that are replaced by any token; the others stay.
MASKED, REPLACED = 0.8, 0.1


class Marks(NamedTuple):
    """What the token store's tokenizer says."""

    bos_id: int | None
    eos_id: int | None
    vocab_size: int


class Draws(NamedTuple):
    """Where a batch's random numbers come from."""

    seed: int
    stream: int
    """0 for training, 1 for evaluation; `of_pairs` adds 2"""
    numbers: np.ndarray
    """int[B]: each row's number in the run"""

    def bits(self, count: int) -> np.ndarray:
        """uint64[B, count], each row's own."""
        made = [
            np.random.Philox(key=[self.seed % 2**64, self.stream], counter=[0, 0, 0, number]).random_raw(count)
            for number in self.numbers.tolist()
        ]
        return np.array(made, np.uint64).reshape(len(made), count)

    def of_pairs(self) -> np.ndarray:
        """uint64[B, 1 + N_DRAWS]: what says which the other window of a pair is, then the pair's own."""
        return self._replace(stream=self.stream + 2).bits(1 + N_DRAWS)


def make_batch(
    how: Objective,
    windows: np.ndarray,
    marks: Marks,
    draws: Draws,
    lengths: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
    others: Windows | None = None,
) -> dict[str, np.ndarray]:
    """The batch of windows [B, T + 1]. `lengths` int[B] says how many of a window's tokens there are, all unless given;
    `sizes` [B, T + 1] is of the tokens and becomes `target_bytes`, of the targets; `others` has, where next sentences
    are asked for, the windows of parts that do not follow."""
    if how.kind == "span_corruption":
        return _span_corruption(how, windows, marks, draws, lengths, sizes)
    if how.next_sentence:
        first, bits = Windows(windows, lengths, sizes), draws.of_pairs()[:, 1:]
        batch, sizes = pair_batch(first, others, marks.bos_id, marks.eos_id, bits)
    else:
        batch = causal_batch(windows, marks.bos_id, marks.eos_id, lengths)
    if how.kind == "mlm":
        batch = _mlm(how, batch, marks, draws)
    elif how.kind == "prefix_lm":
        batch = prefix_batch(batch, draws)
    if sizes is not None:
        sizes = sizes[:, : batch["inputs"].shape[1]] if how.kind == "mlm" else sizes[:, 1:]
        batch["target_bytes"] = (sizes * batch["weights"]).astype(np.float32)
    return batch


def prefix_batch(batch: dict[str, np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
    """The batch for a prefix language model (arXiv:1910.10683, section 3.2.3) of one for next tokens: in each document
    of a row, of n tokens that are to be told, the first 1 to n tokens become its prefix, each number equally likely.

    `prefix` bool[B, T] marks them. What is told of a document begins with the token behind its prefix.
    """
    rows_B1, segments, positions = np.arange(len(batch["inputs"]))[:, None], batch["segments"], batch["positions"]
    told = np.zeros((segments.shape[0], segments.shape[1] + 1), np.int64)
    np.add.at(told, (rows_B1, segments), batch["weights"] > 0)
    told = told[rows_B1, segments]
    # A document's number is the one at the place where it begins.
    begins = np.arange(segments.shape[1]) - positions
    drawn = uniform(draws.bits(segments.shape[1])[rows_B1, begins])
    lengths = np.where(segments > 0, np.minimum(1 + (drawn * told).astype(np.int64), told), 0)
    weights = batch["weights"] * (positions >= lengths - 1)
    return batch | {"weights": weights.astype(np.float32), "prefix": positions < lengths}


def _mlm(how: Objective, batch: dict[str, np.ndarray], marks: Marks, draws: Draws) -> dict[str, np.ndarray]:
    """BERT's masked tokens (arXiv:1810.04805, section 3.1), others each time a row comes (RoBERTa's dynamic masking,
    arXiv:1907.11692): in each row the rate of its tokens, bos and eos apart, is to be told."""
    tokens = batch["inputs"]
    here = (batch["segments"] > 0) & ~np.isin(tokens, [i for i in (marks.bos_id, marks.eos_id) if i is not None])
    bits = draws.bits(3 * tokens.shape[1]).reshape(len(tokens), 3, -1)
    ranked = np.where(here, bits[:, 0] >> np.uint64(1), np.uint64(2**64 - 1))
    wanted = np.rint(here.sum(axis=1) * how.mask_rate)
    ranks = np.argsort(np.argsort(ranked, axis=1, kind="stable"), axis=1, kind="stable")
    chosen = here & (ranks < np.maximum(wanted, 1)[:, None])
    drawn = uniform(bits[:, 1])
    anything = (bits[:, 2] % np.uint64(marks.vocab_size)).astype(np.int32)
    inputs = np.where(chosen & (drawn < MASKED), how.special_id, tokens)
    inputs = np.where(chosen & (drawn >= MASKED) & (drawn < MASKED + REPLACED), anything, inputs)
    targets = np.where(chosen, tokens, 0)
    return batch | {
        "inputs": inputs.astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": chosen.astype(np.float32),
    }


def _span_corruption(
    how: Objective,
    windows: np.ndarray,
    marks: Marks,
    draws: Draws,
    lengths: np.ndarray | None,
    sizes: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """T5's missing spans (arXiv:1910.10683, section 3.1.4): the encoder gets the first T tokens of a window with a
    sentinel for each span, the decoder is to tell the sentinels and their spans; both end in eos. As there, a row is
    one text, of however many documents."""
    n_rows, seq_len = len(windows), windows.shape[1] - 1
    encoder_length, decoder_length = how.lengths(seq_len)
    bits = draws.bits(2 * seq_len)
    encoder = np.zeros((n_rows, encoder_length), np.int32)
    n_encoder, n_targets = np.zeros(n_rows, int), np.zeros(n_rows, int)
    targets, source = np.zeros((n_rows, decoder_length), np.int32), np.full((n_rows, decoder_length), -1)
    end = [] if marks.eos_id is None else [marks.eos_id]
    for row in range(n_rows):
        length = seq_len if lengths is None else max(0, min(seq_len, int(lengths[row]) - 1))
        missing, spans = how.spans(length)
        kept = _parts(length - missing, spans, bits[row, :seq_len])
        gone = _parts(missing, spans, bits[row, seq_len:])
        inputs, outputs, places, at = [], [], [], 0
        for span, (n_kept, n_gone) in enumerate(zip(kept, gone, strict=True)):
            sentinel, middle = [how.special_id - span], at + n_kept
            inputs += [*windows[row, at:middle].tolist(), *sentinel]
            outputs += sentinel + windows[row, middle : middle + n_gone].tolist()
            places += [-1, *range(middle, middle + n_gone)]
            at = middle + n_gone
        if spans:
            inputs, outputs, places = inputs + end, outputs + end, places + [-1] * len(end)
        n_encoder[row], n_targets[row] = len(inputs), len(outputs)
        encoder[row, : len(inputs)], targets[row, : len(outputs)] = inputs, outputs
        source[row, : len(places)] = places
    decoder = np.concatenate([np.full((n_rows, 1), how.start_id, np.int32), targets[:, :-1]], axis=1)
    weights = (np.arange(decoder_length) < n_targets[:, None]).astype(np.float32)
    batch = {
        "inputs": np.where(weights > 0, decoder, 0).astype(np.int32),
        "targets": targets,
        "segments": weights.astype(np.int32),
        "positions": np.broadcast_to(np.arange(decoder_length, dtype=np.int32), targets.shape).copy(),
        "weights": weights,
        "encoder_inputs": encoder,
        "encoder_segments": (np.arange(encoder_length) < n_encoder[:, None]).astype(np.int32),
        "encoder_positions": np.broadcast_to(np.arange(encoder_length, dtype=np.int32), encoder.shape).copy(),
    }
    if sizes is not None:
        told = np.take_along_axis(sizes, np.maximum(source, 0), axis=1)
        batch["target_bytes"] = np.where(source >= 0, told, 0).astype(np.float32)
    return batch


def _parts(items: int, parts: int, bits: np.ndarray) -> list[int]:
    """Sizes of `items` in a row cut into `parts`, none empty, each cut equally likely."""
    if not parts:
        return []
    cuts = np.sort(np.argsort(bits[: items - 1], kind="stable")[: parts - 1]) + 1
    return np.diff([0, *cuts.tolist(), items]).tolist()
