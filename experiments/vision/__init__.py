"""Experts for images: sparse, soft or none at equal FLOPs, and how few slots are enough?"""
