"""A Jinja environment in which every template ends, soon and small.

Jinja's sandbox keeps a template from reaching Python. It does not keep it from counting for ever or
from building a text that fills the machine. Here generated code charges a `Budget`: at the start of
every block (loop body, macro, branch), at every comparison, call and filter, and for the size of
every value that grows. What one operation may build is checked before it is built, so that nothing
runs long between two charges. It knows Jinja, and nothing of chats or models.
"""

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context

_UNITS_PER_CLOCK = 64
_MAX_NODES = 200_000
_MAX_INT_BITS = 4_096
_MAX_SLOW_CHARS = 262_144
"""Strings longer than this only pass filters that run at the speed of memory."""
_LONG_NUMBER = re.compile(r"\d{6}")
# fmt: off
_GROWING_METHODS = frozenset((
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map", "join",
    "replace", "to_bytes",
))
_GROWING_FILTERS = frozenset((
    "batch", "slice", "center", "indent", "format", "join", "replace", "wordwrap", "urlize",
    "xmlattr", "truncate", "tojson", "round", "sum",
))
_FAST_FILTERS = frozenset((
    "trim", "length", "count", "string", "safe", "upper", "lower", "capitalize", "replace", "e",
    "default", "d", "escape", "tojson", "int", "float", "first", "last", "reverse", "indent",
    "format", "center",
))
_SLOW_TESTS: tuple[str, ...] = (
    "in", "==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=",
    "<", "lt", "lessthan", "<=", "le",
)
# fmt: on
_DICT_ATTRIBUTES = frozenset(dir(dict))


class LimitExceeded(Exception):
    """The template took too long or grew too large."""


class Limits(msgspec.Struct, frozen=True):
    """What one rendering may use."""

    time_s: float = 0.5
    """On the clock that is given."""
    max_chars: int = 8 * 1024 * 1024
    """Characters of output. A single value may have twice as many, all together sixteen times."""


class Budget:
    """What is left for one rendering. Errors, everywhere: LimitExceeded."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline = 0.0
        """0 until there was enough work to look at the clock: a thread's own is a system call."""
        self._time_s = limits.time_s
        self._chars_left = limits.max_chars * 16
        self._units = 0
        self.max_value = limits.max_chars * 2

    def charge(self, chars: int, units: int = 1) -> None:
        """Some work was done, and `chars` characters were made."""
        self._chars_left -= chars
        self._units += units + (chars >> 6)
        if self._units >= _UNITS_PER_CLOCK:
            self._units = 0
            if self._chars_left < 0:
                raise LimitExceeded("the template builds too much text")
            now = self._clock()
            self._deadline = self._deadline or now + self._time_s
            if now > self._deadline:
                raise LimitExceeded(f"the template takes longer than {self._time_s:g} s")

    def measure(self, value: Any) -> int:
        """Size of a value as text, roughly. Shared parts count each time, as they print."""
        if isinstance(value, str | bytes):
            return len(value) + 1
        if isinstance(value, int):
            return max(1, value.bit_length() // 3)
        if not isinstance(value, list | tuple | dict | set | frozenset):
            return 1
        total = num_nodes = 0
        stack: list[Iterable[Any]] = [_children(value)]
        while stack:
            for child in stack.pop():
                num_nodes += 1
                if isinstance(child, list | tuple | dict | set | frozenset):
                    stack.append(_children(child))
                total += 2 + (len(child) if isinstance(child, str | bytes) else 0)
                if total > self.max_value or num_nodes > _MAX_NODES:
                    raise LimitExceeded("the template builds too large a value")
        self.charge(0, num_nodes >> 3)
        return total + 2

    def check_product(self, value: Any, arguments: Iterable[Any]) -> None:
        """An operation may repeat `value` as often as its arguments say, or the other way round."""
        factor = 1
        for argument in arguments:
            is_number = isinstance(argument, int) and not isinstance(argument, bool)
            factor += abs(argument) if is_number else self.measure(argument)
        if (1 + self.measure(value)) * factor > self.max_value:
            raise LimitExceeded("the template builds too large a value")

    def check_format(self, pattern: str | bytes, arguments: Iterable[Any]) -> None:
        """A format string may hold widths, and may repeat its arguments."""
        text = pattern if isinstance(pattern, str) else pattern.decode("latin-1")
        if _LONG_NUMBER.search(text):
            raise LimitExceeded("the template builds too large a value")
        widths = sum(int(number) for number in re.findall(r"\d+", text))
        if widths > self.max_value:
            raise LimitExceeded("the template builds too large a value")
        self.check_product("{" * (text.count("{") + text.count("%")), arguments)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates are written for, with every operation charged."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            # folding constants would run filters while compiling, outside any budget
            optimized=False,
            finalize=_charge_output,
        )
        self.code_generator_class = _ChargingGenerator
        self._active = threading.local()
        for name in ("lipsum", "cycler"):
            self.globals.pop(name, None)
        for name in ("random", "attr"):
            self.filters.pop(name, None)
        for name, function in list(self.filters.items()):
            self.filters[name] = self._charged_filter(name, function)
        for name in _SLOW_TESTS:
            test: Any = self.tests[name]
            self.tests[name] = self._charged_test(test)

    def replace_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Use this function for a filter, charged like any other."""
        self.filters[name] = self._charged_filter(name, function)

    @contextmanager
    def spending(self, budget: Budget) -> Iterator[None]:
        """Whatever this thread renders within is charged to `budget`."""
        self._active.budget = budget
        try:
            yield
        finally:
            self._active.budget = None

    @property
    def budget(self) -> Budget:
        """The budget of this thread's rendering."""
        budget: Budget | None = getattr(self._active, "budget", None)
        if budget is None:
            raise LimitExceeded("nothing is computed outside a rendering")
        return budget

    def tick(self, chars: int) -> None:
        """Called by generated code where a block begins that writes so many constant characters."""
        self._active.budget.charge(chars)

    def bounded(self, value: Any) -> Any:
        """The same value, charged by its size."""
        budget: Budget = self._active.budget
        if isinstance(value, str | list | tuple | dict | bytes):
            size = budget.measure(value)
            if size > budget.max_value:
                raise LimitExceeded("the template builds too large a value")
            budget.charge(size)
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Every call in a template."""
        __self._active.budget.charge(0)
        if __obj is dict or __obj is Namespace:
            for value in (*args, *kwargs.values()):
                __self.bounded(value)
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators that can build something large."""
        if operator == "*":
            self._check_times(left, right)
        elif operator == "**":
            self._check_power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            self.budget.check_format(left, right if isinstance(right, tuple) else (right,))
        return self.bounded(self.binop_table[operator](left, right))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`; methods that can build something large are checked when called."""
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            # what a template does most; the general way raises and catches for it
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return self._checked_method(obj, attribute, super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`, which finds methods too."""
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return self._checked_method(obj, argument, super().getitem(obj, argument))

    def _checked_method(self, obj: Any, name: Any, found: Any) -> Any:
        if not isinstance(obj, str | bytes | int) or not isinstance(name, str):
            return found
        if name not in _GROWING_METHODS or not callable(found):
            return found

        def method(*args: Any, **kwargs: Any) -> Any:
            self._check_growth(name, obj, (*args, *kwargs.values()))
            return found(*args, **kwargs)

        return method

    def _charged_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
        grows, is_fast = name in _GROWING_FILTERS, name in _FAST_FILTERS

        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.budget.charge(0)
            if not is_fast and len(args) > first and isinstance(args[first], str):
                self._check_slow(args[first])
            if grows and len(args) > first:
                self._check_growth(name, args[first], (*args[first + 1 :], *kwargs.values()))
            return self.bounded(function(*args, **kwargs))

        return charged

    def _charged_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            self.budget.charge(0)
            return function(*args, **kwargs)

        return charged

    @staticmethod
    def _check_slow(value: str) -> None:
        if len(value) > _MAX_SLOW_CHARS:
            raise LimitExceeded("the template takes a long text apart character by character")

    def _check_growth(self, name: str, value: Any, arguments: tuple[Any, ...]) -> None:
        if name == "replace" and isinstance(value, str) and len(arguments) >= 2:
            old, new = str(arguments[0]), str(arguments[1])
            self._check_size(len(value) + value.count(old) * len(new))
        elif name in ("format", "format_map") and isinstance(value, str | bytes):
            self.budget.check_format(value, arguments)
        elif name == "sum" and any(isinstance(argument, list | tuple) for argument in arguments):
            raise LimitExceeded("the template adds up lists, which takes too long")
        else:
            self.budget.check_product(value, arguments)

    def _check_times(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        elif isinstance(left, int) or isinstance(right, int):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            if not isinstance(value, float):
                self._check_size(self.budget.measure(value) * max(count, 0))

    def _check_power(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * abs(right))

    def _check_size(self, size: int) -> None:
        if size > self.budget.max_value:
            raise LimitExceeded("the template builds too large a value")

    @staticmethod
    def _check_bits(bits: int) -> None:
        if bits > _MAX_INT_BITS:
            raise LimitExceeded("the template computes too large a number")


class _ChargingGenerator(CodeGenerator):
    """Writes calls of the environment's `tick` and `bounded` into the code of a template."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._repeats: set[int] = set()

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        # branches run at most once for each time that the body around them does, and macros and
        # blocks run by calls, which are charged themselves
        if id(nodes_) in self._repeats:
            data = [n for node in nodes_ for n in node.find_all(nodes.TemplateData)]
            data += [n for n in nodes_ if isinstance(n, nodes.TemplateData)]
            self.writeline(f"environment.tick({sum(len(node.data) for node in data)})")
        super().blockvisit(nodes_, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802
        self._repeats.add(id(node.body))
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        if _is_quick(node):
            super().visit_Compare(node, frame)
            return
        self.write("(environment.tick(0) or ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self._bounded(super().visit_Concat, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._bounded(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._bounded(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._bounded(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _bounded(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.bounded(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training. Here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own as in the original."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@pass_context
def _charge_output(context: Context, value: Any) -> Any:
    """Charged before a value is turned into text, since printing is what makes it large."""
    environment: Any = context.environment
    if type(value) is str:
        environment.tick(len(value))
        return value
    if isinstance(value, Namespace):
        raise SecurityError("a namespace cannot be printed")
    return environment.bounded(value)


def _is_quick(node: nodes.Compare) -> bool:
    """Whether a comparison takes no time whatever the values are: equality with a constant."""
    if len(node.ops) != 1 or node.ops[0].op in ("in", "notin"):
        return False
    return isinstance(node.expr, nodes.Const) or isinstance(node.ops[0].expr, nodes.Const)


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    children: Iterable[Any] = value
    return children
