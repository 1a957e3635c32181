"""Every kind of bad input is one clear sentence, and nothing half-written stays."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamm.convert import export_checkpoint, export_llava, import_checkpoint, import_llava
from megamm.convert.engine import INDEX_NAME, staged
from megamm.errors import InputError, RunError
from tests.convert.helpers import assert_bitwise_equal, edit_config, hub_layout, read_tensors, recipe_for

WEIGHTS = "model.safetensors"


@pytest.fixture
def source(llava_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(llava_dir, tmp_path / "in" / "hf")
    return tmp_path / "in" / "hf"


@pytest.fixture
def sharded(llava_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> Path:
    found = import_llava(llava_dir)
    out = tmp_path / "in" / "hf"
    export_llava(found.tensors, recipe_for(found.model), tokenizer_dir, out, max_shard_bytes=20_000)
    return out


def refuse(source: Path, message: str) -> None:
    """import_checkpoint raises InputError with the message, in one line, and leaves nothing behind."""
    out = source.parent.parent / "out"
    with pytest.raises(InputError, match=message) as caught:
        import_checkpoint([source], out / "checkpoint")
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    assert not out.exists() or list(out.iterdir()) == []


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "sung"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
@pytest.mark.parametrize("place", ["whole", "archive", "among tensors", "second shard"])
def test_pickles_that_hold_code_are_refused_and_nothing_runs(name, place, source):
    canary = source.parent / "canary"
    tensors = read_tensors(source)
    (source / WEIGHTS).unlink()
    path, evil = source / name, Canary(canary)
    if place == "whole":
        path.write_bytes(pickle.dumps(evil))
    elif place == "archive":
        torch.save(evil, path)
    elif place == "among tensors":
        torch.save({**tensors, "extra": evil}, path)
    else:
        torch.save(tensors, source / "pytorch_model-00001-of-00002.bin")
        path = source / "pytorch_model-00002-of-00002.bin"
        torch.save({"x": evil}, path)
        weight_map = {**dict.fromkeys(tensors, "pytorch_model-00001-of-00002.bin"), "x": path.name}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuse(source, rf"{path.name}: (is no archive|holds getattr), .*if you trust it")
    assert not canary.exists()
    with suppress(RuntimeError):  # torch finds out afterwards that this is no checkpoint
        torch.load(path, weights_only=False)
    assert canary.exists()  # the code does run where it is let


def test_pickles_of_tensors_are_read(source, tmp_path):
    tensors = read_tensors(source)
    (source / WEIGHTS).unlink()
    torch.save(
        {"state_dict": {key: torch.nn.Parameter(x) for key, x in tensors.items()}, "epoch": 3},
        source / "pytorch_model.bin",
    )
    found = import_llava(source)
    export_llava(found.tensors, recipe_for(found.model), source, tmp_path / "out")
    assert_bitwise_equal(read_tensors(tmp_path / "out"), hub_layout(tensors))


def test_code_in_the_directory_is_not_run(source):
    canary = source.parent / "canary"
    (source / "modeling_llava.py").write_text(f"open({str(canary)!r}, 'w')")
    edit_config(source, lambda config: config.update(auto_map={"AutoModel": "modeling_llava.X"}))
    import_llava(source)
    assert not canary.exists()


def test_no_directory_no_weights_no_config(source):
    refuse(source.parent / "nowhere", "no such directory")
    (source / "config.json").unlink()
    refuse(source, r"hf: no config\.json, and unknown tensors")
    (source / WEIGHTS).unlink()
    refuse(source, "holds neither model.safetensors nor")
    for name in ("a.pt", "b.bin"):
        torch.save({}, source / name)
    refuse(source, r"several files of weights \(a\.pt, b\.bin\)")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff", "[" * 100_000, '{"model_type": }'])
def test_damaged_json(text, source):
    (source / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    refuse(source, r"config\.json: ")


@pytest.mark.parametrize("kind", ["blip-2", None, 3, ["llava"], {}])
def test_unknown_model_types(kind, source):
    edit_config(source, lambda config: config.update(model_type=kind))
    with pytest.raises(InputError, match=r"model_type is .*megamm imports: .*llava, .*llama, "):
        import_llava(source)


def test_every_truncation_of_the_weights_is_found(source):
    whole = (source / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (source / WEIGHTS).write_bytes(whole[:length])
        refuse(source, r"model\.safetensors: damaged or cut short")
    (source / WEIGHTS).write_bytes(whole + b"\0")
    refuse(source, r"model\.safetensors: damaged or cut short")


def test_damaged_headers_raise_only_our_errors(source):
    whole = (source / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    dice = random.Random(0)
    found = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 1, 3, 20])):
            damaged[dice.randrange(header)] = dice.randrange(256)
        (source / WEIGHTS).write_bytes(damaged)
        try:
            for tensor in import_llava(source).tensors.values():
                assert tensor.ndim
        except InputError:
            found += 1
    assert found > 100  # the rest hit blanks or swapped nothing


def lie(source: Path, change) -> None:
    """Rewrite the header of the weights; the numbers stay."""
    whole = (source / WEIGHTS).read_bytes()
    begin = 8 + struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:begin])
    text = json.dumps(change(header) or header).encode()
    (source / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + whole[begin:])


def grow(header, by):
    """The last tensor claims more bytes than there are, in its shape too."""
    key = max(header.keys() - {"__metadata__"}, key=lambda key: header[key]["data_offsets"])
    entry = header[key]
    entry["data_offsets"][1] += 4 * by
    entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // 4]


def shift(header, by):
    for key in header.keys() - {"__metadata__"}:
        header[key]["data_offsets"] = [offset + by for offset in header[key]["data_offsets"]]


def overlap(header):
    header[NORM]["data_offsets"] = header["language_model.model.layers.0.input_layernorm.weight"][
        "data_offsets"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: grow(h, 1), r"the tensors end at byte \d+ of"),
        (lambda h: grow(h, 2**61), r"the tensors end at byte \d+ of"),
        (lambda h: shift(h, 8), "begins at byte"),
        (lambda h: shift(h, -8), "says nothing sensible"),
        (overlap, "but the tensor before it ends at"),
        (lambda h: h[NORM].update(shape=[2**40, 2**40]), r"has \d+ bytes by its shape, 128 by its offsets"),
        (lambda h: h[NORM].update(shape=[-32]), "says nothing sensible about"),
        (lambda h: h[NORM].update(shape=[32.0]), "says nothing sensible about"),
        (lambda h: h[NORM].update(dtype="F17"), "of the unknown type F17"),
        (lambda h: h[NORM].update(dtype=["F32"]), "of the unknown type"),
        (lambda h: h[NORM].update(data_offsets=[0]), "says nothing sensible about"),
        (lambda h: h.update({NORM: 3}), "says nothing sensible about"),
        (lambda h: [h], "the header is no JSON object"),
    ],
)
def test_lying_headers(change, message, source):
    lie(source, change)
    refuse(source, rf"model\.safetensors: damaged or cut short \(.*{message}")


def test_a_header_longer_than_the_file_and_one_with_a_tensor_twice(source):
    whole = (source / WEIGHTS).read_bytes()
    for length in (len(whole), 2**40, 2**64 - 1):
        (source / WEIGHTS).write_bytes(struct.pack("<Q", length) + whole[8:])
        refuse(source, "a header of .* bytes in a file of")
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    twice = b"{" + entry + b"," + entry + b"}"
    (source / WEIGHTS).write_bytes(struct.pack("<Q", len(twice)) + twice + bytes(4))
    refuse(source, "names a tensor twice")


def test_a_missing_shard(sharded):
    (sharded / "model-00002-of-00004.safetensors").unlink(missing_ok=True)
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    (sharded / names[-1]).unlink()
    refuse(sharded, r"shard\(s\) missing: .*; fetch")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({"a": "../model.safetensors"}, "is no shard file name"),
        ({"a": "/etc/passwd"}, "is no shard file name"),
        ({"a": 3}, "is no shard file name"),
        ({"a": "weights.bin"}, "is no shard file name"),
    ],
)
def test_a_bad_index(weight_map, message, sharded):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refuse(sharded, message)


def test_index_and_shards_disagree(sharded):
    index = json.loads((sharded / INDEX_NAME).read_text())
    held = list(index["weight_map"].values())
    names = sorted(set(held), key=held.count, reverse=True)  # the first holds several tensors
    key = next(key for key, name in index["weight_map"].items() if name == names[0])
    for change in (lambda m: m.update({key: names[1]}), lambda m: m.pop(key), lambda m: m.update(x=names[0])):
        weight_map = dict(index["weight_map"])
        change(weight_map)
        (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
        refuse(sharded, "disagrees with the shards about")


def test_one_tensor_in_two_shards(sharded):
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    shutil.copy(sharded / names[0], sharded / names[1])
    refuse(sharded, "keep one")


def change_weights(source: Path, change) -> None:
    tensors = read_tensors(source)
    change(tensors)
    save_file(tensors, source / WEIGHTS)


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), rf"1 missing key\(s\): {NORM}"),
        (lambda t: t.update(extra=torch.ones(1)), r"1 unknown key\(s\): extra"),
        (lambda t: t.update({NORM: torch.ones(31)}), rf"{NORM} has shape \[31\], but .* \[32\]"),
        (lambda t: t.update({NORM: torch.ones(32, 1)}), r"has shape \[32, 1\]"),
        (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), "has type int8"),
        (
            lambda t: t.update(
                {k: v.half() for k, v in t.items() if k.endswith("0.self_attn.k_proj.weight")}
            ),
            "differ in type",
        ),
    ],
)
def test_weights_that_do_not_fit(change, message, source):
    change_weights(source, change)
    refuse(source, message)


TEXT, VISION = "text_config", "vision_config"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (TEXT, dict(hidden_size="32"), "hidden_size is '32', but must be a positive whole number"),
        (TEXT, dict(num_hidden_layers=0), "num_hidden_layers is 0"),
        (TEXT, dict(num_attention_heads=True), "num_attention_heads is True"),
        (TEXT, dict(num_key_value_heads=3), "must divide one another"),
        (TEXT, dict(num_attention_heads=3), "must divide one another"),
        (TEXT, dict(head_dim=16), "head_dim is 16"),
        (TEXT, dict(hidden_act="gelu"), "hidden_act is 'gelu', megamm supports only 'silu'"),
        (TEXT, dict(mlp_bias=True), "mlp_bias is True"),
        (TEXT, dict(attention_bias=1), "attention_bias is 1"),
        (TEXT, dict(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
        (TEXT, dict(model_type="qwen2"), "model_type is 'qwen2', but must be one of llama, mistral"),
        (TEXT, dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5}), "rope_type is 'llama3'"),
        (TEXT, dict(rope_parameters=7), "is no JSON object"),
        (TEXT, dict(rope_scaling={"type": "linear", "factor": 2.0}), "type is 'linear'"),
        (TEXT, dict(vocab_size=10**30), r"has shape \[420, 32\]"),
        (VISION, dict(model_type="siglip_vision_model"), "model_type is 'siglip_vision_model'"),
        (VISION, dict(hidden_act="silu"), "hidden_act is 'silu'"),
        (VISION, dict(patch_size=[14, 14]), "patch_size is"),
        (VISION, dict(patch_size=29), "must hold a patch"),
        (VISION, dict(num_attention_heads=3), "a multiple of num_attention_heads"),
        (VISION, dict(num_channels=1), "num_channels is 1"),
        (None, dict(projector_hidden_act="relu"), "projector_hidden_act is 'relu'"),
        (None, dict(multimodal_projector_bias=False), "multimodal_projector_bias is False"),
        (None, dict(vision_feature_layer=[-2, -1]), r"vision_feature_layer is \[-2, -1\]"),
        (None, dict(vision_feature_layer=9), "vision_feature_layer is 9"),
        (None, dict(vision_feature_select_strategy="cls"), "must be one of default, full"),
        (None, dict(image_token_index="x"), "image_token_index is 'x'"),
        (None, dict(text_config=[]), "is no JSON object"),
    ],
)
def test_configurations_that_megamm_cannot_express(section, values, message, source):
    edit_config(source, lambda config: (config[section] if section else config).update(values))
    refuse(source, message)


def test_a_damaged_tokenizer_model(source):
    (source / "tokenizer.model").write_bytes(b"\x00 no model")
    refuse(source, r"tokenizer\.model: is not a SentencePiece model")


def test_a_failed_write_leaves_nothing(llava_dir, tokenizer_dir, tmp_path, monkeypatch):
    from megamm.convert import engine

    found = import_llava(llava_dir)
    plain, written = engine.write_at, []

    def full(file, data, offset):
        written.append(len(data))
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        plain(file, data, offset)

    monkeypatch.setattr(engine, "write_at", full)
    with pytest.raises(RunError, match="No space left on device"):
        export_llava(found.tensors, recipe_for(found.model), tokenizer_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_import_that_fails_half_way_leaves_nothing(llava_dir, tmp_path, monkeypatch):
    from megamm.convert.files import SourceFiles

    plain, read = SourceFiles.tensor, []

    def fail(self, key):
        read.append(key)
        if len(read) > 9:
            raise OSError(5, "Input/output error")
        return plain(self, key)

    monkeypatch.setattr(SourceFiles, "tensor", fail)
    with pytest.raises(RunError, match=r"cannot be written \(Input/output error\)"):
        import_checkpoint([llava_dir], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(llava_dir, tmp_path):
    checkpoint = import_checkpoint([llava_dir], tmp_path / "checkpoint")
    for pattern in (".metadata", "*.distcp"):
        path = sorted((checkpoint / "shards").glob(pattern))[-1]
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match=rf"{path.name}: (content changed|\d+ bytes instead)"):
                export_checkpoint(checkpoint, tmp_path / "out")
            assert sorted(tmp_path.iterdir()) == [checkpoint]
        path.write_bytes(whole)
    export_checkpoint(checkpoint, tmp_path / "out")


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "a" / "out") as directory:
        (directory / "file").write_text("half")
        raise KeyboardInterrupt
    assert list((tmp_path / "a").iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another --out"), staged(tmp_path / "file" / "out"):
        pass
    with pytest.raises(InputError, match="already exists"), staged(tmp_path / "file"):
        pass
