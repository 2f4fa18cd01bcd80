"""Unsupervised domain adaptation of a classifier: domain-adversarial training and the methods it is compared with."""
