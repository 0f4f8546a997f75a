"""Scenes as a test: frozen captions and questions, the judges that read pictures of scenes, diagnosis."""
