"""The page of a run: its own files as one HTML file that loads nothing."""
