"""One sample as a document, the way a batch would hold it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megamm.data.assemble import Assembler
from megamm.ops.documents import Stretches


class Document(NamedTuple):
    """One sample, cut to fit, without padding."""

    input_ids: np.ndarray
    labels: np.ndarray
    num_images: int
    num_dropped_images: int
    truncated: bool
    learnt: bool


def document(
    assembler: Assembler, tokens: np.ndarray, learnt: np.ndarray, length: int, images: int
) -> Document:
    """The sample in a place of so many positions and images."""
    one = assembler.documents(Stretches.of([(tokens, learnt)]), [length], [images])
    sizes = one.sizes
    batch = assembler.batch(one, int(sizes.positions[0]), False, [], 1, [0], 0)
    return Document(
        batch.input_ids[0].numpy(),
        batch.labels[0].numpy(),
        int(sizes.images[0]),
        int(sizes.placeholders[0] - sizes.images[0]),
        bool(sizes.truncated[0]),
        bool(sizes.num_labels[0]),
    )
