"""Experts for denoising: one network, two by timestep, or experts in its layers?"""
