"""The command line: its options are frozen, errors are one sentence, exit codes are as promised."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megamm.cli import doctor
from megamm.cli import entry as cli
from megamm.errors import UNEXPECTED, InputError, RunError

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "quickstart" / "llava.yaml"

# Every option of every subcommand. A new flag has to be added here, on purpose; values of a recipe
# are overridden as --section.key=value and need none.
OPTIONS = {
    "doctor": ["--debug", "--json"],
    "prepare": [
        *["SOURCE", "--debug", "--format", "--image-checks", "--images", "--instructions"],
        *["--keep-single-image", "--max-images", "--min-similarity", "--out", "--restart", "--split"],
        *["--template", "--tokenizer", "--workers"],
    ],
    "prepare tokenizer": [
        *["SOURCE", "--add-token", "--debug", "--format", "--from", "--out", "--template", "--vocab-size"],
    ],
    "data check": [
        *["DIR", "--debug", "--images", "--json", "--limit", "--list", "--max-images", "--recipe"],
        *["--sequence-length", "--tokens-per-image", "--workers"],
    ],
    "data stats": [
        *["DIR", "--debug", "--json", "--max-images", "--plot", "--recipe", "--sample", "--sequence-length"],
        "--tokens-per-image",
    ],
    "data preview": [
        *["DIR", "--debug", "--max-images", "--out", "--recipe", "--rows", "--sample", "--seed"],
        *["--sequence-length", "--tokens-per-image"],
    ],
    "convert import": ["--debug", "--from", "--out", "--pp", "--recipe", "--tokenizer", "--tp"],
    "convert export": ["--checkpoint", "--debug", "--family", "--merge-lora", "--out"],
    "convert verify": ["--against", "--checkpoint", "--debug", "--tolerance"],
    "verify": ["--all", "CKPT", "--debug"],
    "train": [
        *["RECIPE", "--a.b=c", "--debug", "--dry-run", "--preset", "--print-config", "--rank", "--world"],
    ],
    "report": ["RUN_DIR", "--debug", "--out"],
    "plan": ["RECIPE", "--a.b=c", "--debug", "--gpu", "--gpus", "--images", "--json", "--top"],
    "parity": [
        *["RECIPE", "--a.b=c", "--debug", "--full-size", "--json", "--layouts", "--timeout", "--tolerance"],
    ],
    "generate": [
        *["--beams", "--checkpoint", "--debug", "--image", "--length-penalty", "--max-new-tokens"],
        *["--pipeline", "--prompt", "--repetition-penalty", "--sample", "--seed", "--stop", "--temperature"],
        *["--tensor", "--top-p"],
    ],
    "chat": [
        *["--checkpoint", "--debug", "--host", "--image", "--max-new-tokens", "--port", "--seed", "--system"],
        *["--temperature", "--top-p", "--web"],
    ],
    "evaluate": [
        *["RECIPE", "--a.b=c", "--batch-size", "--beams", "--checkpoint", "--data", "--debug"],
        *["--demonstrations", "--images", "--json", "--length-penalty", "--limit", "--max-new-tokens"],
        *[
            "--out",
            "--pipeline",
            "--prompts",
            "--repetition-penalty",
            "--runs",
            "--sample",
            "--seed",
            "--shots",
        ],
        *["--stop", "--submission", "--task", "--temperature", "--tensor", "--top-p", "--vqa-rule"],
    ],
    "score": ["--debug", "--json", "--metric", "--predictions", "--references", "--vqa-rule"],
}


def subcommands(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """Parsers of the subcommands that run something, by full name."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        return {prefix: parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for name, child in nested[0].choices.items():
        found |= subcommands(child, f"{prefix} {name}".strip())
    return found


def test_option_set_is_frozen() -> None:
    found = {}
    for name, parser in subcommands(cli.build_parser()).items():
        actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
        names = [a.option_strings[-1] if a.option_strings else str(a.metavar) for a in actions]
        assert all(len(a.option_strings) <= 1 for a in actions), "no second spellings"
        found[name] = sorted(names)
    assert found == {name: sorted(options) for name, options in OPTIONS.items()}


def test_families_are_those_that_conversion_writes() -> None:
    from megamm.cli.weights import FAMILIES
    from megamm.convert import families

    written = {family.name for family in families.FAMILIES if family.export is not None}
    assert set(FAMILIES) == written and len(FAMILIES) == len(written)


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megamm", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_subcommand_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: megamm {name}")
    example = out.split("example:\n")[1]
    assert f"megamm {name} " in example


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from megamm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'megatron', 'numpy', 'yaml', 'rich', 'PIL') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    seconds = []
    for _ in range(3):
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime)
    assert result.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "SUBCOMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "RECIPE"),
        (["train", "none.yaml"], "none.yaml: No such file"),
        (["train", str(RECIPE), "--lr=3"], "did you mean optimizer.lr?"),
        (["train", str(RECIPE), "--optimizer.lr", "3"], "write it with '='"),
        (["train", str(RECIPE), "--training.steps=x"], "training.steps is 'x'"),
        (["train", str(RECIPE), "--print"], "--section.key=value"),
        (["train", str(RECIPE), "--world", "4"], "add --dry-run"),
        (["parity", str(RECIPE)], "--layouts"),
        (["verify", "none", "--quick"], "unknown argument '--quick'"),
        (
            ["prepare", "x.json", "--format", "llava", "--out", "o", "--tokenizer", "t", "--workers", "0"],
            "above 0",
        ),
        (
            ["generate", "--checkpoint", "c", "--image", "none.png", "--prompt", "what"],
            "none.png: no such file",
        ),
        (["generate", "--checkpoint", "c", "--prompt", "<image> what"], "1 <image> for 0 pictures"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("megamm: ") and err.count("\n") == 1
    assert message in err


def test_print_config_applies_overrides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", str(RECIPE), "--optimizer.lr=2e-3", "training.freeze=[vision]", "--print-config"]
    assert cli.main(arguments) == 0
    from megamm.recipe import load_recipe

    dump = tmp_path / "printed.yaml"
    dump.write_text(capsys.readouterr().out)
    recipe = load_recipe(dump)
    assert recipe.optimizer.lr == 2e-3 and recipe.training.freeze == ["vision"]
    assert recipe == load_recipe(RECIPE, ["optimizer.lr=2e-3", "training.freeze=[vision]"])


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """`megamm train` whose work raises `error`."""

    def work(*args: Any) -> int:
        raise error

    monkeypatch.setattr("megamm.recipe.load_recipe", work)
    return cli.main(["train", "recipe.yaml", *flags])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a.json: broken; mend it"), 2, "megamm: a.json: broken; mend it"),
        (RunError("step 3: diverged"), 1, "megamm: step 3: diverged"),
        (KeyboardInterrupt(), 130, "megamm: interrupted"),
        (PermissionError(13, "Permission denied", "/out"), 1, "megamm: /out: Permission denied"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert failing(error, monkeypatch) == code
    assert capsys.readouterr().err == line + "\n"


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(InputError("x: y"), monkeypatch, "--debug") == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("megamm: x: y\n")


def test_defects_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends so may be started again; its exit code is not that of an error which would come
    back."""
    assert failing(ZeroDivisionError("by what"), monkeypatch) == UNEXPECTED
    assert capsys.readouterr().err.endswith("ZeroDivisionError: by what\n")


def test_other_ranks_speak_last_and_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    waits: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert failing(RunError("disk full"), monkeypatch) == 1
        assert failing(KeyboardInterrupt(), monkeypatch) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert waits == [cli.RANK_PATIENCE_S]
    assert capsys.readouterr().err == "megamm: rank 3: disk full\n"


def test_an_error_of_all_ranks_is_printed_once() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "megamm", "train", str(RECIPE), "--training.steps=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("megamm: ")]
    assert lines == ["megamm: training.steps: 0 is not positive; give a number above 0"]


def test_interrupt_from_outside_ends_with_one_line(tmp_path: Path) -> None:
    """Ctrl-C while a recipe is being read (from a pipe that never delivers)."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "megamm", "train", str(pipe)]
    # a shell's background jobs ignore the signal, and so would what they start
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=heed)
    writer = os.open(pipe, os.O_WRONLY)  # returns when megamm has opened it for reading
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert err == "megamm: interrupted\n"


def test_module_and_version() -> None:
    from megamm import __version__

    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"megamm {__version__}\n")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--json"])
    findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)}
    for name in ("python", "torch", "megatron-core", "fused ops", "backend local", "backend chosen", "DALI"):
        assert name in findings, name
    for name in ("transformers", "cores", "memory", "disk"):
        assert name in findings, name
    assert findings["megatron-core"]["state"] == "ok"
    for finding in findings.values():
        assert finding["state"] == "ok" or finding["remedy"] or finding["name"] == "cuda", finding


def test_doctor_names_problems_with_remedies(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = {"megatron-core": "0.15.0"}
    monkeypatch.setattr(doctor, "_version", lambda package: versions.get(package))
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: ["NVIDIA H200, 143771 MiB, 550.54"])
    monkeypatch.setattr("megamm.device.pick_device", lambda choice: __import__("torch").device("cpu"))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "PROBLEM megatron-core      0.15.0; remedy: pip install megatron-core==0.16.1" in out
    assert "the driver sees 1 GPU(s), torch cannot use them; remedy: install a CUDA build" in out
    assert "absent  DALI" in out and "pip install 'megamm[dali]'" in out
