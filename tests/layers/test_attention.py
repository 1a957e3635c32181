"""torch's attention in megatron-core's slot, against megatron-core's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from megamm.engine.groups import Groups
from megamm.engine.transformer_config import decoder_config
from megamm.layers.attention import SDPACoreAttention
from megamm.layers.documents import documents
from tests.dist.tiny import tiny_recipe

HEAD_DIM = 16  # of the tiny decoder, which has 4 heads


def config_of(**overrides: Any) -> Any:
    keys = {f"model.language.{key}": value for key, value in overrides.items()}
    return decoder_config(tiny_recipe("merged", keys))


def both(config: Any, layout: Groups, mask_type: AttnMaskType) -> tuple[Any, Any]:
    arguments: dict[str, Any] = dict(
        config=config,
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type="self",
        pg_collection=layout.collection,
    )
    return SDPACoreAttention(**arguments), DotProductAttention(**arguments)


def inputs(num_queries: int, num_keys: int, num_groups: int) -> list[torch.Tensor]:
    """[S, B, heads, d] queries, keys and values of two samples."""
    shapes = [(num_queries, 2, 4, HEAD_DIM)] + [(num_keys, 2, num_groups, HEAD_DIM)] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def compare(ours: Any, theirs: Any, qkv: list[torch.Tensor], mask: torch.Tensor | None) -> None:
    """Outputs and the gradients of queries, keys and values."""
    found, wanted = ours(*qkv, mask), theirs(*qkv, mask)
    assert found.shape == (qkv[0].shape[0], 2, 4 * HEAD_DIM)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight).sum(), qkv) for out in (found, wanted)]
    assert gradients[1][2].abs().max() > 0.01
    for name, one, other in zip("qkv", *gradients, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("window", ["null", 1, 5, 12, 40])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_causal(num_groups: int, window: Any, layout: Groups) -> None:
    config = config_of(num_kv_heads=num_groups, sliding_window=window)
    compare(*both(config, layout, AttnMaskType.causal), inputs(12, 12, num_groups), None)


@pytest.mark.parametrize("num_keys", [12, 7])
def test_explicit_mask(num_keys: int, layout: Groups) -> None:
    """megatron's convention: True is masked out."""
    mask = torch.rand(2, 1, 12, num_keys) > 0.6
    mask[..., 0] = False
    compare(*both(config_of(), layout, AttnMaskType.padding), inputs(12, num_keys, 2), mask)


def test_no_mask(layout: Groups) -> None:
    compare(*both(config_of(), layout, AttnMaskType.no_mask), inputs(5, 9, 2), None)


@pytest.mark.parametrize("window", ["null", 4])
def test_few_queries_are_the_last_positions(window: Any, layout: Groups) -> None:
    """What cached decoding asks for: the last rows of the whole attention."""
    ours, _ = both(config_of(sliding_window=window), layout, AttnMaskType.causal)
    q, k, v = inputs(12, 12, 2)
    torch.testing.assert_close(ours(q[-3:], k, v, None), ours(q, k, v, None)[-3:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", ["null", 4])
def test_documents_attend_to_themselves_alone(window: Any, layout: Groups) -> None:
    ours, _ = both(config_of(sliding_window=window), layout, AttnMaskType.causal)
    q, k, v = inputs(12, 12, 1)
    lengths = (5, 1, 6)
    together = ours(q, k, v, None, packed_seq_params=documents(lengths, q.device, thd=False))
    alone = [ours(*(x[start : start + n] for x in (q, k, v)), None) for start, n in ((0, 5), (5, 1), (6, 6))]
    assert torch.equal(together, torch.cat(alone))


def test_what_it_cannot_do_is_refused(layout: Groups) -> None:
    ours, _ = both(config_of(), layout, AttnMaskType.causal)
    with pytest.raises(NotImplementedError):
        ours(*inputs(4, 4, 2), None, attention_bias=torch.zeros(4, 4))
