"""Whole trainings, written as a user of fastda would write them."""
