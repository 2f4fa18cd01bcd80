"""Unsupervised domain adaptation of a classifier: domain-adversarial training and its elders."""
