"""What it takes to begin: each in an interpreter of its own."""


class Start:
    """A bare interpreter first, to be subtracted."""

    def timeraw_nothing(self):
        return "pass"

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
        return "from mini_tfm.cli import main; main(['--help'])"


class StartPeak:
    def peakmem_first_kernel(self):
        import numpy

        import mini_tfm

        mini_tfm.softmax(numpy.zeros(1, numpy.float32))
