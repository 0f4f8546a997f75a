"""Readers of dataset formats, one file a format: each yields `Record`s."""
