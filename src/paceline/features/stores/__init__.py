"""A file or folder for each feature store, and what they share."""
