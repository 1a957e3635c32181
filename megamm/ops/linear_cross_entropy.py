"""The output layer and its cross entropy together, in chunks of rows, so that the logits of all rows never
exist.

Of each chunk: the logits, their losses, the gradient in place of the logits, and from that at once the
gradients of hidden states and weight, for a loss that counts each row once. The backward pass multiplies:

- the gradient of a hidden state by grad_loss of its row, which may be anything;
- the gradient of the weight, a sum over the rows, by one number, if grad_loss is that number for all rows
  that have a label (the sum or mean of losses that trainers take). If it is not, this gradient alone is
  computed again from the logits, with grad_loss in it. Telling them apart takes two numbers from the device.

Recomputing all logits in the backward pass instead would need no such case, but 4 matrix products instead of
3: 1.3 to 1.5 times as long (two CPU cores, fp32 and bf16, 1024 and 2048 rows, vocabulary 32000). Weights of
the rows as an argument would make the result a sum, while callers want the losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
import torch.distributed as dist

from megamm.ops.cross_entropy import Vocabulary, cross_entropy_ref, losses_of_rows, overwrite_with_gradient

# Bytes of logits that exist at a time. Each further chunk is a further pass over the weight's gradient.
_CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**28, "meta": 2**28}


class _Plan(NamedTuple):
    vocabulary: Vocabulary
    chunk_rows: int
    wants_hidden: bool
    wants_weight: bool
    sum_hidden: bool


class _Chunk(NamedTuple):
    rows: slice  # which of the rows that have a label
    hidden: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
    group: Optional[dist.ProcessGroup] = None,
    sum_hidden_gradient: bool = True,
    chunk_bytes: Optional[int] = None,
) -> torch.Tensor:
    """cross_entropy(hidden @ weight.T, labels), without the logits of all rows, only for rows with a label.

    Args:
        hidden: [..., H], the same on all processes of `group`.
        weight: [V / tp, H], this process's part of the output layer, in the dtype of hidden. If it is frozen,
            its gradient costs nothing.
        labels: [...] int64, entries of the whole vocabulary.
        vocab_size: entries of the whole vocabulary; rows of the weight beyond only pad it: they do not count
            and get gradient 0. None: all count.
        ignore_index: label of rows with loss 0 and gradient 0, which are not computed.
        group: tensor-parallel processes, each with an equal part of the vocabulary, in the order of their
            ranks.
        sum_hidden_gradient: add up the gradient of hidden over `group`. False where what precedes does it, as
            the gather of sequence-parallel shards does.
        chunk_bytes: logits that may exist at a time; None: 128 MiB on the CPU, 256 MiB on a GPU.

    Returns:
        [...] fp32 (fp64 for fp64) losses. Differentiable once in hidden and weight; with gradients disabled
        only the losses are computed.

    Raises:
        ValueError: shapes or dtypes do not go together.
        IndexError: a label is outside of the vocabulary. On GPUs its loss is NaN instead.
    """
    _check(hidden, weight, labels)
    columns = weight.shape[0]
    if chunk_bytes is None:
        chunk_bytes = _CHUNK_BYTES.get(hidden.device.type, 2**28)
    graph = torch.is_grad_enabled()
    plan = _Plan(
        Vocabulary.of_columns(columns, vocab_size, ignore_index, group),
        chunk_rows=max(1, chunk_bytes // (columns * hidden.element_size())),
        wants_hidden=graph and hidden.requires_grad,
        wants_weight=graph and weight.requires_grad,
        sum_hidden=sum_hidden_gradient and group is not None and group.size() > 1,
    )
    rows = hidden.reshape(labels.numel(), hidden.shape[-1])
    losses: torch.Tensor = _LinearCrossEntropy.apply(rows, weight, labels.reshape(-1), plan)
    return losses.view(labels.shape)


def linear_cross_entropy_ref(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: Optional[int] = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The same function in plain torch, with all logits, for a vocabulary that is not split."""
    return cross_entropy_ref(torch.nn.functional.linear(hidden, weight), labels, vocab_size, ignore_index)


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    if hidden.dim() == 0 or hidden.shape[:-1] != labels.shape or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            f"linear_cross_entropy: hidden is {list(hidden.shape)}, weight {list(weight.shape)}, "
            f"labels {list(labels.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy: hidden is {hidden.dtype}, weight {weight.dtype}")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, plan: _Plan
    ) -> torch.Tensor:
        places = _labelled(labels, plan.vocabulary.ignore_index)
        num_rows = len(labels) if places is None else len(places)
        accumulation = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(num_rows, dtype=accumulation)
        statistics = hidden.new_empty(2, num_rows, dtype=accumulation)
        ones = hidden.new_ones(min(num_rows, plan.chunk_rows), dtype=accumulation)
        grad_hidden = hidden.new_empty(num_rows, hidden.shape[1]) if plan.wants_hidden else None
        grad_weight = _WeightGradient(weight, num_rows > plan.chunk_rows) if plan.wants_weight else None
        sums = []
        for rows, chunk_hidden, chunk_labels, logits in _chunks(hidden, weight, labels, places, plan):
            losses[rows], found = losses_of_rows(logits, chunk_labels, plan.vocabulary)
            statistics[:, rows] = found
            if grad_hidden is None and grad_weight is None:
                continue
            overwrite_with_gradient(logits, chunk_labels, found, ones[: len(logits)], plan.vocabulary)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
                if plan.sum_hidden:  # while the next matrix products run
                    group = plan.vocabulary.group
                    sums.append(dist.all_reduce(grad_hidden[rows], group=group, async_op=True))
            if grad_weight is not None:
                grad_weight.add(logits, chunk_hidden)
        for pending in sums:
            pending.wait()
        ctx.plan, ctx.hidden_shape = plan, hidden.shape
        if grad_weight is None:
            ctx.save_for_backward(places, grad_hidden)
        else:
            ctx.save_for_backward(
                places, grad_hidden, grad_weight.total(), hidden, weight, labels, statistics
            )
        if places is None:
            return losses
        return losses.new_zeros(len(labels)).index_copy_(0, places, losses)

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:
        places, grad_hidden, *for_weight = ctx.saved_tensors
        row_weights = grad_loss if places is None else grad_loss[places]
        grad_weight = _weight_gradient(ctx, row_weights, places, *for_weight) if for_weight else None
        if grad_hidden is not None:
            grad_hidden.mul_(row_weights[:, None])
            if places is not None:
                grad_hidden = grad_hidden.new_zeros(ctx.hidden_shape).index_copy_(0, places, grad_hidden)
        return grad_hidden, grad_weight, None, None


def _labelled(labels: torch.Tensor, ignore_index: int) -> Optional[torch.Tensor]:
    """Where the rows with a label are; None: everywhere."""
    if labels.device.type == "meta":
        return None
    places = (labels != ignore_index).nonzero().squeeze(1)
    return None if len(places) == len(labels) else places


def _chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    places: Optional[torch.Tensor],
    plan: _Plan,
) -> Iterator[_Chunk]:
    """Chunks of nearly the same size with their logits, all of them in the same memory."""
    num_rows = len(labels) if places is None else len(places)
    if not num_rows:
        return
    step = -(-num_rows // -(-num_rows // plan.chunk_rows))
    memory = hidden.new_empty(step, weight.shape[0])
    for begin in range(0, num_rows, step):
        rows = slice(begin, min(begin + step, num_rows))
        chosen = rows if places is None else places[rows]
        chunk = hidden[chosen]
        logits = torch.mm(chunk, weight.t(), out=memory[: len(chunk)])
        yield _Chunk(rows, chunk, labels[chosen], logits)


class _WeightGradient:
    """A sum of gradients of the output layer's weight, in fp32 unless it is a single one."""

    def __init__(self, weight: torch.Tensor, several: bool) -> None:
        self._weight = weight
        self._widen = several and weight.dtype in (torch.bfloat16, torch.float16)
        self._total: Optional[torch.Tensor] = None

    def add(self, grad: torch.Tensor, hidden: torch.Tensor) -> None:
        """Adds the gradient for [T, V] gradients of the logits and [T, H] hidden states."""
        if not self._widen:
            if self._total is None:
                self._total = torch.mm(grad.t(), hidden)
            else:
                self._total.addmm_(grad.t(), hidden)
        elif grad.device.type == "cuda":  # products of 16-bit matrices with a sum in fp32 exist only there
            if self._total is None:
                self._total = torch.mm(grad.t(), hidden, out_dtype=torch.float32)
            else:
                torch.addmm(self._total, grad.t(), hidden, out_dtype=torch.float32, out=self._total)
        elif self._total is None:
            self._total = torch.mm(grad.t(), hidden).float()
        else:
            self._total += torch.mm(grad.t(), hidden)

    def total(self) -> torch.Tensor:
        """[V, H]; zeros if there was nothing to add."""
        return torch.zeros_like(self._weight) if self._total is None else self._total


def _weight_gradient(
    ctx: Any,
    row_weights: torch.Tensor,
    places: Optional[torch.Tensor],
    total: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    statistics: torch.Tensor,
) -> torch.Tensor:
    """The sum over all rows, `total`, with the weights that the rows have turned out to have."""
    plan = ctx.plan
    scale = _common_value(row_weights)
    if scale is None:
        scale = 1.0
        grad_weight = _WeightGradient(weight, len(row_weights) > plan.chunk_rows)
        for rows, chunk_hidden, chunk_labels, logits in _chunks(hidden, weight, labels, places, plan):
            found, weights = statistics[:, rows], row_weights[rows]
            overwrite_with_gradient(logits, chunk_labels, found, weights, plan.vocabulary)
            grad_weight.add(logits, chunk_hidden)
        total = grad_weight.total()
    if scale != 1.0:
        total.mul_(scale)
    return total.to(weight.dtype)


def _common_value(row_weights: torch.Tensor) -> Optional[float]:
    """The value of all elements; None if they differ."""
    if row_weights.device.type == "meta" or not len(row_weights):
        return 1.0
    smallest, largest = torch.stack(row_weights.aminmax()).tolist()
    return smallest if smallest == largest else None
