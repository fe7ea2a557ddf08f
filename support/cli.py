"""Command lines: flags from a dataclass, and errors of one line with exit code 2.

A script has a dataclass `Config` and a `main(args=None)` that begins with `config = cli.parse(Config, args)`. Each
field is a flag, its comment is the flag's help, a comment after an empty line is the title of a group of flags. Fields
without a default are given without a flag: `python predict.py photo.jpg`. The commands in the script's docstring are
the usage that `--help` shows.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from tqdm import tqdm

from support import distributed
from support.files import ROOT, short

T = TypeVar("T")
own_files: set[str] = set()  # of a person's own code, whose errors keep their traceback
_program: list[str] = [Path(sys.argv[0]).name]  # `train.py`, or `-m studies.compare`
_args: list[str] = sys.argv[1:]
_says_files = True


def parse(
    config_class: type[T],
    args: list[str] | None = None,
    dependent: Callable[[T], dict] = lambda config: {},
    stored: Callable[[T], dict] = lambda config: {},
    remember: bool = True,
) -> T:
    """The dataclass `config_class` with the values that the flags give; its `given` are the names of what was typed,
    its `settled` also those of what `stored` gave.

    A flag may be written with dashes or underscores. What is not known ends the program with one line on stderr and
    exit code 2.

    Args:
        args: the flags; None takes the command line's.
        dependent: gives, of a config, values that take the place of defaults because of flags: those of a preset, say.
        stored: the same of an earlier run. They go before those, and what is typed before both.
        remember: whether this is the program's own command line, which `command` gives and errors are named after.
    """
    global _program, _args
    args = list(sys.argv[1:] if args is None else args)
    if remember:
        path = Path(inspect.getfile(config_class)).resolve()
        in_folder = path.parent != ROOT and path.is_relative_to(ROOT)
        _print_everything()
        _program = ["-m", ".".join(path.relative_to(ROOT).with_suffix("").parts)] if in_folder else [path.name]
        _args = args
    typed = vars(_build_parser(config_class).parse_args([_with_underscores(arg) for arg in args]))
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
    given = frozenset(name for name, value in typed.items() if value != ())  # () is of what may be left out
    config, values = config_class(**typed), {}
    config.given = config.settled = given
    with one_line_errors():
        for layer in (dependent, stored):
            latest = layer(config)
            values |= latest
            config = config_class(**{**values, **typed})
            config.given, config.settled = given, given | latest.keys()
    return config


def checked_values(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of stored values, by name, that are fields of `config_class`.

    Raises:
        ValueError: one that no flag could give.
    """
    hints, checked = get_type_hints(config_class), {}
    for field in dataclasses.fields(config_class):
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            choices = get_args(hint) if get_origin(hint) is Literal else None
            kinds = {type(x) for x in choices} if choices else {*get_args(hint)} or {hint}
            if not (value in choices if choices else type(value) in kinds or (float in kinds and type(value) is int)):
                raise ValueError(f"{field.name} cannot be {value!r}")
            checked[field.name] = value
    return checked


def _print_everything() -> None:
    """Print what the terminal's or the file's encoding lacks as \\u4e2d: a class may be called anything."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")


def command() -> list[str]:
    """What was called, wherever it lies: `train.py`, or `-m` and a module's name; then the flags, without the password
    of a URL."""
    return [without_password(word) for word in command_with_passwords()]


def for_shell(words: list[str]) -> str:
    """A command line as one types it in the system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def command_with_passwords() -> list[str]:
    """The same to be called again, and never to be shown or stored."""
    return _program + _args


def without_password(text: str) -> str:
    """With stars for the password in a URL, which has no place in a message or a file."""
    return re.sub(r"(://[^:/@\s]*:)[^/\s]*@", r"\1***@", text)


@contextlib.contextmanager
def calling_another() -> Iterator[None]:
    """Within, another script's `main` may be called, whose files are not said, as they will not stay; afterwards
    `command` and errors are this program's again."""
    global _program, _args, _says_files
    before = _program, _args
    _says_files = False
    try:
        yield
    finally:
        (_program, _args), _says_files = before, True


def script() -> str:
    """The script as it was typed, so that it is found from the same folder."""
    typed = Path(sys.argv[0])
    return str(typed) if typed.name == _program[-1] else _program[-1]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not known."""
    similar = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {similar[0]}?" if similar else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = self._option_string_actions  # argparse has no public list of its flags
        for word in re.findall(r"--\w+", message.partition("unrecognized arguments:")[2]):
            message += did_you_mean(word, known)
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], re.findall(r"[\w+]+", choice[2]))
        fail(f"{message} (--help shows all flags)")


def _with_underscores(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else arg


def _build_parser(config_class: type) -> _Parser:
    description = inspect.cleandoc(config_class.__doc__)
    page = sys.modules[config_class.__module__].__doc__ or ""
    examples = [line.partition("#")[0].rstrip() for line in page.splitlines() if re.match(" +(python|torchrun) ", line)]
    usage = "\n".join(["", *examples]).replace("%", "%%") or None
    # what is not typed is left out: the dataclass has the defaults
    parser = _Parser(usage=usage, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    groups = {"options": parser}
    hints, fields = get_type_hints(config_class), {field.name: field for field in dataclasses.fields(config_class)}
    for name, (title, text) in flag_groups(config_class).items():
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add_argument(groups[title], fields[name], hints[name], text.replace("%", "%%"))
    return parser


def _add_argument(group, field: dataclasses.Field, hint: Any, text: str) -> None:
    name, default = field.name, field.default
    if hint is bool:
        # the one that does not change the default is for runs that are repeated or go on, and is not in the help
        help_texts = (argparse.SUPPRESS, f"turn off: {text}") if default else (text, argparse.SUPPRESS)
        group.add_argument(f"--{name}", dest=name, action="store_true", help=help_texts[0])
        group.add_argument(f"--no_{name}", dest=name, action="store_false", help=help_texts[1])
        return
    options = {"help": text}
    if type(None) in get_args(hint):  # X | None
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        options["nargs"] = "*" if default in (dataclasses.MISSING, None) else "+"
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        options["choices"] = get_args(hint)
        hint = type(get_args(hint)[0])
    if default is dataclasses.MISSING:
        if options.get("nargs") == "*":
            options["default"] = []
        group.add_argument(name, type=hint, **options)
        return
    if default not in (None, ()):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        options["help"] += f" (default: {shown})".replace("%", "%%")
    metavar = None if "choices" in options else hint.__name__.upper()
    group.add_argument(f"--{name}", type=hint, metavar=metavar, **options)


@functools.cache  # it reads source code, and is asked for often
def flag_groups(config_class: type) -> dict[str, tuple[str, str]]:
    """Of each field the title of the group that it belongs to, and its help, both from the comments in the source; the
    class's own fields first, then those that it inherits."""
    texts = {}
    for cls in config_class.__mro__:
        if not dataclasses.is_dataclass(cls):
            continue
        source = textwrap.dedent(inspect.getsource(cls))
        lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
        alone = {number for number in comments if lines[number - 1].lstrip().startswith("#")}
        title = "options"
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            above, number = [], node.lineno - 1
            while number in alone:
                above.insert(0, comments[number])
                number -= 1
            if above and not lines[number - 1].strip():
                title = above.pop(0)
            beside = [comments[node.end_lineno]] if node.end_lineno in comments else []
            texts.setdefault(node.target.id, (title, " ".join(above + beside)))
    return texts


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can cause (a bad value, a bad file) into one line; other exceptions, and those out of a person's
    own code, keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        if own_files.intersection(frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise
        fail(str(error))


def progress(items: Iterable, title: str, unit: str, least: int = 0) -> tqdm:
    """The items, with a bar while they are gone through: on a terminal, of the first process, of `least` items."""
    hidden = distributed.rank() > 0 or (least and len(items) < least)
    return tqdm(items, title, unit=unit, leave=False, disable=hidden or None)  # None: only on a terminal


def require_positive(config, *names: str) -> None:
    """
    Raises:
        ValueError: one of these fields is below 1.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def say_written(paths: Iterable[str | Path]) -> None:
    """A line for each file, by its shorter name."""
    if _says_files:
        print("wrote", *map(short, paths), sep="\n  ")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print the message on one line and end with this exit code. Of several processes, the first that fails prints."""
    message = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(message.split()))  # how Python begins a system's errors
    if distributed.first_to_fail():
        print(f"{_program[-1]}: error: {message}", file=sys.stderr)
    raise SystemExit(code)
