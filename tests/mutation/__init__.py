"""Planted faults: which of them do the tests see?

Each fault is one small change of the sources that a slip of the hand could make, with the tests that should
then fail. `python -m tests.mutation` plants them one by one in a copy of the tree; see its `--help`.
"""
