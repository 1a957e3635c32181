"""Rules are inverse to each other, bit for bit, and a table accounts for every key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import LanguageConfig, VisionConfig
from megamm.convert.rules import Concat, GateUp, InterleaveQKV, PadRows, Rename, Skip, Table, repeat
from megamm.convert.tables import clip, llama
from megamm.errors import InputError

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SMALL = st.integers(1, 5)


def random_bits(shape, dtype):
    """Every bit pattern, NaN payloads and negative zeros included."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def check_inverse(rule, dtype):
    theirs = [random_bits(shape, dtype) for shape in rule.their_shapes()]
    ours = rule.to_ours(theirs)
    assert tuple(ours.shape) == rule.our_shape() and rule.accepts(tuple(ours.shape))
    back = rule.to_theirs(ours)
    assert all(same_bits(a, b) for a, b in zip(back, theirs, strict=True))
    check_pieces(rule, theirs, ours)
    return theirs, ours


def check_pieces(rule, theirs, ours):
    """In pieces it is the same: one after the other, the pieces are the numbers of the whole."""
    assert torch.equal(torch.cat([bits(piece) for piece in rule.our_pieces(theirs)]), bits(ours))
    for pieces, tensor in zip(rule.their_pieces(ours), theirs, strict=True):
        assert torch.equal(torch.cat([bits(piece) for piece in pieces]), bits(tensor))


@settings(max_examples=40, deadline=None)
@given(groups=SMALL, per_group=SMALL, head_dim=st.sampled_from([1, 2, 8]), bias=st.booleans(), dtype=DTYPES)
def test_interleaved_qkv(groups, per_group, head_dim, bias, dtype):
    rest = () if bias else (3,)
    rule = InterleaveQKV("qkv", "q", "k", "v", groups * per_group, groups, head_dim, rest)
    (q, k, v), ours = check_inverse(rule, dtype)
    # the layout itself, written out: for each kv group its q heads, its k head, its v head
    rows = []
    for group in range(groups):
        rows += [q[(group * per_group + i) * head_dim :][:head_dim] for i in range(per_group)]
        rows += [k[group * head_dim :][:head_dim], v[group * head_dim :][:head_dim]]
    assert same_bits(ours, torch.cat(rows))


def test_where_only_rows_move_pieces_are_views():
    """A large tensor is never copied: what is written are parts of what was read."""
    layout = InterleaveQKV("qkv", "q", "k", "v", 4, 2, 8, (3,))
    for rule in (layout, Rename("a", "b", (2, 3)), GateUp("a", "b", "c", (2, 3)), PadRows("a", "b", (2, 3))):
        theirs = [torch.randn(shape) for shape in rule.their_shapes()]
        sources = [range(x.data_ptr(), x.data_ptr() + x.nbytes) for x in theirs]
        for piece in rule.our_pieces(theirs):
            assert piece.is_contiguous() and any(piece.data_ptr() in source for source in sources)
        ours = rule.to_ours(theirs)
        for piece in (piece for pieces in rule.their_pieces(ours) for piece in pieces):
            assert piece.is_contiguous()
            assert piece.data_ptr() in range(ours.data_ptr(), ours.data_ptr() + ours.nbytes)


@settings(max_examples=20, deadline=None)
@given(parts=st.integers(2, 4), rows=SMALL, columns=SMALL, dim=st.sampled_from([0, 1]), dtype=DTYPES)
def test_concat(parts, rows, columns, dim, dtype):
    rule = Concat("all", tuple("abcd"[:parts]), (rows, columns), dim)
    theirs, ours = check_inverse(rule, dtype)
    assert same_bits(ours, torch.cat(theirs, dim))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), multiple=st.integers(1, 16), dtype=DTYPES)
def test_padded_rows_are_zeros_and_come_off_again(rows, multiple, dtype):
    padded = -(-rows // multiple) * multiple
    rule = PadRows("ours", "theirs", (rows, 3), padded)
    _, ours = check_inverse(rule, dtype)
    assert bits(ours[rows:]).eq(0).all()
    unpadded = PadRows("ours", "theirs", (rows, 3))
    assert unpadded.accepts(tuple(ours.shape))
    assert same_bits(unpadded.to_theirs(ours)[0], ours[:rows])
    assert not unpadded.accepts((rows - 1, 3)) and not unpadded.accepts((rows, 4))


def test_gate_rows_stand_before_up_rows():
    rule = GateUp("fc1", "gate", "up", (2, 3))
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    assert rule.to_ours([gate, up])[:, 0].tolist() == [0, 0, 1, 1]


@settings(max_examples=25, deadline=None)
@given(
    groups=SMALL,
    per_group=SMALL,
    head_dim=st.sampled_from([2, 4]),
    vocab=st.integers(3, 70),
    padding=st.integers(0, 9),
    bias=st.booleans(),
    tied=st.booleans(),
)
def test_a_whole_decoder_there_and_back(groups, per_group, head_dim, vocab, padding, bias, tied):
    heads = groups * per_group
    config = LanguageConfig(
        num_layers=2,
        hidden_size=heads * head_dim,
        num_heads=heads,
        num_kv_heads=groups,
        ffn_hidden_size=7,
        vocab_size=vocab,
        qkv_bias=bias,
        out_bias=bias,
        tie_embeddings=tied,
    )
    table = Table(llama.rules(config, "language_model.", vocab + padding))
    seen = {}
    for rule in table.rules:
        theirs, _ = check_inverse(rule, torch.bfloat16)
        seen |= dict(zip(rule.theirs, theirs, strict=True))
    assert len(seen) == len(list(table.their_keys()))
    assert ("language_model.lm_head.weight" in seen) == (not tied)
    assert ("language_model.model.layers.1.self_attn.o_proj.bias" in seen) == bias


def test_vision_rules_name_every_layer():
    config = VisionConfig(image_size=28, patch_size=14, width=8, num_layers=3, num_heads=2, mlp_width=12)
    table = Table(clip.rules(config, "vision_tower."))
    assert len(table.rules) == 3 + 2 + 3 * 12 + 2
    for rule in table.rules:
        check_inverse(rule, torch.float32)


def table_of_two():
    rules = repeat(2, [Rename("ours.{n}", "theirs.{n}", (1,))])
    return Table(rules, [Skip(r"old\..*", "a leftover")], [("model.", "")])


def test_skipped_keys_carry_their_reason():
    assert table_of_two().account(["theirs.0", "theirs.1", "old.x"], "f") == {"old.x": "a leftover"}


def test_missing_and_unknown_keys_are_listed_up_to_five():
    with pytest.raises(InputError) as caught:
        table_of_two().account([f"new.{i}" for i in range(7)] + ["theirs.1"], "f")
    message = str(caught.value)
    assert "1 missing key(s): theirs.0;" in message
    assert "7 unknown key(s): new.0, new.1, new.2, new.3, new.4, ... (7 in all)" in message


def test_our_keys_are_accounted_for_too():
    with pytest.raises(InputError, match=r"1 missing key\(s\): ours.1; 1 unknown key\(s\): extra"):
        table_of_two().account_ours(["ours.0", "extra"], "checkpoint")


def test_two_names_of_one_tensor_are_refused():
    with pytest.raises(InputError, match=r"both stand for theirs\.0"):
        table_of_two().canonical_keys(["theirs.0", "model.theirs.0"], "f")


def test_a_table_names_every_key_once():
    with pytest.raises(ValueError, match="ours twice"):
        Table([Rename("a", "x", (1,)), Rename("a", "y", (1,))])
    with pytest.raises(ValueError, match="theirs twice"):
        Table([Rename("a", "x", (1,)), Rename("b", "x", (1,))])
