"""`python -m mini_tfm` is `mini-tfm`."""

import sys


def main() -> None:
    """The command line. It takes a moment to import, and Ctrl-C may come then, too."""
    try:
        from mini_tfm.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
    command(prog_name="mini-tfm")


if __name__ == "__main__":
    main()
