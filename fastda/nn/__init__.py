"""The operators as modules."""
