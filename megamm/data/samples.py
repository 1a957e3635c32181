"""Several samples of a dataset at once, as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from megamm.ops.documents import Stretches, gather_documents


class Samples(NamedTuple):
    """n samples; nothing of them is copied.

    Attributes:
        stretches: their ids and what of them is learnt.
        first_images, num_images: [n] int64, sample i has the image records first_images[i] ...
            first_images[i] + num_images[i] - 1.
    """

    stretches: Stretches
    first_images: np.ndarray
    num_images: np.ndarray

    def images(self, number: int) -> range:
        """The image records of a sample."""
        first = int(self.first_images[number])
        return range(first, first + int(self.num_images[number]))

    @staticmethod
    def joined(parts: Sequence[Samples], order: np.ndarray) -> Samples:
        """Samples of several datasets as if they were of one: they are copied behind one another.

        Args:
            order: [n], where each sample lies, in the order that is wanted, counted through all parts.
        """
        tokens, learnt, lengths = [], [], []
        for part in parts:
            of_tokens, of_learnt, starts, ends = part.stretches
            tokens.append(gather_documents(of_tokens, starts, ends)[0])
            learnt.append(gather_documents(of_learnt, starts, ends)[0])
            lengths.append(ends - starts)
        chosen = torch.from_numpy(order)
        ends = torch.cumsum(torch.cat(lengths), 0)
        stretches = Stretches(
            torch.cat(tokens), torch.cat(learnt), (ends - torch.cat(lengths))[chosen], ends[chosen]
        )
        first = np.concatenate([part.first_images for part in parts])[order]
        return Samples(stretches, first, np.concatenate([part.num_images for part in parts])[order])
