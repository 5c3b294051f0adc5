"""What mini_tfm raises.

One base class, few children, each also a built-in kind, so that `except ValueError` written by someone
who never heard of this library still works. Every message names the argument, what was expected, what
came, and what to do when we know it.
"""

LONGEST = 4_000  # characters of a message
_SHOWN = 60  # characters of a value in a message


def shown(value: object) -> str:
    """A value as a message shows it: its repr, the beginning of one that is long."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return repr(value[:_SHOWN] + "...")
    text = repr(value)
    return text if len(text) <= 2 * _SHOWN else text[: 2 * _SHOWN] + "..."


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
