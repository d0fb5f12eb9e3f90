"""What is read of the user's files: formats, sources, mixtures, kept answers."""
