"""The world of the ``tiny`` scale: composed scenes of openly licensed artwork, with captions and questions."""
