"""Questions that runs answer: a folder each, with a sweep and a plot file."""
