"""F13: pickles that would run code, in every place of a checkpoint whose manifest was made to match them, for
every command that reads one."""

from __future__ import annotations

import io
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm import cli
from megamm.engine import groups, restricted
from megamm.engine.manifest import UntrustedCheckpoint
from megamm.engine.restricted import read_index
from tests.faults.checkpoints import PLACES, Canary, remake_manifest
from tests.faults.conftest import FROZEN

# What reads what: common.pt and the optimizer matter to training alone, and so on.
EVERYTHING = set(PLACES)
WEIGHTS = {"whole_index", "within_index", "tensor", "frozen_tensor", "other_file"}
COMMANDS = {
    "resume": EVERYTHING,
    "init_from": WEIGHTS | {"common"},
    "generate": WEIGHTS | {"common"},
    "evaluate": WEIGHTS | {"common"},
    "export": WEIGHTS,
    "verify": set(),
    "report": set(),
}


def arguments(command: str, checkpoint: Path, folder: Path, trained: Path) -> list[str]:
    recipe, run = str(trained / "recipe.yaml"), checkpoint.parents[1]
    questions = (
        '[{"id": "a", "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "x"}]}]'
    )
    (folder / "questions.json").write_text(questions)
    out = str(folder / "out")
    return {
        "resume": ["train", recipe, f"--run_dir={run}", FROZEN],
        "init_from": ["train", recipe, f"--run_dir={out}", FROZEN, f"--training.init_from={checkpoint}"],
        "generate": ["generate", "--checkpoint", str(run), "--prompt", "what?", "--max-new-tokens", "1"],
        "evaluate": [
            *("evaluate", recipe, "--checkpoint", str(checkpoint), "--task", "exact_match"),
            *("--data", str(folder / "questions.json"), "--out", str(folder / "answers.jsonl")),
        ],
        "export": ["convert", "export", "--checkpoint", str(checkpoint), "--out", out],
        "verify": ["verify", str(run), "--all"],
        "report": ["report", str(run)],
    }[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_in_a_checkpoint_is_run(
    command: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for place, plant in PLACES.items():
        folder = tmp_path / place
        checkpoint = folder / "run/checkpoints/step_00000009"
        shutil.copytree(trained / "run/checkpoints/step_00000009", checkpoint)
        canary = tmp_path / "canary"
        named = plant(checkpoint, canary)
        remake_manifest(checkpoint)
        capfd.readouterr()
        try:
            code = cli.main(arguments(command, checkpoint, folder, trained))
        finally:
            groups.shutdown()
        said = capfd.readouterr().err
        assert not canary.exists(), place
        assert "Traceback" not in said, said
        if place in COMMANDS[command]:
            assert code == 2 and str(named) in said and said.count("\n") == 1, (place, said)
            assert "convert import" in said or place == "tensor_called_object", said
        else:
            assert code in (0, 2), (place, said)
    shutil.rmtree(tmp_path)


def test_the_canaries_sing(trained: Path, tmp_path: Path) -> None:
    """Torch itself runs what is planted: else the test above would show nothing."""
    import torch.distributed.checkpoint as dcp

    checkpoint = Path(shutil.copytree(trained / "run/checkpoints/step_00000009", tmp_path / "checkpoint"))
    PLACES["within_index"](checkpoint, tmp_path / "canary")
    dcp.FileSystemReader(checkpoint / "shards").read_metadata()
    assert (tmp_path / "canary").exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x05",
        pickle.dumps({}),
        pickle.dumps(OrderedDict()),
        pickle.dumps(torch.float32),
        pickle.dumps(print),
        opcodes(b"cbuiltins\neval\n", b"X\x01\x00\x00\x001\x85R"),
        opcodes(b"ctorch\nload\n", b"X\x01\x00\x00\x00x\x85R"),
        opcodes(b"ctorch.distributed.checkpoint.filesystem\npickle.loads\n", b"X\x01\x00\x00\x00x\x85R"),
        opcodes(b"ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n", b"X\x01\x00\x00\x00x\x85R"),
        opcodes(b"ctorch.distributed.checkpoint.metadata\nos\n"),
        # an attribute of a class is replaced, by which later objects would be others
        opcodes(
            b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n",
            b"N}X\x03\x00\x00\x00fqnX\x01\x00\x00\x00xs\x86b",
        ),
    ],
)
def test_what_is_no_index_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    before = {name: value for name, value in vars(restricted.MetadataIndex).items()}
    with pytest.raises(UntrustedCheckpoint, match=rf"{tmp_path}/\.metadata: holds .*convert import"):
        read_index(tmp_path)
    assert dict(vars(restricted.MetadataIndex)) == before


def test_the_state_of_transformer_engine_is_looked_through(tmp_path: Path) -> None:
    def looked_through(content: Any) -> None:
        data = bytearray(pickle.dumps(content))
        restricted._check_inner_pickles([torch.frombuffer(data, dtype=torch.uint8)])

    looked_through({"scale_fwd": torch.ones(3), "extra_fp8_variables": OrderedDict(fp8_checkpoint=False)})
    for content in (Canary(tmp_path / "canary"), {"x": [Canary(tmp_path / "canary")]}, io.BytesIO):
        with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):
            looked_through(content)
    assert not (tmp_path / "canary").exists()
