"""Keys and values of what was decoded already, so that a further token costs one position.

Shapes: B rows, P positions there is room for, heads are those of this rank, d their size, L latents of an
image.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F


class DecodingCache:
    """What the layers of one pipeline chunk remember of a batch of growing sequences.

    First the prompts are decoded, which fill it; they stand at the start of their rows, whatever follows them
    there is never attended to. From then on (`advance`) every pass decodes one further token of each row.

    Attributes:
        lengths: [B] int64, positions of each row that are filled (while the prompts are decoded: will be).
        capacity: P.
        last_image: [B] int64, number of the last image of each row, from 1; 0 for rows without images.
        is_prompt: whether the prompts are being decoded.
        table: rotary table of P positions, once a decoder has made it.
        mask: [B, 1, 1, K] bool, True for what a further token does not attend to; None: it attends to all.
    """

    def __init__(
        self, lengths: torch.Tensor, capacity: int, last_image: torch.Tensor, window: Optional[int] = None
    ) -> None:
        self.lengths, self.capacity, self.last_image = lengths, capacity, last_image
        self.is_prompt = True
        self.table: Optional[torch.Tensor] = None
        self.mask: Optional[torch.Tensor] = None
        self._window = window  # positions before its own that a position attends to; None: all
        self._texts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._media: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self._measure()

    def advance(self) -> None:
        """The pass is over: its positions are filled."""
        if not self.is_prompt:
            self.lengths = self.lengths + 1
        self.is_prompt = False
        self._measure()

    def select(self, rows: torch.Tensor, start: int = 0) -> None:
        """Go on with these rows, [B'] int64, each as often as it is named.

        Args:
            start: the rows are as many as before, and each replaces one that is equal to it in the positions
                before this one and in its images (beams over the same prompt): only the rest is moved.
        """
        self.lengths, self.last_image = self.lengths[rows], self.last_image[rows]
        if start:
            for store in (tensor for pair in self._texts.values() for tensor in pair):
                store[:, :, start : self._width] = store[rows, :, start : self._width]
        else:
            self._texts = {name: (k[rows], v[rows]) for name, (k, v) in self._texts.items()}
            self._media = {name: (k[rows], v[rows]) for name, (k, v) in self._media.items()}
        self._rows = torch.arange(len(rows), device=rows.device)
        self._measure()

    def extend(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in the [S, B, heads, d] keys and values of a layer's pass; return those to attend to,
        [K, B, heads, d]."""
        if layer not in self._texts:
            shape = (key.shape[1], key.shape[2], self.capacity, key.shape[3])
            self._texts[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self._texts[layer]
        if self.is_prompt:
            keys[:, :, : key.shape[0]] = key.permute(1, 2, 0, 3)
            values[:, :, : value.shape[0]] = value.permute(1, 2, 0, 3)
            return key, value
        if self._is_even:
            keys[:, :, self._width], values[:, :, self._width] = key[0], value[0]
        else:
            keys[self._rows, :, self.lengths], values[self._rows, :, self.lengths] = key[0], value[0]
        end = self._width + 1
        return keys[:, :, :end].permute(2, 0, 1, 3), values[:, :, :end].permute(2, 0, 1, 3)

    def keep_media(self, layer: int, key: torch.Tensor, value: torch.Tensor, num_latents: int) -> None:
        """Remember a gated block's [M, B, heads, d] keys and values of the image that is seen last: further
        tokens are never images."""
        image = (self.last_image - 1).clamp(min=0)

        def last(x: torch.Tensor) -> torch.Tensor:
            by_image = x.unflatten(0, (-1, num_latents))  # [T, L, B, heads, d]
            return by_image[image, :, self._rows].transpose(1, 2).contiguous()  # [B, heads, L, d]

        self._media[layer] = last(key), last(value)

    def attend_to_media(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """[1, B, heads, d] queries over the image that each row sees; exactly 0 for rows without one."""
        key, value = self._media[layer]
        out = F.scaled_dot_product_attention(query.permute(1, 2, 0, 3), key, value)
        return out.permute(2, 0, 1, 3) * self.sees_media[..., None]

    @property
    def sees_media(self) -> torch.Tensor:
        """[1, B, 1] bool, whether a row has any image."""
        return (self.last_image > 0)[None, :, None]

    def _measure(self) -> None:
        lengths = self.lengths.tolist()
        self._width = max(lengths, default=0)
        self._is_even = len(set(lengths)) <= 1
        is_narrow = self._window is not None and self._width > self._window
        self.mask = None if self._is_even and not is_narrow else self._hidden()[:, None, None]

    def _hidden(self) -> torch.Tensor:
        columns = torch.arange(self._width + 1, device=self.lengths.device)
        hidden = columns > self.lengths[:, None]
        if self._window is not None:
            hidden |= columns < (self.lengths - self._window)[:, None]
        return hidden
