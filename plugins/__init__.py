"""The built-in memories, one file each, found through entry points as anyone's are."""
