"""Corpora of text: their documents, their tokens, and mixtures of several."""
