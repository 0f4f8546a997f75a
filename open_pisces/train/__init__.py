"""Training: one loop, three objectives."""
