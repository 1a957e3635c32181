"""The loops that lengthen answers token by token: greedy, sampling, beam search.

What computes the logits is behind `Scorer`. Ranks that see the same logits choose the same tokens: of equal
scores the lowest id counts, and what is drawn follows from the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megamm.inference.decoding import Decoding, draw, penalized, warped


class Scorer(Protocol):
    """Logits of sequences that grow."""

    def start(self) -> torch.Tensor:
        """[R, V] float32 logits behind the prompts, one row for each."""
        ...

    def step(self, tokens: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
        """Row i of the next batch is row `rows[i]` of the present one and `tokens[i]` behind it; those that
        go on from the same prompt stay side by side, in the order of the prompts. Returns the logits behind
        them, [len(rows), V]."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """What may be said.

    Attributes:
        size: tokens; rows of the embedding behind them have none.
        stops: tokens that end an answer and are no part of it.
        unsaid: tokens that no answer contains (placeholders of images).
        text: of the tokens of an answer; needed for texts that end it.
    """

    size: int
    stops: Collection[int]
    unsaid: Sequence[int] = ()
    text: Callable[[Sequence[int]], str] = lambda ids: ""

    def silence(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores, with minus infinity for what is never said."""
        scores[:, self.size :] = -torch.inf
        scores[:, list(self.unsaid)] = -torch.inf
        return scores


Listener = Callable[[int, int], None]  # number of the prompt, token


@torch.no_grad()
def search(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    words: Vocabulary,
    listener: Listener | None = None,
) -> list[list[int]]:
    """The tokens of the answers to prompts of ids, without those that end them.

    Args:
        listener: is told of each token as soon as it is chosen (not with beams, which change their minds).
    """
    if not prompts:
        return []
    if decoding.beams > 1:
        return _beam_search(scorer, prompts, decoding, words)
    return _one_by_one(scorer, prompts, decoding, words, listener)


def _one_by_one(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    words: Vocabulary,
    listener: Listener | None,
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    generators = [decoding.generator(prompt) for prompt in prompts] if decoding.sample else []
    still = list(range(len(prompts)))  # whose answer is each row of the batch
    logits = scorer.start()
    for length in range(1, decoding.max_new_tokens + 1):
        sequences = [[*prompts[p], *answers[p]] for p in still] if decoding.repetition_penalty != 1 else []
        scores = words.silence(penalized(logits, sequences, decoding.repetition_penalty))
        if decoding.sample:
            scores = warped(scores, decoding.temperature, decoding.top_p)
            chosen = [int(draw(row, 1, generators[p])) for row, p in zip(scores, still, strict=True)]
        else:
            chosen = scores.argmax(dim=-1).tolist()
        rows = []
        for row, (prompt, token) in enumerate(zip(still, chosen, strict=True)):
            if token in words.stops:
                continue
            answers[prompt].append(token)
            if listener is not None:
                listener(prompt, token)
            if not _has_stopped(answers[prompt], decoding, words):
                rows.append(row)
        if not rows or length == decoding.max_new_tokens:
            break
        still = [still[row] for row in rows]
        logits = scorer.step([chosen[row] for row in rows], rows)
    return answers


def _has_stopped(answer: Sequence[int], decoding: Decoding, words: Vocabulary) -> bool:
    return bool(decoding.stop) and any(text in words.text(answer) for text in decoding.stop)


@dataclass
class _Sentence:
    """The beams of one prompt.

    Attributes:
        running: log-probability and tokens of the beams that go on, best first.
        finished: normalised score and tokens of those that have ended, best first.
    """

    prompt: int
    running: list[tuple[float, list[int]]]
    finished: list[tuple[float, list[int]]] = field(default_factory=list)

    def can_improve(self, beams: int, length: int, length_penalty: float) -> bool:
        """Whether the best running beam, were it to end now, would be among the finished ones."""
        if len(self.finished) < beams:
            return True
        return self.running[0][0] / length**length_penalty > self.finished[-1][0]


def _beam_search(
    scorer: Scorer, prompts: Sequence[Sequence[int]], decoding: Decoding, words: Vocabulary
) -> list[list[int]]:
    """As transformers: of the best continuations of all beams, those that end are finished if they are among
    the first `beams`, and the best others run on."""
    sentences = [_Sentence(number, [(0.0, [])]) for number in range(len(prompts))]
    generators = [decoding.generator(prompt) for prompt in prompts]
    still, logits = list(sentences), scorer.start()
    for length in range(1, decoding.max_new_tokens + 1):
        scores = _continuations(still, logits, prompts, decoding, words)
        is_last = length == decoding.max_new_tokens
        tokens, rows, first, going = [], [], 0, []
        for sentence, per_beam in zip(still, scores, strict=True):
            generator = generators[sentence.prompt]
            best = _best(per_beam.flatten(), _num_candidates(decoding, words), decoding, generator)
            parents = _divide(sentence, best, per_beam.shape[-1], decoding, words, length, is_last)
            if not is_last and sentence.can_improve(decoding.beams, length, decoding.length_penalty):
                going.append(sentence)
                tokens += [ids[-1] for _, ids in sentence.running]
                rows += [first + parent for parent in parents]
            first += len(per_beam)
        still = going
        if not still:
            break
        logits = scorer.step(tokens, rows)
    return [_cut(sentence.finished[0][1], decoding, words) for sentence in sentences]


def _continuations(
    still: Sequence[_Sentence],
    logits: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    words: Vocabulary,
) -> list[torch.Tensor]:
    """For each sentence [beams, V]: log-probabilities of each beam with each token behind it."""
    sequences: list[list[int]] = []
    if decoding.repetition_penalty != 1:
        sequences = [[*prompts[s.prompt], *ids] for s in still for _, ids in s.running]
    scores = logits.log_softmax(dim=-1)
    scores = words.silence(penalized(scores, sequences, decoding.repetition_penalty))
    if decoding.sample:
        scores = warped(scores, decoding.temperature, decoding.top_p)
    so_far = torch.tensor([score for s in still for score, _ in s.running], device=scores.device)
    scores = scores + so_far[:, None]
    return list(scores.split([len(s.running) for s in still]))


def _num_candidates(decoding: Decoding, words: Vocabulary) -> int:
    """So many that `beams` of them go on even if all the others end."""
    return max(2, 1 + len(words.stops)) * decoding.beams


def _best(
    scores: torch.Tensor, count: int, decoding: Decoding, generator: torch.Generator
) -> list[tuple[float, int]]:
    """(score, index) of the candidates among the [N] continuations: the best, or drawn ones, as drawn."""
    if decoding.sample:
        indices = draw(scores, count, generator)
        return list(zip(scores[indices].tolist(), indices.tolist(), strict=True))
    found = scores.topk(min(count, len(scores)))
    return list(zip(found.values.tolist(), found.indices.tolist(), strict=True))


def _divide(
    sentence: _Sentence,
    best: Sequence[tuple[float, int]],
    vocab_size: int,
    decoding: Decoding,
    words: Vocabulary,
    length: int,
    is_last: bool,
) -> list[int]:
    """Candidates become finished or running beams. Returns which beam each running one continues."""
    going: list[tuple[float, list[int], int]] = []
    for rank, (score, index) in enumerate(best):
        parent, token = divmod(index, vocab_size)
        ids = [*sentence.running[parent][1], token]
        if token in words.stops or is_last:
            if rank < decoding.beams and score > -torch.inf:
                said = ids[:-1] if token in words.stops else ids
                sentence.finished.append((score / length**decoding.length_penalty, said))
        else:
            going.append((score, ids, parent))
    going = sorted(going, key=lambda beam: -beam[0])[: decoding.beams]
    sentence.running = [(score, ids) for score, ids, _ in going]
    sentence.finished = sorted(sentence.finished, key=lambda beam: -beam[0])[: decoding.beams]
    return [parent for _, _, parent in going]


def _cut(answer: list[int], decoding: Decoding, words: Vocabulary) -> list[int]:
    """The answer up to the token with which a text that ends it is complete."""
    for end in range(1, len(answer) + 1):
        if _has_stopped(answer[:end], decoding, words):
            return answer[:end]
    return answer
