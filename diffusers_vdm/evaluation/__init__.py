"""Measure the likelihood of images by Monte Carlo, by all terms of a chain, or by the probability-flow ODE."""
