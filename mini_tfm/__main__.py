"""`python -m mini_tfm` is `mini-tfm`."""

from mini_tfm.cli import main

if __name__ == "__main__":
    main(prog_name="mini-tfm")
