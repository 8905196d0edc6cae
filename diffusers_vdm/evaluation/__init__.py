"""Measuring the likelihood of images: by Monte Carlo, by all terms of a chain, and by the probability-flow ODE."""
