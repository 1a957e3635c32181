"""Cross entropy over logits whose vocabulary may be split over a tensor-parallel group (Megatron-LM, Shoeybi
et al. 2019, arXiv:1909.08053, section 3), forward and backward.

    loss = log(sum_v exp(logits_v)) - logits_label        d loss / d logits = softmax(logits) - onehot(label)

One pass over the logits of this process gives three numbers for each row: maximum, sum of exponentials
relative to it (Milakov and Gimelshein 2018, arXiv:1805.02867) and the logit of the label. They are all that
processes exchange: one all-gather of 12 bytes per row and process, instead of a maximum and then two sums one
after the other, because messages of this size cost their latency. Added up in the order of the ranks, the
losses are the same bits on all of them. The backward pass reads the logits once more and writes the gradient
in their place. No copy of the logits is made, in fp32 or otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist

from megamm.ops import fused_devices

_FUSED_DEVICES = fused_devices("cross_entropy_statistics")
_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
_MAXIMUM, _SUM, _LABEL_LOGIT, _LOSS = range(4)  # rows of what the first pass gives


class Vocabulary(NamedTuple):
    """The part of a vocabulary that this process holds.

    Attributes:
        start: entry of the vocabulary that column 0 of the logits stands for.
        size: entries of the whole vocabulary; columns that stand for later ones only pad it.
        ignore_index: label of rows that have no loss and no gradient.
        group: processes that hold the other parts; None: there are none.
    """

    start: int
    size: int
    ignore_index: int
    group: Optional[dist.ProcessGroup]

    @classmethod
    def of_columns(
        cls, columns: int, size: Optional[int], ignore_index: int, group: Optional[dist.ProcessGroup]
    ) -> Vocabulary:
        """Equal parts of `columns` entries, in the order of the ranks; size None: there is no padding."""
        parts, rank = (group.size(), group.rank()) if group is not None else (1, 0)
        split = group if parts > 1 else None
        return cls(rank * columns, columns * parts if size is None else size, ignore_index, split)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
    group: Optional[dist.ProcessGroup] = None,
    overwrite_logits: bool = True,
) -> torch.Tensor:
    """Cross entropy of each row, fused where the extension has a kernel for it.

    Args:
        logits: [..., V / tp], any strides (rows that are not dense are copied).
        labels: [...] int64, entries of the whole vocabulary, the same on all processes of `group`.
        vocab_size: entries of the whole vocabulary; columns beyond only pad it: they do not count and get
            gradient 0. None: all columns count.
        ignore_index: label of rows with loss 0 and gradient 0.
        group: tensor-parallel processes, each with an equal part of the vocabulary, in the order of their
            ranks.
        overwrite_logits: the backward pass writes the gradient over the logits, where their layout allows.
            Nothing may read them after that; autograd refuses where it would itself, a second backward pass
            included.

    Returns:
        [...] fp32 (fp64 for fp64). Differentiable once in logits; grad may differ from row to row.

    Raises:
        ValueError: the shapes of logits and labels do not go together.
        IndexError: a label is outside of the vocabulary. On GPUs its loss is NaN instead, as nothing waits
            there.
    """
    return _cross_entropy(logits, labels, vocab_size, ignore_index, group, overwrite_logits, _fused(logits))


def cross_entropy_ref(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
    group: Optional[dist.ProcessGroup] = None,
    overwrite_logits: bool = True,
) -> torch.Tensor:
    """The same function with its passes in plain torch: what the kernels are tested against and the fallback
    without them."""
    return _cross_entropy(logits, labels, vocab_size, ignore_index, group, overwrite_logits, False)


def _cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: Optional[int],
    ignore_index: int,
    group: Optional[dist.ProcessGroup],
    overwrite: bool,
    fused: bool,
) -> torch.Tensor:
    if logits.dim() == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(f"cross_entropy: logits are {list(logits.shape)}, labels {list(labels.shape)}")
    vocabulary = Vocabulary.of_columns(logits.shape[-1], vocab_size, ignore_index, group)
    rows = logits.reshape(labels.numel(), logits.shape[-1])
    losses: torch.Tensor = _CrossEntropy.apply(rows, labels.reshape(-1), vocabulary, overwrite, fused)
    return losses.view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocabulary: Vocabulary,
        overwrite: bool,
        fused: bool,
    ) -> torch.Tensor:
        losses, statistics = losses_of_rows(logits, labels, vocabulary, fused)
        ctx.save_for_backward(logits, labels, statistics)
        ctx.vocabulary, ctx.overwrite, ctx.fused = vocabulary, overwrite, fused
        return losses

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:
        logits, labels, statistics = ctx.saved_tensors
        arguments = (labels, statistics, grad_loss, ctx.vocabulary, ctx.fused)
        if ctx.overwrite and _can_hold_gradient(logits):
            overwrite_with_gradient(logits, *arguments)
            return logits.detach(), None, None, None, None
        return _gradient(logits, *arguments), None, None, None, None


def losses_of_rows(
    logits: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary, fused: Optional[bool] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first half of `cross_entropy`, for callers that bring their own backward pass.

    Args:
        logits, labels: [T, V / tp] and [T].
        vocabulary: which part of it the columns are.
        fused: by the kernel, or in plain torch; None: by the kernel if there is one.
    Returns:
        [T] losses and [2, T] maximum and sum of exponentials over the whole vocabulary, both fp32 (fp64 for
        fp64).
    """
    fused = _fused(logits) if fused is None else fused
    first_pass = torch.ops.megamm.cross_entropy_statistics if fused else _statistics_ref
    statistics: torch.Tensor = first_pass(logits, labels, *vocabulary[:3])
    if vocabulary.group is None:
        return statistics[_LOSS], statistics[:_LABEL_LOGIT]
    return _combined(statistics[:_LOSS], labels, vocabulary)


def overwrite_with_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    statistics: torch.Tensor,
    grad_loss: torch.Tensor,
    vocabulary: Vocabulary,
    fused: Optional[bool] = None,
) -> None:
    """The second half: writes grad_loss * (softmax - onehot) over the logits.

    Args:
        logits: [T, V / tp] with dense rows.
        labels: [T].
        statistics: what `losses_of_rows` gave.
        grad_loss: [T], dtype of the statistics; a row with 0 gets gradient 0 and is not read.
        vocabulary, fused: as for `losses_of_rows`.
    """
    arguments = (labels, statistics, grad_loss, *vocabulary[:3])
    if _fused(logits) if fused is None else fused:
        torch.ops.megamm.cross_entropy_gradient_(logits, *arguments)
    else:
        logits.copy_(_gradient_ref(logits, *arguments))


def _gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    statistics: torch.Tensor,
    grad_loss: torch.Tensor,
    vocabulary: Vocabulary,
    fused: bool,
) -> torch.Tensor:
    second_pass = torch.ops.megamm.cross_entropy_gradient if fused else _gradient_ref
    grad: torch.Tensor = second_pass(logits, labels, statistics, grad_loss, *vocabulary[:3])
    return grad


def _combined(
    local: torch.Tensor, labels: torch.Tensor, vocabulary: Vocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and maximum and sum over the whole vocabulary, from [3, T] of each process."""
    assert vocabulary.group is not None
    parts = vocabulary.group.size()
    gathered = local.new_empty(parts * len(local), local.shape[1])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=vocabulary.group)
    maxima, sums, label_logits = gathered.view(parts, len(local), -1).unbind(1)
    maximum = maxima.amax(0)
    total = (sums * torch.exp(maxima - maximum)).sum(0)
    losses = torch.log(total) + (maximum - label_logits.sum(0))
    return losses.masked_fill(labels == vocabulary.ignore_index, 0), torch.stack([maximum, total])


def _fused(logits: torch.Tensor) -> bool:
    device = logits.device.type
    return device in _FUSED_DEVICES and logits.dtype in _FUSED_DTYPES[device]


def _can_hold_gradient(logits: torch.Tensor) -> bool:
    """Whether the rows of [T, V] are dense and apart from each other."""
    dense = logits.shape[1] <= 1 or logits.stride(1) == 1
    return dense and (logits.shape[0] <= 1 or logits.stride(0) >= logits.shape[1])


def _statistics_ref(
    logits: torch.Tensor, labels: torch.Tensor, vocab_start: int, vocab_size: int, ignore_index: int
) -> torch.Tensor:
    ignored = labels == ignore_index
    outside = ((labels < 0) | (labels >= vocab_size)) & ~ignored
    if labels.device.type == "cpu" and outside.any():
        raise IndexError(f"label {labels[outside][0]} is not in a vocabulary of {vocab_size}")
    x = _valid(logits, vocab_start, vocab_size).to(_accumulation(logits))
    lowest = x.new_full((len(x), 1), torch.finfo(x.dtype).min)
    maximum = torch.cat([x, lowest], 1).amax(1)
    total = torch.exp(x - maximum[:, None]).sum(1)
    column = labels - vocab_start
    here = (column >= 0) & (column < x.shape[1])
    place = torch.where(here, column, x.shape[1])[:, None]
    label_logit = torch.cat([x, torch.zeros_like(lowest)], 1).gather(1, place)[:, 0]
    label_logit = label_logit.masked_fill(outside, torch.nan)
    losses = torch.log(total) + (maximum - label_logit)
    statistics = torch.stack([maximum, total, label_logit, losses])
    of_ignored = statistics.new_tensor([0.0, 1.0, 0.0, 0.0])[:, None]
    return torch.where(ignored, of_ignored, statistics)


def _gradient_ref(
    logits: torch.Tensor,
    labels: torch.Tensor,
    statistics: torch.Tensor,
    grad_loss: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
) -> torch.Tensor:
    x = _valid(logits, vocab_start, vocab_size).to(_accumulation(logits))
    columns = torch.arange(vocab_start, vocab_start + x.shape[1], device=x.device)
    maximum, total = statistics[:, :, None]
    grad = torch.exp(x - maximum) / total - (labels[:, None] == columns).to(x.dtype)
    has_gradient = ((labels != ignore_index) & (grad_loss != 0))[:, None]
    grad = torch.where(has_gradient, grad * grad_loss[:, None], 0.0)
    return torch.nn.functional.pad(grad, (0, logits.shape[1] - x.shape[1])).to(logits.dtype)


def _valid(logits: torch.Tensor, vocab_start: int, vocab_size: int) -> torch.Tensor:
    return logits[:, : max(0, vocab_size - vocab_start)]


def _accumulation(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _fake_statistics(
    logits: torch.Tensor, labels: torch.Tensor, vocab_start: int, vocab_size: int, ignore_index: int
) -> torch.Tensor:
    return logits.new_empty((4, logits.shape[0]), dtype=_accumulation(logits))


def _fake_gradient(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _fake_gradient_in_place(logits: torch.Tensor, *_: Any) -> None:
    return None


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::cross_entropy_statistics", _fake_statistics)
    torch.library.register_fake("megamm::cross_entropy_gradient", _fake_gradient)
    torch.library.register_fake("megamm::cross_entropy_gradient_", _fake_gradient_in_place)
