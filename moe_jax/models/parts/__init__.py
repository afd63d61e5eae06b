"""The parts that models are made of: layers, and everything around them."""
