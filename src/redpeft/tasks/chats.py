"""Chats: what rows of the usual formats say, as messages that a chat template writes.

A chat is a list of messages with "role" and "content" (OpenAI's form), or with "from" and "value" (ShareGPT's); each
role has one meaning in both. Errors here name no row: the caller knows it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from redpeft.errors import UserError, did_you_mean
from redpeft.models import load_tokenizer
from redpeft.tasks.columns import Missing, as_messages, is_missing, join_parts, parse_json

Chat = list[dict[str, Any]]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES |= {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ROLES |= {"developer": "system", "function": "tool"}
"""The roles of chat templates, by their names in data."""


def read_chat(value: Any) -> Chat:
    """The messages of a chat. Each has "role" and "content", and if they are given "tool_calls", "tool_call_id",
    "name", "reasoning_content" and "weight". Raises `UserError` for what is not a chat."""
    if is_missing(value):
        raise Missing("the chat is empty")
    found = as_messages(value)
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        form = "JSON of a list" if isinstance(value, str) else "a list"
        raise UserError(f"expected {form} of {{'role': ..., 'content': ...}}, found {str(value)[:60]}")
    return [_read_message(message, number) for number, message in enumerate(found, start=1)]


def read_answer(value: Any) -> Chat:
    """An answer that is a text, a message, or messages, which in a table are JSON text."""
    found = as_messages(value)
    message = {"role": "assistant", "content": found} if isinstance(found, str) else found
    return read_chat([message] if isinstance(message, dict) else message)


def _read_message(given: dict[str, Any], number: int) -> dict[str, Any]:
    said = given.get("from") if given.get("role") is None else given["role"]
    content, calls = given.get("value") if given.get("content") is None else given["content"], None
    if said not in tuple(ROLES):
        raise UserError(f"a message has the role {said!r}; roles are {', '.join(ROLES)}")
    if said == "function_call":
        content, calls = None, content
    elif said in ("assistant", "gpt"):
        calls = given.get("tool_calls") or given.get("function_call")
    content = join_parts(content)
    message = {"role": ROLES[said], "content": content}
    if found := _read_calls(calls) if calls else []:
        message |= {"content": content or "", "tool_calls": found}
    elif not isinstance(content, str) or (is_missing(content) and message["role"] != "tool"):
        raise UserError(f"message {number} ({said}): its content is empty or not text")
    if (weight := given.get("weight")) is not None:
        if weight not in (0, 1):
            raise UserError(f"a message has the weight {weight!r}: 1 learns an answer, and 0 does not")
        message["weight"] = int(weight)
    kept = ("tool_call_id", "name", "reasoning_content")
    return message | {name: given[name] for name in kept if given.get(name) is not None}


def _read_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them, from a list, one call, or JSON text of either."""
    found = parse_json(value)
    calls = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"expected a tool call such as {{'name': ..., 'arguments': ...}}, found {str(call)[:60]}")
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        arguments = function.get("arguments", {})
        calls.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a chat may call, from a list of JSON schemas or its JSON text; None if there are none."""
    found = None if is_missing(value) else parse_json(value)
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) and _tool_name(tool) for tool in found):
        raise UserError(
            f"expected a list of tools such as {{'name': ..., 'parameters': ...}}, found {str(value)[:60]}"
        )
    return found


def _tool_name(tool: dict[str, Any]) -> Any:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def tool_names(chat: Chat, tools: Iterable[dict[str, Any]] | None) -> list[str]:
    """The names of the tools that a chat may call or calls."""
    called = [call["function"]["name"] for message in chat for call in message.get("tool_calls", ())]
    return [*map(_tool_name, tools or ()), *called]


def learned_answers(chat: Chat) -> list[int]:
    """The places of the assistant's answers to something that the user said, but for those of weight 0."""
    roles = [message["role"] for message in chat]
    return [
        index
        for index, message in enumerate(chat)
        if message["role"] == "assistant" and "user" in roles[:index] and message.get("weight") != 0
    ]


# --- chat templates -------------------------------------------------------------------------------------------------


def set_chat_template(tokenizer: PreTrainedTokenizerBase, asked: str) -> None:
    """Give a tokenizer the chat template that `data.chat_template` asks for. "auto" and "plain" change nothing.

    Raises `UserError` if `asked` is neither a Jinja file, nor one of the tokenizer's own templates, nor one of TRL's,
    nor a model with a chat template.
    """
    if asked in ("auto", "plain"):
        return
    template: Any = None
    if "{%" in asked or "{{" in asked:
        raise UserError("data.chat_template names a Jinja file: write the template into one, such as mine.jinja")
    if (file := Path(asked).expanduser()).is_file() or (file := _trl_folder() / f"{asked}.jinja").is_file():
        try:
            template = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            raise UserError(f"data.chat_template: cannot read {file}: it is not a text in UTF-8") from None
    elif isinstance(tokenizer.chat_template, dict):
        template = tokenizer.chat_template.get(asked)
    if template is None:
        try:
            template = load_tokenizer(asked).chat_template
        except UserError:
            names = [each.stem for each in _trl_folder().glob("*.jinja")]
            raise UserError(
                f"data.chat_template: {asked!r} is no Jinja file, no template of the tokenizer or of TRL, and no model"
                + did_you_mean(asked, names)
            ) from None
    if template is None or "messages" not in str(template):
        raise UserError(f"data.chat_template: {asked} holds no chat template: none that reads `messages`")
    tokenizer.chat_template = template


def _trl_folder() -> Path:
    """The folder of TRL's templates; TRL, which need not be installed, is not imported."""
    spec = importlib.util.find_spec("trl")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0] if places else "") / "chat_templates"
