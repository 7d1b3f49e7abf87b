"""Chats: messages written out by a model's own template, which makes them a text like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Thread
from typing import cast

from transformers import PreTrainedTokenizerBase

from pscope.errors import PromptError

TEMPLATE_SECONDS = 10

Message = Mapping[str, str]
"""What somebody says: the "role", as "user", and the "content"."""


def chat_text(tokenizer: PreTrainedTokenizerBase, name: str, messages: Sequence[Message], *, begin: bool) -> str:
    """What a chat looks like to the model called `name`.

    With `begin`, the assistant's turn is begun, or, where the last message is the assistant's, left open, so that it
    goes on. Raises PromptError for what are no messages, for a model without a template, and for a template that
    refuses them, or comes to no end.
    """
    if not isinstance(messages, Sequence) or not messages or not all(map(_is_message, messages)):
        raise PromptError(
            f"a chat is a list of messages, each with a role and a content, as "
            f'[{{"role": "user", "content": "…"}}]; not {messages!r}'
        )
    if not tokenizer.chat_template:
        raise PromptError(f"{name} has no chat template; give a text instead")
    goes_on = begin and messages[-1]["role"] == "assistant"
    texts: list[str] = []
    fault = f"it did not end within {TEMPLATE_SECONDS} seconds"

    def fill() -> None:
        nonlocal fault
        try:
            text = tokenizer.apply_chat_template(
                [dict(each) for each in messages],
                tokenize=False,
                add_generation_prompt=begin and not goes_on,
                continue_final_message=goes_on,
            )
            # Only where it is not tokenised is it one text.
            texts.append(cast(str, text))
        except Exception as error:
            fault = " ".join(str(error).split())

    # A template is a program that comes with a checkpoint, and may have loops that nobody sees the end of.
    thread = Thread(target=fill, daemon=True)
    thread.start()
    thread.join(TEMPLATE_SECONDS)
    if not texts:
        raise PromptError(f"the chat template of {name} cannot be filled in: {fault}; ask without it")
    return texts[0]


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
