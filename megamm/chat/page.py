"""The conversation in the browser: the page, and the server behind it. web.py has what happens on it."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageDraw
from starlette.middleware import Middleware

from megamm.chat.conversation import Conversation
from megamm.chat.web import Chat, problem
from megamm.errors import InputError
from megamm.inference import Decoding

_MOST_TOKENS = 2048
_AT_ONCE = 16  # visitors whose questions are looked at; one of them is answered
_WAITING = 64  # more than these are told to try again
# A page of this server loads from it alone, whatever a model writes.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'"
)
_STYLE = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
#conversation { min-height: 12rem; }
#conversation [aria-label=Share] { display: none; }  /* it would upload the picture */
#problem:empty, #problem:not(:has([role=alert])) { display: none; }
#problem [role=alert] { border-left: 4px solid #d9480f; padding: .5rem .75rem; background: #d9480f1f; }
#header { display: flex; align-items: baseline; gap: .75rem; flex-wrap: wrap; }
#header h1 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; }
#header p { margin: 0; opacity: .75; }
button:focus-visible, textarea:focus-visible, input:focus-visible { outline: 2px solid #2563eb !important; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""
_TOGGLE = "() => { document.body.classList.toggle('dark'); }"


@dataclass(frozen=True)
class Texts:
    """What the page says.

    Attributes:
        name: of the model.
        note: about its template; may be "".
        system: message that the page starts with; None: that of the template.
        takes_system: whether there is a place for one.
    """

    name: str
    note: str
    system: str | None
    takes_system: bool


def build(chat: Chat, texts: Texts, decoding: Decoding, pictures: Sequence[Path], folder: Path) -> Any:
    """The page (gradio Blocks).

    Args:
        decoding: whose length, temperature and top-p the page starts with.
        pictures: shown with the first question.
        folder: for the pictures of the examples.
    """
    with gr.Blocks(title=f"megamm: {texts.name}", analytics_enabled=False, fill_height=True) as page:
        with gr.Row():
            gr.HTML(_header(texts), elem_id="header", padding=False)
            shade = gr.Button("Light / dark", size="sm", scale=0, min_width=110)
        talk = gr.Chatbot(
            label="Conversation",
            elem_id="conversation",
            scale=1,
            height="55vh",
            render_markdown=False,
            feedback_options=None,
            buttons=[],  # (that for copying would copy what `messages` has escaped)
            placeholder="Show a picture and ask about it.",
        )
        trouble = gr.HTML("", elem_id="problem", padding=False)
        box = gr.MultimodalTextbox(
            {"text": "", "files": [str(picture) for picture in pictures]},
            label="Question",
            show_label=False,
            elem_id="question",
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            placeholder="Ask something; drop pictures here, or add them with the button on the left",
            autofocus=True,
            max_plain_text_length=100_000,
        )
        with gr.Row():
            stop = gr.Button("Stop", elem_id="stop", interactive=False, variant="stop", min_width=100)
            clear = gr.Button("Clear", elem_id="clear", min_width=100)
        system, controls = _settings(texts, decoding)
        gr.Examples(_examples(pictures, folder), box, label="Examples", cache_examples=False)
        memory = gr.State(lambda: Conversation(None, chat.answerer.has_memory))
        _connect(page, chat, (box, talk, memory, trouble, stop), clear, [*controls, system])
        shade.click(None, js=_TOGGLE, api_visibility="private")
    page.queue(max_size=_WAITING)
    return page


def _header(texts: Texts) -> str:
    note = f"<p>{escape(texts.note)}</p>" if texts.note else ""
    return f"<h1>{escape(texts.name)}</h1>{note}"


def _settings(texts: Texts, decoding: Decoding) -> tuple[Any, list[Any]]:
    """The system message; temperature, top-p and longest answer."""
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            temperature = gr.Slider(
                0,
                2,
                value=decoding.temperature if decoding.sample else 0,
                step=0.05,
                label="Temperature",
                info="0: the likeliest answer, always the same",
                elem_id="temperature",
            )
            top_p = gr.Slider(
                0.05, 1, value=decoding.top_p, step=0.05, label="Top-p", info="1: every word may be drawn"
            )
            longest = gr.Slider(
                1,
                max(_MOST_TOKENS, decoding.max_new_tokens),
                value=decoding.max_new_tokens,
                step=1,
                label="Max tokens",
                info="longest answer",
                elem_id="longest",
            )
        system = gr.Textbox(
            texts.system or "",
            label="System message",
            placeholder="that of the template",
            visible=texts.takes_system,
            lines=2,
        )
    return system, [temperature, top_p, longest]


def _connect(page: Any, chat: Chat, parts: tuple[Any, ...], clear: Any, settings: Sequence[Any]) -> None:
    """What happens when something is pressed. `settings`: temperature, top-p, longest answer, system."""
    box, talk, memory, _, stop = parts

    def ask(
        value: dict[str, Any],
        conversation: Conversation,
        temperature: float,
        top_p: float,
        longest: int,
        system: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        question, files = (value.get("text") or "").strip(), [Path(f) for f in value.get("files") or []]
        conversation.system = system.strip() or None
        if not question and not files:
            yield gr.skip(), gr.skip(), conversation, "", gr.skip()
            return
        empty, going = {"text": "", "files": []}, gr.update(interactive=True)
        try:
            values = (temperature, top_p, longest)
            for longer in chat.ask(request.session_hash, question, files, conversation, values):
                yield empty, messages(longer), longer, "", going
        except Exception as error:
            if not isinstance(error, InputError):
                traceback.print_exc()
            yield value, messages(conversation), conversation, problem(error), gr.update(interactive=False)
            return
        yield gr.skip(), gr.skip(), gr.skip(), "", gr.update(interactive=False)

    def end(request: gr.Request) -> None:
        chat.stop(request.session_hash)

    def forget(request: gr.Request) -> tuple[Any, ...]:
        chat.forget(request.session_hash)
        return None, [], Conversation(None, chat.answerer.has_memory), "", gr.update(interactive=False)

    def leave(request: gr.Request) -> None:
        chat.forget(request.session_hash)

    outputs, at_once = list(parts), {"queue": False, "api_visibility": "private"}
    box.submit(
        ask,
        [box, memory, *settings],
        outputs,
        api_visibility="private",
        concurrency_limit=_AT_ONCE,
        show_progress="hidden",
    )
    stop.click(end, None, None, **at_once)
    for event in (clear.click, talk.clear):  # (the conversation has a button of its own too)
        event(forget, None, outputs, show_progress="hidden", **at_once)
    page.unload(leave)


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as gradio's Chatbot takes it: which makes tags of what looks like them, also where it
    renders no Markdown."""
    found: list[dict[str, Any]] = []
    for exchange in conversation.exchanges:
        found += [{"role": "user", "content": {"path": str(picture)}} for picture in exchange.pictures]
        if exchange.question:
            found.append({"role": "user", "content": escape(exchange.question, quote=False)})
        found.append({"role": "assistant", "content": escape(exchange.answer, quote=False) or "…"})
    return found


def _examples(pictures: Sequence[Path], folder: Path) -> list[list[dict[str, Any]]]:
    """Questions to begin with, about the given pictures or a drawn one."""
    picture = pictures[0] if pictures else _drawn(folder / "example.png")
    questions = ("What is in the picture?", "Which colours do you see?", "Describe the picture in detail.")
    return [[{"text": question, "files": [str(picture)]}] for question in questions]


def _drawn(path: Path) -> Path:
    """A picture of three coloured shapes."""
    image = Image.new("RGB", (336, 336), "#f4efe4")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 160, 170), fill="#d33c2f")
    draw.rectangle((190, 60, 300, 170), fill="#2b62c4")
    draw.polygon([(170, 200), (80, 310), (260, 310)], fill="#2e9e57")
    image.save(path)
    return path


@contextlib.contextmanager
def served(page: Any, host: str, port: int, picture_mb: int) -> Iterator[str]:
    """Serve the page in the background; gives its address.

    Raises:
        InputError: the address cannot be listened at.
    """
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(f"megamm: --host {host}: whoever reaches this machine there can ask", file=sys.stderr)
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            max_file_size=f"{picture_mb}mb",
            app_kwargs={"middleware": [Middleware(_OwnThingsOnly)]},
            theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=_STYLE,
        )
    except OSError as error:
        reason = (
            f" ({error.strerror})" if error.strerror else ", which is in use or no address of this machine"
        )
        raise InputError(f"--port {port}: cannot listen at {host}{reason}; choose another") from None
    try:
        yield address
    finally:
        page.close(verbose=False)


class _OwnThingsOnly:
    """Tells the browser to load nothing from other hosts."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), policy]}
            await send(message)

        await self._app(scope, receive, send_with_policy)
