"""Which documents are kept, for what, and when there are too many that cannot be used."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from maxlm.data.config import DataConfig
from maxlm.data.sources import Bad, Document, list_work, read_item
from maxlm.errors import DataError

EXAMPLES = 100  # bad documents named, for each item of work
_SHOWN = 5
_EARLY = 1000  # documents to have seen before stopping ahead of the end


def is_heldout(document: Document, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its text, so equal documents go the same way in any run."""
    digest = hashlib.blake2b(document.raw, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


class BadDocuments:
    """Counts documents that cannot be used, and stops when there are too many."""

    def __init__(self, max_fraction: float):
        self.max_fraction = max_fraction
        self.good = 0
        self.kinds: Counter[str] = Counter()
        self.examples: list[Bad] = []

    def add(self, bad: Bad) -> None:
        """Counts one."""
        self.kinds[bad.kind] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(bad)

    def check(self, *, final: bool) -> None:
        """Raises DataError, with the first places, where there are more than `max_fraction`."""
        n_bad = self.kinds.total()
        seen = n_bad + self.good
        if n_bad <= self.max_fraction * seen or (not final and seen < _EARLY):
            return
        shown = "\n".join(f"  {bad.place}: {bad.kind}: {bad.message}" for bad in self.examples[:_SHOWN])
        more = f"\n  and {n_bad - _SHOWN} more" if n_bad > _SHOWN else ""
        raise DataError(
            f"{n_bad} of {seen} documents cannot be used ({self.summary()}), more than data.max_bad_fraction "
            f"({self.max_fraction:g}) allows. Mend or leave out these, or raise it:\n{shown}{more}"
        )

    def summary(self) -> str:
        """The counts in words."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))


class TrainingTexts:
    """The texts of all sources, held-out ones aside; each iteration reads them anew."""

    def __init__(self, data: DataConfig):
        self.data = data

    def __iter__(self) -> Iterator[str]:
        """Raises DataError where too many documents are bad."""
        bad = BadDocuments(self.data.max_bad_fraction)
        for item in list_work(self.data):
            for document in read_item(item, self.data):
                if isinstance(document, Bad):
                    bad.add(document)
                    bad.check(final=False)
                    continue
                bad.good += 1
                if not is_heldout(document, self.data.heldout_fraction):
                    yield document.text
        bad.check(final=True)
