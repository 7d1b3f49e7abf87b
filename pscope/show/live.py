"""The live demo: a text's tokens at every layer, and what the state of one of them says in a prompt of one's choice.

`Demo` asks the model and knows nothing of pages; `live` is the page, and needs Gradio.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from functools import lru_cache, partial
from html import escape
from importlib.resources import files
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from jinja2 import Environment, Template
from torch import Tensor

from pscope.characters import visible
from pscope.engine.generate import Decoding
from pscope.engine.patchscope import Patchscope
from pscope.errors import PromptError, PscopeError
from pscope.experiments.grid import line_break
from pscope.experiments.next_token import LOGIT_LENS, Lens
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM, same_norm
from pscope.experiments.token_grid import TokenGrid
from pscope.inputs.targets import shipped_targets
from pscope.memory import out_of_memory
from pscope.models.model import LanguageModel
from pscope.models.prompts import Every, Prompt
from pscope.models.residual import capture
from pscope.show.page import as_line

if TYPE_CHECKING:
    import gradio as gr

MOST_CHARACTERS, MOST_TOKENS, MOST_NEW_TOKENS = 1000, 64, 50
"""The most that is read and said: those who share a demo wait for each other."""

TOP_K = 5
REMEMBERED = 16
"""So many texts and targets, of all who ask, are not computed anew."""

TEXT, TARGET, OWN = "Diana, Princess of Wales", "entity-description", "one of your own"

_LOG = logging.getLogger(__name__)
_TEMPLATES = files("pscope.show").joinpath("templates")
_FILES = re.compile(r"/(file[=/]|proxy=|upload|component_server|process_recording|deep_link|openapi|vibe-)")
"""What Gradio serves, takes, keeps or fetches beside the page."""


class Row(NamedTuple):
    """What one row says: how it goes on, and its most probable next tokens with their probabilities."""

    condition: str
    continuation: str
    next_tokens: list[tuple[str, float]]


class Spoken(NamedTuple):
    """What was patched into which target, and what its rows say: the patched one, and its two controls."""

    token: str
    target: Prompt
    rows: list[Row]


class _Seen(NamedTuple):
    """A text, its grid, and its states (tokens, layers, hidden)."""

    prompt: Prompt
    grid: pd.DataFrame
    states: Tensor


class Demo:
    """What the demo asks of a model. Texts are short, and what was asked last is remembered.

    All methods raise PscopeError for what is too long, or cannot be read as it is asked for.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._seen = lru_cache(REMEMBERED)(self._see)
        self._scope = lru_cache(REMEMBERED)(self._scope_of)

    def grid(self, text: str) -> pd.DataFrame:
        """Every token of a text at every layer by the logit lens: a table of `TokenGrid`.

        Where the tokenizer puts no start token before a text, a line break stands there.
        """
        return self._seen(text).grid

    def say(
        self, text: str, position: int, layer: int, target: str, at: str, target_layer: int, new_tokens: int
    ) -> Spoken:
        """What the state of a token at a layer says, where it is patched into a target at another.

        `at` is the target's placeholder: text that stands there once, "last", or "all:x" for every x. Beside it stand a
        random vector of the same norm in its place, and the target unpatched.
        """
        seen = self._seen(text)
        _check("token", position, 0, len(seen.prompt) - 1)
        _check("layer", layer, 0, self.model.n_layers)
        _check("target layer", target_layer, 0, self.model.n_layers)
        _check("number of new tokens", new_tokens, 1, MOST_NEW_TOKENS)
        scope = self._scope(target, at)
        state = seen.states[position, layer].reshape(1, 1, -1)
        random = same_norm(state, [f"{text!r} at {position}"], [layer], seed=0)
        states = torch.cat([state, random])[:, 0]  # (2, hidden)
        parts = list(scope.logits(states, target_layer))
        tops = self.model.most_probable(torch.cat([*(part.patched for part in parts), parts[0].clean[None]]), TOP_K)
        continuations = scope.generate(states, target_layer, Decoding(new_tokens))
        rows = map(Row, (PATCHED, RANDOM, CLEAN), [*continuations.text, continuations.clean_text], tops)
        return Spoken(seen.prompt.tokens[position], scope.target, list(rows))

    def _see(self, text: str) -> _Seen:
        prompt = self._short("the text", text, before=True)
        grid = TokenGrid(self.model, prompt, [Lens(LOGIT_LENS)], top_k=1).table()
        return _Seen(prompt, grid, capture(self.model, [prompt], [range(len(prompt))], range(self.model.n_layers + 1)))

    def _scope_of(self, target: str, at: str) -> Patchscope:
        return Patchscope(self.model, self._short("the target prompt", target, at))

    def _short(self, what: str, text: str, at: str = "", *, before: bool = False) -> Prompt:
        if len(text) > MOST_CHARACTERS:
            raise PromptError(f"{what} has {len(text)} characters; {MOST_CHARACTERS} are the most here")
        kind, _, piece = at.partition(":")
        mark = Every(piece) if kind == "all" and piece and at not in text else at or -1
        prompt = self.model.prompt((line_break(self.model, text) if before else "") + text, mark)
        if len(prompt) > MOST_TOKENS:
            raise PromptError(f"{what} has {len(prompt)} tokens; {MOST_TOKENS} are the most here")
        return prompt


def grid_html(grid: pd.DataFrame) -> str:
    """The table of `Demo.grid`, tokens across and layers up."""
    tokens = grid.drop_duplicates("position")["token"]
    cells = grid.sort_values(["layer", "position"], ascending=[False, True])
    layers = [(layer, rows.to_dict("records")) for layer, rows in cells.groupby("layer", sort=False)]
    return _template("live_grid.html").render(tokens=tokens, layers=layers)


def said_html(spoken: Spoken, position: int, layer: int, target_layer: int) -> str:
    """What was said, with the target that it goes on from."""
    where = {"position": position, "layer": layer, "target_layer": target_layer}
    return _template("live_said.html").render(spoken._asdict(), **where, pieces=list(_pieces(spoken.target)))


def refused_html(reason: str) -> str:
    """A line in the place of what is said."""
    return _template("live_said.html").render(refused=reason)


def gradio() -> ModuleType:
    """Gradio. Raises PscopeError where it is not installed."""
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise PscopeError('the live demo needs Gradio; pip install "pscope[app]"') from error
    return gr


def live(model: LanguageModel) -> gr.Blocks:
    """The page of the demo: `live(model).launch()` serves it, here or as a Space of the hub.

    Limits, a queue of one and the closed ways to files are the page's own; where it listens is for `launch`.
    """
    gr, demo, targets = gradio(), Demo(model), shipped_targets()

    def draw(text: str | None) -> tuple[Any, ...]:
        try:
            grid = demo.grid(text or "")
        except Exception:
            # Why not is told where something would be said, which fails likewise.
            return text, "", gr.Dropdown(choices=[], value=None)
        tokens = grid.drop_duplicates("position")["token"]
        choices = [(f"{position}: {_line(token)}", position) for position, token in enumerate(tokens)]
        return text, grid_html(grid), gr.Dropdown(choices=choices, value=len(choices) - 1)

    def read(
        text: str | None,
        position: int,
        layer: int,
        target: str | None,
        at: str | None,
        same: bool,
        target_layer: int,
        new_tokens: int,
    ) -> tuple[str, Any]:
        into = layer if same else target_layer
        cell = gr.HTML(position=position, layer=layer)
        try:
            spoken = demo.say(text or "", position, layer, target or "", at or "", into, new_tokens)
        except Exception as error:
            # It is this page's alone, and the others go on.
            gr.Warning(escape(visible(reason := _reason(error))), duration=5)
            return refused_html(reason), cell
        return said_html(spoken, position, layer, into), cell

    def choose(event: Any) -> tuple[int, int, Any]:
        return event.position, event.layer, gr.HTML(position=event.position, layer=event.layer)

    # By its annotation Gradio knows what is to be given the event, and as text it would mean nothing there.
    choose.__annotations__["event"] = gr.EventData

    def take(name: str, target: str, at: str) -> tuple[str, str]:
        named = targets.get(name)
        return (named.text, named.at) if named else (target, at)

    def at_layer(same: bool, layer: int) -> Any:
        return gr.Slider(value=layer, visible=not same)

    start = round(model.n_layers * 0.13)
    layers = partial(gr.Slider, 0, model.n_layers, value=start, step=1)
    with gr.Blocks(title="pscope", analytics_enabled=False) as page:
        gr.HTML(_template("live_head.html").render(model=model.name))
        drawn_text = gr.State(TEXT)
        with gr.Row(equal_height=True):
            text = gr.Textbox(TEXT, label="Text", max_lines=4, max_length=MOST_CHARACTERS, scale=9, elem_id="text")
            look = gr.Button("Read", variant="primary", scale=1, min_width=90, elem_id="look")
        with gr.Row():
            token = gr.Dropdown([], label="Token", elem_id="token", min_width=130)
            layer = layers(label="Layer", elem_id="layer", min_width=180)
            with gr.Column(min_width=180):
                same = gr.Checkbox(True, label="Patched at the same layer", elem_id="same")
                target_layer = layers(label="Target layer", elem_id="target-layer", visible=False)
            new_tokens = gr.Slider(
                1, MOST_NEW_TOKENS, 20, step=1, label="New tokens", elem_id="new-tokens", min_width=180
            )
        with gr.Row():
            named = gr.Dropdown([*targets, OWN], value=TARGET, label="Target prompt", elem_id="named", min_width=180)
            target = gr.Textbox(
                targets[TARGET].text,
                label="Its text",
                max_lines=4,
                max_length=MOST_CHARACTERS,
                elem_id="target",
                scale=3,
                min_width=320,
            )
            at = gr.Textbox(
                targets[TARGET].at,
                label="Its placeholder: x, all:x, or last",
                max_length=MOST_CHARACTERS,
                elem_id="at",
                min_width=130,
            )
        with gr.Row():
            with gr.Column(min_width=340):
                grid = gr.HTML(
                    css_template=_CHOSEN,
                    js_on_load=_CLICKED_AND_SEEN,
                    position=-1,
                    layer=start,
                    elem_id="grid",
                    apply_default_css=False,
                )
            with gr.Column(min_width=340):
                answer = gr.HTML(elem_id="said", apply_default_css=False)

        # All that runs the model stands in one line, and of what a page asks for meanwhile the last is done.
        private = {"api_visibility": "private"}
        asking = {"concurrency_id": "model", "trigger_mode": "always_last", "show_progress": "minimal", **private}
        aside = {"queue": False, "show_progress": "hidden", **private}
        inputs = [drawn_text, token, layer, target, at, same, target_layer, new_tokens]
        reading = {"fn": read, "inputs": inputs, "outputs": [answer, grid], **asking}
        gr.on([page.load, text.submit, look.click], draw, text, [drawn_text, grid, token], **asking).then(**reading)
        grid.select(choose, None, [token, layer, grid], **aside).then(**reading)
        named.input(take, [named, target, at], [target, at], **aside).then(**reading)
        target.input(lambda: OWN, None, named, **aside)
        at.input(lambda: OWN, None, named, **aside)
        same.input(at_layer, [same, layer], target_layer, **aside).then(**reading)
        gr.on([token.input, layer.input, target_layer.input, new_tokens.input, target.submit, at.submit], **reading)
    page.queue(default_concurrency_limit=1, max_size=16, api_open=False)
    # What Gradio takes only as it launches. The fonts are those that are there.
    page.launch = partial(
        page.launch,
        theme=gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=_TEMPLATES.joinpath("live.css").read_text("utf-8"),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        allowed_paths=[],
        max_file_size=0,
        app_kwargs={"middleware": [(_WithoutFiles, (), {})]},
    )
    return page


_CHOSEN = """
td[data-position="${position}"][data-layer="${layer}"] { outline: 3px solid var(--live-mark); outline-offset: -3px; }
"""

_CLICKED_AND_SEEN = """
element.addEventListener('click', ({ target }) => {
  const cell = target.closest('td[data-layer]');
  if (cell) trigger('select', { position: +cell.dataset.position, layer: +cell.dataset.layer });
});
watch(['position', 'layer'], () => {
  const cell = element.querySelector(`td[data-position="${props.position}"][data-layer="${props.layer}"]`);
  if (!cell) return;
  const table = element.querySelector('.scroll');
  const [at, seen] = [cell, table].map(part => part.getBoundingClientRect());
  if (at.left < seen.left || at.right > seen.right) table.scrollLeft += at.left - seen.left - seen.width / 2;
  if (at.top < seen.top || at.bottom > seen.bottom) table.scrollTop += at.top - seen.top - seen.height / 2;
});
"""


class _WithoutFiles:
    """A server without the ways to files that Gradio opens to every page, whether it has a use for them or not."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        if not _FILES.search(scope.get("path", "")):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def _check(what: str, number: object, least: int, most: int) -> None:
    if not isinstance(number, int) or not least <= number <= most:
        raise PscopeError(f"the {what} is {number!r}; it is a whole number from {least} to {most}")


def _reason(error: Exception) -> str:
    """What a page is told of an error. One that nobody foresaw is for whoever runs the demo."""
    if isinstance(error, PscopeError):
        return str(error)
    if out_of_memory(error):
        return "out of memory; a shorter text, or fewer new tokens, may fit"
    _LOG.error("a reading failed", exc_info=error)
    return "it failed, for a reason that nobody foresaw; the log of the demo tells more"


def _pieces(prompt: Prompt) -> Iterator[tuple[str, bool]]:
    """The text of a prompt piece by piece, each with whether it is marked."""
    start = 0
    for left, right in sorted(prompt.spans[position] for position in prompt.positions if prompt.spans):
        left = right - len(prompt.text[left:right].lstrip())
        yield prompt.text[start:left], False
        yield prompt.text[left:right], True
        start = right
    yield prompt.text[start:], False


def _line(text: str) -> str:
    """Text in one line, of which blanks can be seen too."""
    line = as_line(text)
    return line if line.strip() else line.replace(" ", "␣")


@lru_cache
def _template(name: str) -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"line": _line, "visible": visible}
    return environment.from_string(_TEMPLATES.joinpath(name).read_text("utf-8"))
