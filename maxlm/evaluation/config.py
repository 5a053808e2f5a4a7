"""When a run is evaluated on held-out documents, and on how many."""

from maxlm.section import Section, key


class EvaluationConfig(Section):
    """Evaluation inside a run; the last step is always evaluated where there are held-out documents."""

    every: int | None = key(None, "steps between two evaluations; null: at the end alone", unit="steps", ge=1)
    max_batches: int | None = key(
        None, "how many batches of held-out documents at most; null: all of them", unit="batches", ge=1
    )
