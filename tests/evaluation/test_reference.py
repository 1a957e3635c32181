"""`megamm convert verify`: the same weights give the same logits, others do not, or cannot be compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megamm import cli
from megamm.convert import import_checkpoint
from megamm.engine import groups
from megamm.errors import InputError
from megamm.evaluation.reference import compare_with_reference
from tests.convert.families import hf_decoder, hf_idefics
from tests.convert.helpers import edit_config, hf_llava

MODELS = {
    "llama": lambda: hf_decoder(attention_bias=True),
    "mistral": lambda: hf_decoder(sliding_window=7),
    "llava": hf_llava,
    "idefics": hf_idefics,
}


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each model as a directory and as a checkpoint, without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().to(torch.bfloat16).save_pretrained(folder / name)
        import_checkpoint([folder / name], folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_same_weights(name: str, root: Path) -> None:
    found = compare_with_reference(root / f"{name}.ckpt", root / name)
    assert found.is_within(1e-5) and found.scale > 0.1
    assert (found.num_images > 0) == (name in ("llava", "idefics"))


@pytest.mark.parametrize("name", MODELS)
def test_one_other_weight(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the part that comes first in the file; the command says so and exits with 1."""
    other = tmp_path / "other"
    shutil.copytree(root / name, other)
    tensors = load_file(other / "model.safetensors")
    part = {"llava": "multi_modal_projector.linear_1.bias", "idefics": "model.perceiver_resampler.latents"}
    key = next(key for key in sorted(tensors) if part.get(name, "q_proj.weight") in key)
    tensors[key] = tensors[key].flip(-1).contiguous()
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    arguments = ["convert", "verify", "--checkpoint", str(root / f"{name}.ckpt"), "--against"]
    assert cli.main([*arguments, str(root / name)]) == 0
    assert "same: logits differ by at most" in capsys.readouterr().out
    assert cli.main([*arguments, str(other)]) == 1
    assert "DIFFERENT: logits differ by at most" in capsys.readouterr().out
    assert cli.main([*arguments, str(other), "--tolerance", "1000"]) == 0


def test_what_cannot_be_compared(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not take the ids and images of the checkpoint"):
        compare_with_reference(root / "llava.ckpt", root / "llama")
    with pytest.raises(InputError, match="gives logits for 420 tokens, the checkpoint for 67"):
        compare_with_reference(root / "llama.ckpt", root / "llava")
    other = tmp_path / "other"
    shutil.copytree(root / "llama", other)
    edit_config(other, lambda config: config.update(model_type="infimm"))
    with pytest.raises(InputError, match="no class of its own with logits for model_type 'infimm'"):
        compare_with_reference(root / "llama.ckpt", other)
    edit_config(other, lambda config: config.update(model_type="llama"))
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no weights for model\.norm\.weight"):
        compare_with_reference(root / "llama.ckpt", other)
    (other / "model.safetensors").write_bytes(b"{")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged or cut short"):
        compare_with_reference(root / "llama.ckpt", other)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        compare_with_reference(root / "llama.ckpt", tmp_path)
