"""Questions as people write them: where their pictures stand, and templates that are not for questions.

Words of the user and of the model are plain text. A template cuts nothing in them but `<image>`, so that is
taken apart wherever no picture belongs to it.
"""

from __future__ import annotations

from dataclasses import replace

from megamm.data.templates import Template
from megamm.data.tokenizer import IMAGE_TOKEN

TAKEN_APART = "< image>"


def words(text: str) -> str:
    """The text without placeholders: `<image>` is taken apart."""
    return text.replace(IMAGE_TOKEN, TAKEN_APART)


def with_places(question: str, num_pictures: int) -> str:
    """The question with one placeholder for each picture: where it has exactly as many, they are their
    places; otherwise the pictures stand before it and what it has are words."""
    if question.count(IMAGE_TOKEN) == num_pictures:
        return question
    return f"{IMAGE_TOKEN}\n" * num_pictures + words(question)


def as_questions(template: Template) -> Template:
    """The template, or for documents one under which a question is the beginning of a document."""
    if template.takes != "document":
        return template
    stop = tuple(token for token in template.tokens if token in template.end)
    return replace(
        template, takes="pair", question="{question}", answer="{answer}", image=IMAGE_TOKEN, stop=stop
    )
