"""Sentiment of product reviews across kinds of product: denoising auto-encoders, DANN, and what they beat."""
