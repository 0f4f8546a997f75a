"""Where datasets come from: one file a source, pictures + texts -> `Sample`."""
