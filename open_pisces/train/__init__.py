"""Training: one loop, three objectives, six recipes."""
