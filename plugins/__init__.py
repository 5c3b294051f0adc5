"""The built-in memories, one file each. Entry points name them, as they name anyone's."""
