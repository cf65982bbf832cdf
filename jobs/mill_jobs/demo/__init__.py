"""Toy scenes, tiny models and how they were trained: the demo needs no downloads."""
