"""What mini_tfm raises.

One base class, few children, each also a built-in kind, so that `except ValueError` written by someone
who never heard of this library still works. Every message names the argument, what was expected, what
came, and what to do when we know it.
"""

from typing import Any

SHOWN_CHARACTERS = 120


def shown(value: Any) -> str:
    """A value as an error shows it: short, whatever it is. Python refuses to write an integer of more than 4,300 digits."""
    try:
        text = repr(value)
    except Exception:
        text = "an integer of thousands of digits" if isinstance(value, int) else f"{type(value).__name__}, which cannot be shown"
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


class MiniTfmError(Exception):
    """Base of every error raised on purpose by this library."""


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
