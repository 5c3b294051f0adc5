"""What mini_tfm raises.

One base class, few children, each also a built-in kind, so that `except ValueError` written by someone
who never heard of this library still works. Every message names the argument, what was expected, what
came, and what to do when we know it.
"""

from typing import Any

LONGEST = 4_000  # characters of a message
SHOWN_CHARACTERS = 120  # of a value in a message
_SHOWN_TEXT = 60


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is. Python refuses to write an integer of more than 4,300 digits."""
    if isinstance(value, str) and len(value) > _SHOWN_TEXT:
        return repr(value[:_SHOWN_TEXT] + "...")
    try:
        text = repr(value)
    except Exception:
        text = "an integer of thousands of digits" if isinstance(value, int) else f"{type(value).__name__}, which cannot be shown"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


class MiniTfmError(Exception):
    """Base of every error raised on purpose by this library. No message is longer than LONGEST: what is too long loses its middle."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= LONGEST:
            return text
        kept = LONGEST // 2 - 50
        return f"{text[:kept]} ... [{len(text) - 2 * kept:,} characters] ... {text[-kept:]}"


class InvalidValue(MiniTfmError, ValueError):
    """An argument, option, file or configuration field holds a value that cannot be used."""


class InvalidType(MiniTfmError, TypeError):
    """An argument has the wrong type or dtype."""


class FileProblem(MiniTfmError, OSError):
    """A file or folder cannot be read or written."""


class TrainingError(MiniTfmError, ArithmeticError):
    """Training cannot go on: the loss or a gradient is not finite."""


class PluginError(MiniTfmError, RuntimeError):
    """A memory strategy raised, or returned something that its contract does not allow."""
