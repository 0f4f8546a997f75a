"""Datasets: pictures and texts in shards, mixed in a closed-form order. Knows no modules."""
