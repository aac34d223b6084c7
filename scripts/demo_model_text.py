"""The English that every Python installation holds: what the demo model is trained on.

Docstrings of the best documented parts of the standard library, C modules among them, and the
language reference in `pydoc_data`. It is little enough for a small model to learn by heart, which
is what keeps its greedy continuations from running in circles. Knows nothing of models or tokens.
"""

import ast
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SOURCES = (
    *("argparse", "ast", "asyncio", "bisect", "calendar", "codecs", "collections", "concurrent"),
    *("configparser", "contextlib", "copy", "csv", "dataclasses", "datetime", "difflib", "enum"),
    *("functools", "glob", "hashlib", "heapq", "hmac", "http", "importlib", "inspect", "ipaddress"),
    *("json", "logging", "multiprocessing", "os", "pathlib", "pickle", "queue", "random", "re"),
    *("sched", "secrets", "selectors", "shelve", "shutil", "signal", "socket", "socketserver"),
    *("ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading"),
    *("timeit", "traceback", "types", "typing", "unittest", "urllib", "uuid", "warnings"),
    *("weakref", "zipfile"),
)
C_MODULES = (
    *("builtins", "array", "atexit", "functools", "gc", "io", "itertools", "marshal", "math"),
    *("operator", "select", "signal", "socket", "struct", "sys", "threading", "time", "zlib"),
)


def corpus() -> list[list[str]]:
    """The paragraphs of every module and chapter in reading order, each where it is met first."""
    seen: set[str] = set()
    modules = []
    for texts in (*_python_modules(), *map(_object_docs, C_MODULES), *_chapters()):
        paragraphs = [p for text in texts for p in _prose(text)]
        modules.append([p for p in dict.fromkeys(paragraphs) if p not in seen])
        seen.update(paragraphs)
    return [paragraphs for paragraphs in modules if paragraphs]


def _python_modules() -> Iterator[list[str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in SOURCES:
        package = sorted(p for p in root.glob(f"{name}/**/*.py") if "test" not in p.parts)
        for path in [p for p in (root / f"{name}.py",) if p.exists()] + package:
            yield _source_docs(path.read_text("utf-8"))


def _source_docs(source: str) -> list[str]:
    """All docstrings of one file, in source order."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        (getattr(node, "lineno", 0), ast.get_docstring(node) or "")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented)
    ]
    return [text for _, text in sorted(found)]


def _object_docs(module: str) -> Iterator[str]:
    """Docstrings of what a C module holds, two levels deep."""
    members = vars(importlib.import_module(module))
    for _, member in sorted(members.items()):
        inner = sorted(vars(member).items()) if inspect.isclass(member) else []
        for holder in (member, *(value for _, value in inner)):
            text = getattr(holder, "__doc__", None)
            if isinstance(text, str):
                yield inspect.cleandoc(text)


def _chapters() -> Iterator[list[str]]:
    for _, text in sorted(topics.items()):
        yield [text]


def _prose(text: str) -> list[str]:
    """The paragraphs of one docstring that are prose, each on one line."""
    paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
    return [p for p in paragraphs if _is_prose(p)]


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English rather than as code, a table or a signature."""
    if len(paragraph.split()) < 4 or not paragraph.isascii() or ">>>" in paragraph:
        return False
    plain = sum(c.isalpha() or c in " ,.'" for c in paragraph)
    code = re.search(
        r"\w = |== |::=|\bdef |\breturn \w+\(|^[@*#=|+-]|^(New|Changed) in v|^class ", paragraph
    )
    ending = paragraph[-1] in ".:!?)"
    return plain / len(paragraph) >= 0.9 and code is None and ending
