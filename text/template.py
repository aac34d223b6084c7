"""Chat messages to prompt text with the template that came with the model.

Rendered as Hugging Face does it, but bounded in time and size, since a template is code from a
model folder and its data comes from clients. Every failure is a `TemplateError` of one line. It
knows nothing of HTTP or tokens; what time it is, is an argument.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes

from text.assets import (
    CHAT_TEMPLATE_FILE,
    CHAT_TEMPLATE_JSON_FILE,
    EXTRA_TEMPLATES_FOLDER,
    TOKENIZER_CONFIG_FILE,
    ModelAssets,
)
from text.sandbox import BoundedEnvironment, Budget, LimitExceeded, Limits
from text.tokenizer import special_tokens

MAX_SOURCE_CHARS = 1_000_000
_MAX_MESSAGE_CHARS = 500
_NO_TEMPLATE = "this model has no chat template; send a plain prompt instead"


class TemplateError(Exception):
    """The messages cannot be rendered. The message is one line, fit for the client."""


class ChatTemplate:
    """The chat template of one model; safe to use from several threads.

    A missing or broken template is no error until something is to be rendered, for the model may
    still serve plain prompts: see `problem`.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        variables: Mapping[str, Any],
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._limits = limits or Limits()
        self._clock = clock
        self._variables = dict(variables)
        self._templates: dict[str, _Compiled] = {}
        self.problem: str | None = None if sources else _NO_TEMPLATE
        """Why nothing can be rendered; None if all is well."""
        environment = _environment()
        for name, source in sources.items():
            try:
                self._templates[name] = _Compiled(environment, source)
            except TemplateError as error:
                self.problem = str(error)

    @classmethod
    def from_assets(
        cls,
        assets: ModelAssets,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.thread_time,
    ) -> "ChatTemplate":
        """The template of these assets.

        `clock` counts the seconds a rendering takes: by default those this thread computes, so
        that a busy machine is no error of the template.
        """
        return cls(_sources(assets), special_tokens(assets), limits=limits, clock=clock)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now: datetime,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens written out. Errors: TemplateError.

        Lists of text parts reach a template as they are if it loops over `content`; otherwise they
        are joined by newlines. A template that only knows lists gets strings as a list of one part.
        `template_kwargs` reach the template as variables.
        """
        if self.problem is not None:
            raise TemplateError(self.problem)
        compiled = self._choose(tools)
        variables = {
            "documents": None,
            **self._variables,
            **(template_kwargs or {}),
            "messages": [compiled.adapted(message) for message in messages],
            "tools": list(tools) if tools is not None else None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": _strftime(now),
        }
        return compiled.render(variables, Budget(self._limits, self._clock), self._limits.max_chars)

    def takes_parts(self) -> bool:
        """Whether messages keep their content as a list of parts."""
        return bool(self._templates) and self._choose(None).takes_parts

    def _choose(self, tools: Sequence[Mapping[str, Any]] | None) -> "_Compiled":
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        return next(iter(self._templates.values()))


class _Compiled:
    """One template, and what it expects of a message's content."""

    def __init__(self, environment: BoundedEnvironment, source: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(f"the chat template is longer than {MAX_SOURCE_CHARS} characters")
        self._environment = environment
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
            # a chain of dicts, which each rendering would walk by itself
            self._template.globals = dict(self._template.globals)
        except Exception as error:  # a broken template can fail in many ways
            raise TemplateError(f"the chat template is broken: {_one_line(error)}") from error
        self.takes_parts = _loops_over_content(tree)
        self._only_parts = self.takes_parts and not _tests_for_strings(tree)

    def adapted(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message with its content in the form that this template takes."""
        content = message.get("content")
        if isinstance(content, str) and self._only_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not self.takes_parts:
            texts = [part["text"] for part in content if _is_text(part)]
            if len(texts) == len(content):
                return {**message, "content": "\n".join(texts)}
        return dict(message)

    def render(self, variables: dict[str, Any], budget: Budget, max_chars: int) -> str:
        """The output, each piece charged as it comes. Errors: TemplateError."""
        pieces: list[str] = []
        num_chars = 0
        try:
            with self._environment.spending(budget):
                context = self._template.new_context(variables)
                for piece in self._template.root_render_func(context):
                    pieces.append(piece)
                    num_chars += len(piece)
                    if num_chars > max_chars:
                        raise LimitExceeded(f"the prompt is longer than {max_chars} characters")
        except RecursionError as error:
            raise TemplateError("the chat template calls itself too deeply") from error
        except Exception as error:  # whatever a template provokes is the template's failure
            raise TemplateError(f"chat template: {_one_line(error)}") from error
        return "".join(pieces)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment()
    environment.replace_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: Any = "") -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime(now: datetime) -> Callable[[str], str]:
    return lambda pattern: now.strftime(str(pattern)[:200])


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError | OverflowError | TypeError | ValueError | KeyError):
        text = f"{type(error).__name__}: {text}"
    return text[:_MAX_MESSAGE_CHARS]


def _sources(assets: ModelAssets) -> dict[str, str]:
    """Template sources by name; a file of its own wins over one inside a configuration."""
    sources: dict[str, str] = {}
    for name in (TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_JSON_FILE):
        sources.update(_listed(assets.json(name).get("chat_template")))
    for file, content in assets.files.items():
        if file == CHAT_TEMPLATE_FILE:
            sources["default"] = content.decode(errors="replace")
        elif file.startswith(f"{EXTRA_TEMPLATES_FOLDER}/"):
            name = file.rpartition("/")[2].removesuffix(".jinja")
            sources[name] = content.decode(errors="replace")
    return sources


def _listed(value: Any) -> dict[str, str]:
    """A template in a configuration: the source, or a list of `{name, template}`."""
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        return {}
    entries = [entry for entry in value if isinstance(entry, dict)]
    return {
        str(entry.get("name", "default")): entry["template"]
        for entry in entries
        if isinstance(entry.get("template"), str)
    }


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether a loop goes over `....content`, `...['content']`, or a variable set from it."""
    names = {"content"}
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in names
        case nodes.Filter(node=nodes.Node() as inner):
            return _is_content(inner, names)
        case _:
            return False


def _tests_for_strings(tree: nodes.Template) -> bool:
    return any(test.name == "string" for test in tree.find_all(nodes.Test))
