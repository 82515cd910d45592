"""Renders a chat template, which is a checkpoint's own program, within bounds: of time, of memory, of what it gives.

jinja's sandbox keeps a template from everything but its own variables. It may still count for ever, or make one text of
many gigabytes. Here every loop, call, filter and operator is a step: it looks at the clock, and what goes into it, and
what comes out of it, has a size."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.runtime import Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

SECONDS = 2.0  # of this thread's processor time
MOST = 2**23  # characters of a text, elements of a list, all that is inside them counted
TOTAL = 2**27  # bytes that all texts and lists take which a template makes
LONGEST = 2**20  # of a template's own text
ELEMENT = 16  # what an element of a list counts beside what it is
BITS = 4096  # of a whole number
FILTERS = """
    abs attr batch capitalize center count d default dictsort e escape first float format groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice
    sort string sum title tojson trim truncate unique upper
"""
PRODUCTS = ("batch", "center", "indent", "round", "slice", "tojson", "truncate")  # filters that multiply
# Methods whose result is no larger than the text and their arguments.
SMALL = """
    capitalize casefold copy count endswith find get index isalnum isalpha isdecimal isdigit islower isnumeric
    isspace istitle isupper items keys lower lstrip partition removeprefix removesuffix rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper values
"""


class TemplateTooLarge(SecurityError):
    """A template goes beyond a bound."""


class Bounds:
    """Of one rendering: its clock, and how much it has made."""

    def __init__(self) -> None:
        self._end, self._made = time.thread_time() + SECONDS, 0

    def step(self, made: Any = None) -> None:
        """Raises TemplateTooLarge where the time is up, or too much was made. `made`: a text or list, now."""
        if isinstance(made, str | list | tuple | dict):
            self._made += len(made) * (1 if isinstance(made, str) else 8)
            if self._made > TOTAL:
                raise TemplateTooLarge("it makes more and more texts or lists")
        if time.thread_time() > self._end:
            raise TemplateTooLarge(f"it takes more than {SECONDS:g} s")


_now = threading.local()


def step(made: Any = None) -> None:
    """One more step of the template that this thread renders, and what it made. Raises TemplateTooLarge."""
    bounds: Bounds | None = getattr(_now, "bounds", None)
    if bounds:
        bounds.step(made)


def size(value: Any, most: int = MOST, depth: int = 0) -> int:
    """How large a value is, with all that is in it, as often as it is in it. Raises TemplateTooLarge beyond `most`."""
    if isinstance(value, str | bytes):
        count = len(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > BITS:
            raise TemplateTooLarge("it makes a number of thousands of digits")
        count = 1
    elif isinstance(value, Namespace):
        count = size(value._Namespace__attrs, most, depth + 1)
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        if depth > 100:
            raise TemplateTooLarge("it makes lists within lists without an end")
        count = ELEMENT * len(value)
        inside = (part for pair in value.items() for part in pair) if isinstance(value, Mapping) else value
        for each in inside:
            count += size(each, most - min(count, most), depth + 1)
            if count > most:
                break
    else:
        count = 1
    if count > most:
        raise TemplateTooLarge(f"it makes more than {MOST} characters of one text or list")
    return count


def weigh(values: Iterable[Any], numbers: bool = True) -> None:
    """Raises TemplateTooLarge where the sizes of values, multiplied, are too large; whole numbers count as what they
    are."""
    product = 1
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            product *= max(1, abs(value)) if numbers else 1
        else:
            product *= max(1, size(value))
        if product > 8 * MOST:
            raise TemplateTooLarge("it makes a text or list of many times the size of what it is given")


class _Code(CodeGenerator):
    """jinja's, where what a template joins, lists and loops over is bounded too."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802 - a name of jinja\'s
        self._wrapped("joined", node.nodes, frame)

    def visit_List(self, node: nodes.List, frame: Any) -> None:  # noqa: N802 - a name of jinja\'s
        self.write("environment.sized(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:  # noqa: N802 - a name of jinja\'s
        if node.ctx != "load":
            super().visit_Tuple(node, frame)
            return
        self.write("environment.sized(")
        super().visit_Tuple(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:  # noqa: N802 - a name of jinja\'s
        self.write("environment.sized(")
        super().visit_Dict(node, frame)
        self.write(")")

    def _wrapped(self, name: str, parts: Sequence[nodes.Expr], frame: Any) -> None:
        self.write(f"environment.{name}((")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with the names that transformers gives to templates, bounded."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    code_generator_class = _Code

    def __init__(self, like: Any) -> None:
        """`like`: transformers' environment."""
        extensions = [type(each) for each in like.extensions.values()]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False)
        self.finalize = self._shown
        self.globals = {name: each for name, each in like.globals.items() if name not in ("lipsum", "cycler", "joiner")}
        self.filters = {name: _bounded(name, like.filters[name]) for name in FILTERS.split() if name in like.filters}
        self.filters["stepped"] = _stepped

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "stepped", [], [], None, None, lineno=loop.lineno)
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja has it
        step()
        if not isinstance(__obj, Macro) and __obj is not __self.globals.get("raise_exception"):
            args = tuple(list(_taken(each)) if isinstance(each, Iterator) else each for each in args)
            name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
            values = (*args, *kwargs.values())
            if isinstance(owner, str | bytes | int | list | dict | tuple):
                _check_method(name, owner, values)
            else:
                for value in values:
                    size(value)
        return __self.sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        step()
        if operator in ("*", "**"):
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if not numbers:
                weigh((left, right))
            elif operator == "**" and abs(right) * max(1, math.log2(abs(left) or 1)) > BITS:
                raise TemplateTooLarge("it makes a number of thousands of digits")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return self.sized(super().call_binop(context, operator, left, right))

    def sized(self, value: Any) -> Any:
        """The same value. Raises TemplateTooLarge for one that is too large."""
        if not isinstance(value, Iterator):
            size(value)
            step(value)
        return value

    def wrap_str_format(self, value: Any) -> Any:
        run = super().wrap_str_format(value)
        if run is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> Any:
            _check_format(str(value.__self__), (*args, *kwargs.values()))
            return run(*args, **kwargs)

        return checked

    def getitem(self, obj: Any, argument: Any) -> Any:
        found = super().getitem(obj, argument)
        return self.sized(found) if isinstance(argument, slice) else found

    def joined(self, parts: Sequence[Any]) -> str:
        """The operator ~."""
        step()
        size(parts)
        return str(self.sized("".join(map(str, parts))))

    def _shown(self, value: Any) -> Any:
        """What is about to be written."""
        step()
        size(value)
        return value

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # type: ignore[override]
        """What a macro, a block, or the template has written."""
        found, count = [], 0
        for part in parts:
            count += len(part)
            if count > MOST:
                raise TemplateTooLarge(f"it writes more than {MOST} characters")
            found.append(part)
        text = "".join(found)
        step(text)
        return text


def _stepped(values: Any) -> Any:
    """What a loop goes over, a step each."""
    if isinstance(values, Undefined):
        return values

    def each() -> Iterator[Any]:
        for value in values:
            step()
            yield value

    return each()


def _bounded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        step()
        given = args[1:] if first else args
        if given and isinstance(given[0], Iterator):
            given = (list(_taken(given[0])), *given[1:])
            args = (*args[:1], *given) if first else given
        values = (*given, *kwargs.values())
        if name == "replace" and len(given) > 2:
            _check_replaced(str(given[0]), str(given[1]), str(given[2]))
        elif name == "format":
            _check_format(str(given[0]), (*given[1:], *kwargs.values()))
        elif name == "join":
            _check_joined(given[0], str((*values[1:], "")[0]))
        elif name in PRODUCTS:
            weigh(values)
        result = filter(*args, **kwargs)
        if isinstance(result, Iterator):
            return _taken(result)
        size(result)
        step(result)
        return result

    first = hasattr(filter, "jinja_pass_arg")
    if first:
        run.jinja_pass_arg = filter.jinja_pass_arg  # type: ignore[attr-defined]
    return run


def _taken(values: Iterator[Any]) -> Iterator[Any]:
    for value in values:
        step()
        yield value


def _check_method(name: str, owner: Any, values: Sequence[Any]) -> None:
    if name in SMALL.split():
        return
    if name == "replace" and len(values) > 1:
        _check_replaced(owner, str(values[0]), str(values[1]))
    elif name == "join" and values:
        _check_joined(values[0], owner)
    elif name in ("format", "format_map"):
        _check_format(owner, values)
    else:
        weigh((owner, *values))


def _check_replaced(text: str, old: str, new: str) -> None:
    size(text), size(new)
    if (text.count(old) if old else len(text) + 1) * len(new) > MOST:
        raise TemplateTooLarge(f"it makes more than {MOST} characters of one text")


def _check_joined(parts: Any, between: str) -> None:
    if size(parts) + (len(parts) if hasattr(parts, "__len__") else 0) * len(between) > MOST:
        raise TemplateTooLarge(f"it makes more than {MOST} characters of one text")


def _check_format(text: str, values: Sequence[Any]) -> None:
    """Of a format: its widths are short numbers, and none is given as a value."""
    digits = 0
    for character in text:
        digits = digits + 1 if character.isdigit() else 0
        if digits > 4:
            raise TemplateTooLarge("it formats with a width of more than 4 digits")
    nested = "*" in text or text.count("{") > 1
    weigh((text, *values), numbers=nested)


@cache
def _compiled(template: str) -> Any:
    if len(template) > LONGEST:
        raise TemplateTooLarge(f"it has more than {LONGEST} characters")
    return Sandbox(_transformers("").environment).from_string(template)


_transformers = chat_template_utils._compile_jinja_template
_swapping = threading.Lock()


@contextmanager
def bounded() -> Iterator[None]:
    """In this block, transformers renders chat templates in our sandbox, in at most SECONDS."""
    with _swapping:
        chat_template_utils._compile_jinja_template = _compiled
        _now.bounds = Bounds()
        try:
            yield
        finally:
            _now.bounds = None
            chat_template_utils._compile_jinja_template = _transformers
