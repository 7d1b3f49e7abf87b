"""Chats of the user's: messages in a file."""

from __future__ import annotations

from pathlib import Path

from pscope.errors import DataError
from pscope.files import as_path
from pscope.inputs.records import parse_json, prompt_of, read_text
from pscope.models.chats import Message


def read_chat(path: str | Path) -> list[Message]:
    """The messages of a JSON file: a list of objects with "role" and "content", or an object with such "messages".

    Raises DataError, naming the message where there is one to name.
    """
    path = as_path(path)
    content = parse_json(read_text(path), str(path))
    messages = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{path} is no list of messages, nor an object with "messages"; each has a role and a content')
    return [
        {key: prompt_of(message, key, f"{path}, message {number}") for key in ("role", "content")}
        for number, message in enumerate(messages, 1)
    ]
