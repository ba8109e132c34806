"""What is learned and how it is scored: base.py says what a task is, and each task has a module."""
