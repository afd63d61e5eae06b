"""Softmax or sigmoid gates, at the same balance?"""
