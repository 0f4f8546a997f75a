"""Distances between sets of pictures: FID, kernel distance, CLIP score, reconstruction."""
