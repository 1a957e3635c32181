"""Every source format on a small data set of its layout, and on the same with anything in it replaced."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megamm.data import instructions, json_entries
from megamm.data.conversation import Conversation, Skipped, TarPlace
from megamm.data.formats import FORMATS, Format, FormatOptions, make_format
from megamm.data.formats.fields import encodable
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError
from tests.data.formats.example import Example, seen
from tests.data.formats.examples import EXAMPLES


def entries(read: Format, sources: list[Path]) -> Iterator[Conversation | Skipped]:
    """Every chunk read by a reader of its own, as another process does."""
    for chunk in read.chunks(sources):
        other = pickle.loads(pickle.dumps(type(read)(read.options)))
        yield from other.read(pickle.loads(pickle.dumps(chunk)))


def checked(found: Conversation | Skipped) -> None:
    """What the rest of the program relies on."""
    assert encodable(found.key) and found.position >= 0
    if isinstance(found, Skipped):
        assert found.reason and encodable(found.reason)
        return
    assert found.turns
    roles = [turn.role for turn in found.turns]
    asked = roles[roles[0] == "system" :]
    assert roles == ["document"] or asked == ["user", "assistant"] * (len(asked) // 2) != []
    assert not any(IMAGE_TOKEN in turn.text for turn in found.turns if turn.role == "system")
    assert all(isinstance(turn.text, str) and encodable(turn.text) for turn in found.turns)
    assert sum(turn.text.count(IMAGE_TOKEN) for turn in found.turns) == len(found.images)
    assert not any(IMAGE_TOKEN in turn.text for turn in found.turns if turn.role == "assistant")
    for image in found.images:
        if isinstance(image, TarPlace):
            assert Path(image.tar).stat().st_size >= image.offset + image.length > image.offset
        else:
            assert all(name and encodable(name) for name in ([image] if isinstance(image, str) else image))


@pytest.mark.parametrize("small", [False, True], ids=["", "one entry per chunk"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str, small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if small:
        for module in ("lookup", "webdataset", "obelics"):
            monkeypatch.setattr(f"megamm.data.formats.{module}.CHUNK_ENTRIES", 1)
        monkeypatch.setattr("megamm.data.formats.mmc4.DOCUMENTS", 1)
        monkeypatch.setattr(json_entries, "BLOCK_ENTRIES", 1)
    example = EXAMPLES[name](tmp_path)
    found = list(entries(make_format(example.format, example.options), example.sources))
    for entry in found:
        checked(entry)
    assert [seen(example, entry) for entry in found if isinstance(entry, Conversation)] == example.wanted
    reasons = [entry.reason for entry in found if isinstance(entry, Skipped)]
    assert len(reasons) == len(example.skipped), reasons
    assert all(part in reason for part, reason in zip(example.skipped, reasons, strict=True)), reasons
    assert [entry.position for entry in found] == sorted(entry.position for entry in found) or len(
        example.sources
    ) > 1


def test_every_format_has_an_example(tmp_path: Path) -> None:
    made = []
    for name, make in EXAMPLES.items():
        (tmp_path / name).mkdir()
        made.append(make(tmp_path / name))
    assert {example.format for example in made} == set(FORMATS)
    with_places = {example.format for example in made if not example.images} - {"text"}
    for example in made:
        tars = make_format(example.format).image_tars(example.sources)
        assert (tars == example.sources) == (example.format in with_places and not example.images)


def test_every_task_has_instructions(tmp_path: Path) -> None:
    tasks = set()
    for name, make in EXAMPLES.items():
        (tmp_path / name).mkdir()
        tasks |= {wanted.task for wanted in make(tmp_path / name).wanted}
    for set_name in set(instructions.names()) - {instructions.NONE}:
        assert set(instructions._sets()[set_name]) | {""} == tasks


def test_options_out_of_range() -> None:
    for wrong in ({"min_similarity": 2}, {"max_images": 0}, {"keep_single_image": -0.1}):
        (key,) = wrong
        with pytest.raises(InputError, match=key):
            FormatOptions(**wrong)
    with pytest.raises(InputError, match="split: OCR-VQA has no 'minival'"):
        make_format("ocrvqa", FormatOptions(split="minival"))
    with pytest.raises(InputError, match="choose one of llava, "):
        make_format("nothing")


JUNK = st.sampled_from(
    [
        *(None, True, -1, 3, 10**30, 1.5, float("nan"), float("inf")),
        *("", " ", "<image>", "<im<image>age>", "\ud800", "x\0y", "../../etc/passwd", "a" * 3000, "success"),
        *([], [[]], [None], {}, {"a": 1}, [1, "b", {"c": []}]),
    ]
)


def nodes(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from nodes(part, (*place, key))


def replaced(value: Any, place: tuple[Any, ...], junk: Any, leave_out: bool | None) -> Any:
    if not place:
        return junk
    key, copy = place[0], (value.copy())
    if leave_out and len(place) == 1:
        copy.pop(key)
    elif len(place) == 1 and isinstance(junk, str) and isinstance(copy, dict) and leave_out is None:
        copy[junk] = copy.pop(key)
    else:
        copy[key] = replaced(copy[key], place[1:], junk, leave_out)
    return copy


def documents(example: Example) -> list[tuple[int, Any, bool]]:
    """Number, contents and whether it is lines, of the sources that are JSON."""
    found = []
    for number, path in enumerate(example.sources):
        if path.suffix == ".json":
            found.append((number, json.loads(path.read_text()), False))
        elif path.suffix == ".jsonl":
            found.append((number, [json.loads(line) for line in path.read_text().splitlines()], True))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in EXAMPLES.items()}


JSON_EXAMPLES = sorted(set(EXAMPLES) - {"webdataset", "obelics", "mmc4_tar"})


@pytest.mark.parametrize("name", JSON_EXAMPLES)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_anything_replaced(name: str, made: dict[str, Example], data: st.DataObject) -> None:
    example = made[name]
    number, value, lines = data.draw(st.sampled_from(documents(example)))
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(nodes(value))))
        leave_out = data.draw(st.sampled_from([False, False, True, None]))  # None: another key
        value = replaced(value, place, data.draw(JUNK), leave_out)
    path = example.sources[number].parent / f"changed{example.sources[number].suffix}"
    if lines and isinstance(value, list):
        path.write_text("".join(json.dumps(each) + "\n" for each in value))
    else:
        path.write_text(json.dumps(value))
    sources = [path if i == number else other for i, other in enumerate(example.sources)]
    try:
        for entry in entries(make_format(example.format, example.options), sources):
            checked(entry)
    except InputError as error:
        assert str(path) in str(error) or str(sources[0]) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize("name", JSON_EXAMPLES)
def test_malformed_json(name: str, made: dict[str, Example]) -> None:
    """Cut anywhere, and with bytes changed: our error, or what is still right."""
    example = made[name]
    for number, source in enumerate(example.sources):
        data = source.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 40)):
            path = source.parent / f"cut{source.suffix}"
            for changed in (data[:place], data[:place] + b"\xff{" + data[place:]):
                path.write_bytes(changed)
                sources = [path if i == number else other for i, other in enumerate(example.sources)]
                try:
                    for entry in entries(make_format(example.format, example.options), sources):
                        checked(entry)
                except InputError as error:
                    assert str(path) in str(error)
