"""Speed claims: one file a claim, each a ratio of two ways taken side by side in one run (``pisces bench NAME``)."""
