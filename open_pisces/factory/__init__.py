"""Bulk work with models over datasets."""
