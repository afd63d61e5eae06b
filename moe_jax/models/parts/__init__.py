"""The parts that models are made of: layers, and what is around them."""
