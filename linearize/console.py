"""How the command line talks: errors in one line, notes on stderr, numbers as people write them."""

import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from linearize.errors import LinearizeError

__all__ = [
    "OneLineErrors",
    "PlainCommand",
    "PlainGroup",
    "human_bytes",
    "human_tokens",
    "note",
    "parse_bytes",
    "parse_counts",
    "parse_tokens",
]

USER_ERROR, UNEXPECTED, INTERRUPTED = 2, 1, 130
DEBUG = "--debug"
SUFFIXES = {"k": 1024, "m": 1024**2}
BYTE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class _PlainHelp:
    """Help without the signs of newer typer: no `<bool>` after a flag, and MODEL instead of `{MODEL}` in the usage."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]  # type: ignore[misc]


class PlainCommand(_PlainHelp, TyperCommand):
    """A command with plain help."""


class PlainGroup(_PlainHelp, TyperGroup):
    """A group of commands with plain help."""


class OneLineErrors(PlainGroup):
    """The outermost command group, whose errors are one line on stderr: exit status 2 for the user's, 1 for our own.

    `--debug`, anywhere on the command line, adds the traceback.
    """

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        words = list(sys.argv[1:] if args is None else args)
        debug = DEBUG in words
        words = [word for word in words if word != DEBUG]
        extra["standalone_mode"] = False  # hands the exceptions to us
        try:
            status = super().main(words, *rest, **extra)
        except (KeyboardInterrupt, typer.Abort):
            status = INTERRUPTED
        except BrokenPipeError:
            # The reader of our stdout went away, as `head` does. Python would complain again when it closes stdout.
            sys.stderr.close()
            status = UNEXPECTED
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command; its help is printed already
                sys.exit(USER_ERROR)
            if debug:
                traceback.print_exc()
            message, status = _explain(error)
            print(f"error: {message}", file=sys.stderr)
        if status == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Exception) -> tuple[str, int]:
    """What to tell the user, in one line, and the exit status."""
    if isinstance(error, LinearizeError):
        return _one_line(str(error)), USER_ERROR
    if hasattr(error, "format_message"):  # a wrong word on the command line, found by typer
        context = getattr(error, "ctx", None)
        where = f" (see '{context.command_path} --help')" if context is not None else ""
        return _one_line(error.format_message()).rstrip(".") + where, USER_ERROR
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return f"{error.filename}: {error.strerror}; check the path", USER_ERROR
    return f"unexpected {type(error).__name__}: {_one_line(str(error))}; add {DEBUG} for the traceback", UNEXPECTED


def _one_line(text: str) -> str:
    return " ".join(text.split())


def note(text: str) -> None:
    """One line for the person who watches, on stderr."""
    print(text, file=sys.stderr, flush=True)


def parse_tokens(text: str, option: str) -> tuple[int, ...]:
    """`"1k,8192,32k"` -> (1024, 8192, 32768); k is 1024, m is 1024 * 1024.

    Raises:
        LinearizeError: not a comma-separated list of whole numbers of at least 1; names `option`.
    """
    counts = []
    for part in text.lower().split(","):
        digits, factor = part.strip(), 1
        if digits[-1:] in SUFFIXES:
            digits, factor = digits[:-1], SUFFIXES[digits[-1]]
        if not digits.isdecimal() or int(digits) < 1:
            raise LinearizeError(
                f"{option}: {part.strip()!r} is not a number of tokens >= 1; write for example 1k,8k,32k (1k = 1024)"
            )
        counts.append(int(digits) * factor)
    return tuple(counts)


def parse_bytes(text: str, option: str) -> int:
    """`"50MB"` -> 50,000,000; KB, MB, GB are powers of 1000, KiB, MiB, GiB of 1024, a bare number is bytes.

    Raises:
        LinearizeError: anything else; names `option`.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in BYTE_UNITS:
        raise LinearizeError(f"{option}: {text!r} is not a number of bytes; write for example 50MB, 48MiB or 8GB")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """`"1,4,16"` -> (1, 4, 16).

    Raises:
        LinearizeError: not a comma-separated list of whole numbers of at least 1; names `option`.
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise LinearizeError(f"{option}: {part!r} is not a whole number >= 1; write for example 1,4,16")
    return tuple(map(int, parts))


def human_tokens(tokens: int) -> str:
    """`8192` -> `8k`, `1000` -> `1000`: the way contexts are written on the command line."""
    for suffix, factor in reversed(SUFFIXES.items()):
        if tokens % factor == 0:
            return f"{tokens // factor}{suffix}"
    return str(tokens)


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KiB`; three digits are enough to compare."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
