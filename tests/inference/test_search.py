"""The loops that choose tokens, on scores that are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from megamm.errors import InputError
from megamm.inference.decoding import Decoding, draw, penalized, warped
from megamm.inference.search import Vocabulary, search

STOP = 0


class Table:
    """Scores that depend on the whole answer so far, drawn once for each; remembers the sizes of batches."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, spread: float = 1.0) -> None:
        self.prompts, self.vocab_size, self.spread = prompts, vocab_size, spread
        self.batches: list[int] = []
        self._sequences: list[list[int]] = []

    def scores(self, sequence: Sequence[int]) -> torch.Tensor:
        number = sum((place + 1) * 7919 * (token + 3) for place, token in enumerate(sequence))
        return self.spread * torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(number))

    def start(self) -> torch.Tensor:
        self._sequences = [list(prompt) for prompt in self.prompts]
        return self._logits()

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        self._sequences = [[*self._sequences[row], token] for row, token in zip(rows, tokens, strict=True)]
        return self._logits()

    def _logits(self) -> torch.Tensor:
        self.batches.append(len(self._sequences))
        return torch.stack([self.scores(sequence) for sequence in self._sequences])


class Script(Table):
    """Says given tokens behind each prompt."""

    def __init__(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], size: int) -> None:
        super().__init__(prompts, size)
        self.answers = {tuple(p): a for p, a in zip(prompts, answers, strict=True)}

    def scores(self, sequence: Sequence[int]) -> torch.Tensor:
        found = torch.zeros(self.vocab_size)
        for prompt, answer in self.answers.items():
            place = len(sequence) - len(prompt)
            if tuple(sequence[: len(prompt)]) == prompt and 0 <= place < len(answer):
                found[answer[place]] = 9.0
        return found


def words(size: int, **options: Any) -> Vocabulary:
    return Vocabulary(size, options.pop("stops", [STOP]), **options)


def test_each_row_stops_at_its_stop_token() -> None:
    prompts = [[1, 2], [3, 4, 5], [6]]
    script = Script(prompts, [[10, 11, STOP, 12], [STOP], [13, 14, 15, STOP]], 20)
    assert search(script, prompts, Decoding(50), words(20)) == [[10, 11], [], [13, 14, 15]]
    assert script.batches == [3, 2, 2, 1]  # a row that has stopped costs nothing
    assert [len(prompt) for prompt in prompts] == [2, 3, 1]  # the caller's lists are its own


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("beams", [1, 2])
def test_at_most_max_new_tokens(limit: int, beams: int) -> None:
    script = Script([[1]], [[5] * 20], 20)
    assert search(script, [[1]], Decoding(limit, beams), words(20)) == [[5] * limit]
    assert len(script.batches) == limit


def test_no_prompts_no_answers() -> None:
    assert search(Table([], 5), [], Decoding(), words(5)) == []


def test_what_is_never_said() -> None:
    script = Script([[1]], [[7, 12, 3]], 20)
    assert 7 not in search(script, [[1]], Decoding(3), words(20, unsaid=[7]))[0]
    assert max(search(script, [[1]], Decoding(3), words(12))[0]) < 12


# --- texts that end an answer ------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_a_text_ends_the_answer(beams: int) -> None:
    text = lambda ids: "".join(" abcdefghijklmnop"[i] for i in ids)  # noqa: E731
    script = Script([[1]], [[1, 2, 3, 4, 5]], 17)
    found = search(script, [[1]], Decoding(5, beams, stop=("zz", "bc")), words(17, text=text))
    assert found == [[1, 2, 3]]
    if beams == 1:
        assert len(script.batches) == 3, "tokens were computed that nobody sees"


# --- sampling ---------------------------------------------------------------------------------------


def test_draws_follow_the_probabilities() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(scores, 1, generator)] += 1
    torch.testing.assert_close(counts / 4000, scores.softmax(0), atol=0.03, rtol=0)
    assert draw(scores, 4, generator).sort().values.tolist() == [0, 1, 2, 3]  # without replacement
    assert draw(torch.tensor([0.0, -torch.inf, 1.0]), 3, generator).numel() == 2


def test_temperature_and_top_p() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]).log()
    kept = [torch.isfinite(warped(scores, 1.0, p)).tolist() for p in (0.49, 0.5, 0.51, 0.75, 0.76, 1.0)]
    first = [row[0] for row in kept]
    assert first[0] == first[1] == [True, False, False, False]
    assert first[2] == first[3] == [True, True, False, False]
    assert first[4] == [True, True, True, False] and first[5] == [True] * 4
    assert kept[2][1] == [False, False, True, True]
    torch.testing.assert_close(
        warped(scores, 0.5, 1.0).softmax(-1), scores.exp() ** 2 / (scores.exp() ** 2).sum(-1, keepdim=True)
    )


@pytest.mark.parametrize("top_p", [0.1, 0.35, 0.9])
def test_top_p_keeps_what_transformers_keeps(top_p: float) -> None:
    from transformers import TopPLogitsWarper

    scores = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    wanted = TopPLogitsWarper(top_p)(torch.zeros(20, 1), scores.clone())
    assert torch.equal(warped(scores, 1.0, top_p), wanted)


def test_an_answer_does_not_depend_on_its_batch() -> None:
    prompts = [[1, 2], [3], [4, 5, 6]]
    decoding = Decoding(6, sample=True, temperature=1.3, seed=7)
    together = search(Table(prompts, 30), prompts, decoding, words(30))
    alone = [search(Table([p], 30), [p], decoding, words(30))[0] for p in prompts]
    assert together == alone
    other = search(Table(prompts, 30), prompts, Decoding(6, sample=True, temperature=1.3, seed=8), words(30))
    assert other != together


def test_cold_samples_are_greedy() -> None:
    prompts = [[1, 2], [3]]
    cold = Decoding(6, sample=True, temperature=1e-3)
    greedy = search(Table(prompts, 30), prompts, Decoding(6), words(30))
    assert search(Table(prompts, 30), prompts, cold, words(30)) == greedy
    assert search(Table(prompts, 30), prompts, Decoding(6, temperature=9.0), words(30)) == greedy


# --- penalties --------------------------------------------------------------------------------------


def test_repetition_penalty() -> None:
    scores = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    found = penalized(scores, [[0, 1, 1, 0]], 2.0)
    assert found.tolist() == [[1.0, -4.0, 1.0, -1.0]] and scores[0, 0] == 2.0
    assert penalized(scores, [], 1.0) is scores


# --- beams ------------------------------------------------------------------------------------------


def best_by_trying(table: Table, prompt: list[int], length: int, power: float) -> list[int]:
    """The best of all answers of at most `length` tokens."""

    def log_probability(answer: Sequence[int]) -> float:
        steps = range(len(answer))
        return sum(float(table.scores([*prompt, *answer[:i]]).log_softmax(0)[answer[i]]) for i in steps)

    candidates: list[tuple[int, ...]] = []
    others = [token for token in range(table.vocab_size) if token != STOP]
    for size in range(length):
        candidates += [(*answer, STOP) for answer in itertools.product(others, repeat=size)]
    candidates += list(itertools.product(others, repeat=length))
    best = max(candidates, key=lambda answer: log_probability(answer) / len(answer) ** power)
    return [token for token in best if token != STOP]


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_enough_beams_find_the_best_answer(power: float) -> None:
    prompts = [[number] for number in range(1, 7)]
    table = Table(prompts, 4, spread=2.0)
    wanted = [best_by_trying(table, prompt, 3, power) for prompt in prompts]
    found = search(table, prompts, Decoding(3, beams=64, length_penalty=power), words(4))
    assert found == wanted
    assert len({len(answer) for answer in wanted}) > 1 or power != 1.0


def test_beams_find_what_is_likelier_than_the_greedy_answer() -> None:
    prompts = [[number] for number in range(1, 40)]
    table = Table(prompts, 12)
    greedy = search(table, prompts, Decoding(5), words(12, stops=[]))
    beams = search(table, prompts, Decoding(5, beams=5), words(12, stops=[]))

    def total(prompt: list[int], answer: list[int]) -> float:
        return sum(
            float(table.scores([*prompt, *answer[:i]]).log_softmax(0)[token])
            for i, token in enumerate(answer)
        )

    gains = [total(p, b) - total(p, g) for p, b, g in zip(prompts, beams, greedy, strict=True)]
    assert sum(gains) > 0 and sum(gain > 0 for gain in gains) > 10


def test_temperature_leaves_beams_alone_unless_they_are_drawn() -> None:
    prompts = [[1, 2], [3]]
    plain = search(Table(prompts, 30), prompts, Decoding(6, 5), words(30))
    assert search(Table(prompts, 30), prompts, Decoding(6, 5, temperature=0.2), words(30)) == plain
    drawn = [
        search(Table(prompts, 30), prompts, Decoding(6, 5, True, temperature=2.0, seed=seed), words(30))
        for seed in range(4)
    ]
    assert len({str(answers) for answers in drawn}) > 1
    again = search(Table(prompts, 30), prompts, Decoding(6, 5, True, temperature=2.0, seed=3), words(30))
    assert again == drawn[3]


def test_more_beams_than_words() -> None:
    assert len(search(Table([[1]], 3), [[1]], Decoding(4, beams=8), words(3))[0]) <= 4


# --- options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_new_tokens", 0),
        ("beams", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("repetition_penalty", -1.0),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{option}: "):
        Decoding(**{option: value})
