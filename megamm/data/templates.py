"""Prompt templates: how turns become one text, and which of its tokens carry loss.

A template is data (the pieces of text around questions and answers); `vicuna` is the format v1.1 of
the Vicuna models as LLaVA-1.5 uses it, `plain` the caption format of LLaVA's alignment stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError


class Turn(NamedTuple):
    """One utterance, or a whole document; its text may contain `<image>` placeholders."""

    role: Literal["user", "assistant", "document"]
    text: str


class Segment(NamedTuple):
    """A stretch of the rendered text, and whether its tokens are learnt."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Template:
    """How a conversation is written down.

    Attributes:
        system: stands once before the first turn.
        question, answer: what stands before and after the text of a user's and the assistant's turn;
            of an answer, what stands after it is learnt too.
        captions: a question is reduced to its images, and there is one question and one answer only.
        stop: the text that ends an answer.
    """

    name: str
    system: str
    question: tuple[str, str]
    answer: tuple[str, str]
    captions: bool
    stop: str

    @classmethod
    def by_name(cls, name: str) -> Template:
        """The template of that name.

        Raises:
            InputError: there is none.
        """
        if name not in TEMPLATES:
            raise InputError(f"template: there is no {name!r}; choose one of {', '.join(TEMPLATES)}")
        return TEMPLATES[name]

    def segments(self, conversation: Sequence[Turn]) -> list[Segment]:
        """The rendered text (without `<s>`) in stretches that are learnt or not.

        Raises:
            InputError: turns do not alternate, or are more than the template has room for.
        """
        self._check(conversation)
        parts = []
        for position, (role, text) in enumerate(conversation):
            system = self.system if position == 0 else ""
            if role == "user":
                before, after = self.question
                parts.append(Segment(system + before + self._place_images(text) + after, False))
            else:
                before, after = self.answer
                parts.append(Segment(before + text + after, True))
        return [part for part in parts if part.text]

    def render(self, conversation: Sequence[Turn], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, beginning with `<s>`, and which of them carry loss.

        Only answers carry loss, with the text that ends them; `<image>` and `<s>` never do. The ids
        equal those of the whole rendered text, because no piece reaches over the start of an answer.
        """
        ids, mask = [tokenizer.bos_id], [False]
        for text, learnt in self.segments(conversation):
            new = tokenizer.encode(text, prefix=len(ids) == 1)
            ids += new
            mask += [learnt and token != tokenizer.image_id for token in new]
        return ids, mask

    def prompt_text(self, conversation: Sequence[Turn]) -> str:
        """The text that a model is asked to continue: turns that end with a question."""
        if not conversation or conversation[-1].role != "user":
            raise InputError("prompt: the last turn must be a question; add one")
        return "".join(text for text, _ in self.segments(conversation))

    def prompt(self, conversation: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
        """Token ids of `prompt_text`, beginning with `<s>`."""
        return tokenizer.encode(self.prompt_text(conversation), bos=True)

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Tokens that end an answer."""
        last = tokenizer.encode(self.stop, prefix=False)[-1]
        return sorted({tokenizer.eos_id, last})

    def _place_images(self, text: str) -> str:
        """Images first, in their order, each on a line of its own; captions drop the rest."""
        count = text.count(IMAGE_TOKEN)
        if self.captions:
            return IMAGE_TOKEN * count
        if not count:
            return text
        return (IMAGE_TOKEN + "\n") * count + text.replace(IMAGE_TOKEN, "").strip()

    def _check(self, conversation: Sequence[Turn]) -> None:
        for position, turn in enumerate(conversation):
            if turn.role != ("user", "assistant")[position % 2]:
                raise InputError(
                    f"turn {position + 1}: questions and answers must alternate, a question first; "
                    "correct the conversation"
                )
        if self.captions and len(conversation) > 2:
            raise InputError(
                f"template {self.name}: a caption is one question and one answer, not {len(conversation)} "
                "turns; use the template vicuna for conversations"
            )


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="vicuna",
            system=(
                "A chat between a curious user and an artificial intelligence assistant. "
                "The assistant gives helpful, detailed, and polite answers to the user's questions. "
            ),
            question=("USER: ", " ASSISTANT:"),
            answer=(" ", "</s>"),
            captions=False,
            stop="</s>",
        ),
        Template(name="plain", system="", question=("", ""), answer=("", "\n"), captions=True, stop="\n"),
    )
}
