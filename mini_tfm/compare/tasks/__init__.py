"""Tasks that show what a memory remembers, one file a task."""
