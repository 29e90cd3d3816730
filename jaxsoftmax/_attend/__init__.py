"""Attention, a file a backend."""
