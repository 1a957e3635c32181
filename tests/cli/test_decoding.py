"""What the options of answering commands mean."""

from __future__ import annotations

import argparse

import pytest

from megamm.cli.decoding import add_decoding, decoding_of
from megamm.errors import InputError
from megamm.inference import Decoding


def parsed(line: str, **defaults: object) -> Decoding:
    parser = argparse.ArgumentParser()
    add_decoding(parser)
    return decoding_of(parser.parse_args(line.split()), **defaults)


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("", Decoding()),
        ("--max-new-tokens 5", Decoding(5)),
        ("--temperature 0.7", Decoding(sample=True, temperature=0.7)),
        ("--temperature 0", Decoding()),
        ("--temperature 0 --sample", Decoding()),
        ("--top-p 0.9 --seed 3", Decoding(sample=True, top_p=0.9, seed=3)),
        ("--sample", Decoding(sample=True)),
        ("--beams 5", Decoding(beams=5)),
        ("--beams 5 --temperature 0.2", Decoding(beams=5, temperature=0.2)),
        ("--beams 5 --temperature 0.2 --sample", Decoding(beams=5, temperature=0.2, sample=True)),
        (
            "--beams 3 --length-penalty 0 --repetition-penalty 1.5",
            Decoding(beams=3, length_penalty=0.0, repetition_penalty=1.5),
        ),
        ("--stop a --stop b", Decoding(stop=("a", "b"))),
    ],
)
def test_options(line: str, wanted: Decoding) -> None:
    assert parsed(line) == wanted


def test_defaults_of_a_command() -> None:
    beams = dict(beams=3, length_penalty=0.0, stop=("\n",))
    assert parsed("--max-new-tokens 5", **beams) == Decoding(5, 3, length_penalty=0.0, stop=("\n",))
    assert parsed("--beams 1 --stop x", **beams) == Decoding(length_penalty=0.0, stop=("\n", "x"))


@pytest.mark.parametrize("line", ["--temperature -1", "--top-p 2", "--repetition-penalty 0"])
def test_values_out_of_range(line: str) -> None:
    with pytest.raises(InputError):
        parsed(line)
