"""When is a model with experts better begun from a dense one than from scratch?"""
