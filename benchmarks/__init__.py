"""Side-by-side timings, one file a question."""
