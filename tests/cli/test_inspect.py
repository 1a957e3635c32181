"""`megamm data ...`: exit codes, what is printed, and which lengths count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamm.cli import entry as cli
from megamm.data.indexed import PreparedDataset
from tests.data.helpers import conversations, entry, prepared, recipe, write_images


def test_check_exits_by_what_it_finds(
    dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "check", "--workers", "0"]
    assert cli.main([*command, str(dataset_dir)]) == 0
    assert "no problems; 50 samples, 12 different images" in capsys.readouterr().out
    names = write_images(tmp_path / "pictures", 12)
    broken = prepared(tmp_path, conversations(names, 50), tokenizer_dir, [tmp_path / "pictures"]).out
    (tmp_path / "pictures" / "3.png").unlink()
    listing = tmp_path / "all.jsonl"
    cutting = ["--sequence-length", "110", "--tokens-per-image", "40", "--list", str(listing)]
    assert cli.main([*command, str(broken), "--json", "--limit", "1", *cutting]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["image"] == 1 and len(report["examples"]["image"]) == 1
    assert report["counts"]["cut_images"] > 10 and report["cut_samples"] > 10
    assert len(listing.read_text().splitlines()) == sum(report["counts"].values())


def test_repeated_samples_alone_are_no_problem(
    tmp_path: Path, image_folder: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [entry(0, "0.jpg", "What?", "It."), entry(1, "0.jpg", "What?", "It.")]
    out = prepared(tmp_path, same, tokenizer_dir, [image_folder]).out
    assert cli.main(["data", "check", str(out), "--workers", "0"]) == 0
    assert "duplicate: 1 samples that repeat" in capsys.readouterr().out


def test_lengths_of_a_recipe(
    dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megamm.recipe import recipe_to_yaml

    made = recipe(dataset_dir, tokenizer_dir, sequence_length=120, max_images=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_to_yaml(made))
    assert (
        cli.main(["data", "check", str(dataset_dir), "--workers", "0", "--recipe", str(path), "--json"]) == 1
    )
    counts = json.loads(capsys.readouterr().out)["counts"]
    dataset = PreparedDataset(dataset_dir)
    assert counts["cut_images"] == sum(len(dataset[row].images) > 1 for row in range(50))
    svg = tmp_path / "s.svg"
    assert cli.main(["data", "stats", str(dataset_dir), "--recipe", str(path), "--plot", str(svg)]) == 0
    out = capsys.readouterr().out
    assert "rows of 240 positions" in out and "positions" in out and svg.read_text().startswith("<svg")
    assert cli.main(["data", "stats", str(dataset_dir), "--sample", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["looked_at"] == 7
    page = tmp_path / "p.html"
    assert cli.main(["data", "preview", str(dataset_dir), "--recipe", str(path), "--out", str(page)]) == 0
    assert "20 samples" in capsys.readouterr().out and "cut here" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data"], "LOOK"),
        (["data", "look", "x"], "invalid choice: 'look'"),
        (["data", "check", "none"], "none: is no prepared dataset"),
        (["data", "check", "none", "--sequence-length", "9"], "add --tokens-per-image"),
        (
            ["data", "check", "none", "--sequence-length", "9", "--tokens-per-image", "10"],
            "does not fit into 9",
        ),
        (["data", "stats", "none", "--recipe", "r.yaml", "--max-images", "3"], "tells all lengths"),
        (["data", "stats", "none"], "none: is no prepared dataset"),
        (["data", "preview", "none", "--rows", "1,x"], "'x' is not a whole number"),
        (["data", "preview", "none", "--rows", "1", "--sample", "3"], "not allowed with"),
        (["data", "check", "none", "--workers", "-1"], "--workers"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = cli.main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("megamm: ") and err.count("\n") == 1 and message in err
