"""Finds the tokens at which generation has to stop, and reports replies that do not end in one of them."""

import logging
from collections import Counter

import pyarrow.compute as pc
from datasets import Dataset

from forge.task.causal_lm.documents import Encoder

logger = logging.getLogger(__name__)


def stop_tokens(encoder: Encoder, splits: dict[str, Dataset]) -> list[int]:
    """Return the tokenizer's end token, and each special token that ends a reply.

    A model that never learns one of them at the end of its replies does not stop, however right its tokens are: that
    is reported for each split.
    """
    tokenizer = encoder.tokenizer
    ends = {split: _last_tokens(rows) for split, rows in splits.items()}
    stops = {token for counts in ends.values() for token in counts} & encoder.special_ids
    stops |= {tokenizer.eos_token_id} - {None}
    if encoder.form.name == "messages" or encoder.config.append_eos:
        for split, counts in ends.items():
            _report(encoder, split, splits[split], counts, stops)
    return sorted(stops)


def _last_tokens(rows: Dataset) -> Counter[int]:
    """Return how many replies end in each token."""
    found = rows.select_columns("ends").with_format("arrow")[:]["ends"].combine_chunks()
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(found.flatten()).to_pylist()})


def _report(encoder: Encoder, split: str, rows: Dataset, counts: Counter[int], stops: set[int]) -> None:
    right = sorted(token for token in counts if token in stops)
    names = ", ".join(encoder.tokenizer.convert_ids_to_tokens(right))
    open_ended = counts.total() - sum(counts[token] for token in right)
    if not open_ended:
        logger.info("%s: each reply ends in a token at which generation stops (%s)", split, names)
        return
    first, token = next((row["row"], end) for row in rows for end in row["ends"] if end not in stops)
    logger.warning(
        "%s: %d of %d replies end in a token at which generation does not stop (%r in row %d), so the model does not "
        "learn to stop; let the chat template write one special token of the tokenizer, such as %s, at the end of each "
        "reply, and where it has {%% generation %%} markers, between them",
        *(split, open_ended, counts.total(), encoder.tokenizer.decode([token]), first),
        encoder.tokenizer.eos_token or "its end token",
    )
