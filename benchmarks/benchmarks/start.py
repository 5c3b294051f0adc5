"""What it takes to begin: each in an interpreter of its own."""


class Start:
    """Beyond what the interpreter takes; NumPy, which most of them import, for comparison."""

    def timeraw_numpy(self):
        return "import numpy"

    def timeraw_import(self):
        return "import mini_tfm"

    def timeraw_first_kernel(self):
        return "import mini_tfm, numpy; mini_tfm.softmax(numpy.zeros(1, numpy.float32))"

    def timeraw_first_model(self):
        return "import mini_tfm; mini_tfm.Transformer(mini_tfm.Config(vocab_size=8))"

    def timeraw_list_of_memories(self):
        return "import mini_tfm; mini_tfm.list_memories()"

    def timeraw_help_of_the_command_line(self):
        return """
            import contextlib, io
            from mini_tfm.cli import main

            with contextlib.redirect_stdout(io.StringIO()):
                main(["--help"], standalone_mode=False)
        """


class StartPeak:
    def peakmem_first_kernel(self):
        import numpy

        import mini_tfm

        mini_tfm.softmax(numpy.zeros(1, numpy.float32))
