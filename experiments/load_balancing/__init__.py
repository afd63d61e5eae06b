"""Auxiliary loss, loss-free bias, or nothing?"""
