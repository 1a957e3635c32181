"""Stored samples become documents of at most so many positions; documents become a micro-batch.

What a document is (which image is cut off, what its labels are) is spelled out in `ops.documents`:
`kept_ref` and `document_ref`. Here many are handled per call, and nothing is copied before rows are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megamm.batch import Batch
from megamm.ops.documents import Image, Sizes, Stretches, document_sizes, fill_rows, kept_ref


class Documents(NamedTuple):
    """n samples, each cut to fit its place, not yet written.

    Attributes:
        samples: as they are stored.
        sizes: what is left of each.
    """

    samples: Stretches
    sizes: Sizes


@dataclass(frozen=True)
class Assembler:
    """Expands images to the positions they take, cuts, and shifts labels.

    Attributes:
        tokens_per_image: positions of an image.
        image_id, pad_id: of the tokenizer.
    """

    tokens_per_image: int
    image_id: int
    pad_id: int

    def kept(self, tokens: np.ndarray, max_length: int, max_images: int) -> tuple[int, int]:
        """(positions, images) that are left of a sample with ids `tokens` [n].

        Too long a sample is cut at `max_length` positions, or before the image that would be cut through
        or is one too many; that image and those after it are dropped. A sample that loses everything
        keeps one position of padding.
        """
        return kept_ref(tokens, max_length, max_images, self._image)

    def documents(
        self, samples: Stretches, max_lengths: Sequence[int], max_images: Sequence[int]
    ) -> Documents:
        """The documents of n samples, each cut as `kept` says to its own max_lengths and max_images [n].

        The label of a position is the id behind it, where that is learnt; the last position of a document
        predicts nothing.
        """
        limits = torch.from_numpy(np.array([max_lengths, max_images], np.int64))
        return Documents(samples, document_sizes(samples, limits[0], limits[1], self._image))

    def batch(
        self,
        documents: Documents,
        length: int,
        packed: bool,
        images: Sequence[torch.Tensor],
        image_size: int,
        sample_ids: Sequence[int],
        num_skipped: int,
    ) -> Batch:
        """The micro-batch of `documents`.

        Args:
            length: positions of a row.
            packed: all documents in one row; otherwise each has its own.
            images: [3, image_size, image_size] each, those of all documents in their order.
        """
        sizes, count = documents.sizes, len(documents.samples.starts)
        num_rows = 1 if packed else count
        input_ids, labels, position_ids = fill_rows(
            documents.samples,
            sizes,
            torch.from_numpy(np.zeros(count, np.int64) if packed else np.arange(count)),
            num_rows,
            length,
            self._image,
            self.pad_id,
            restart=packed,
        )
        used, num_images = int(sizes.positions.sum()), sizes.images
        lengths = sizes.positions.tolist() if packed else [length] * num_rows
        return Batch(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            images=torch.stack(list(images)) if images else torch.empty(0, 3, image_size, image_size),
            images_per_sample=torch.from_numpy(
                num_images.sum(keepdims=True) if packed else num_images.copy()
            ),
            sample_ids=torch.from_numpy(np.array(sample_ids, np.int64)),
            num_skipped=num_skipped,
            packed=packed,
            num_padding=num_rows * length - used,
            num_labels=int(sizes.num_labels.sum()),
            num_pairs=sum(n * n for n in lengths) // 2,
        )

    @property
    def _image(self) -> Image:
        return Image(self.image_id, self.tokens_per_image)
