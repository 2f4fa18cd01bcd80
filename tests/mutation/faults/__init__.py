"""The faults, a file a family: what is planted where, and the tests that see it."""

import importlib
import pkgutil

from tests.mutation.fault import Fault

FAULTS: tuple[Fault, ...] = tuple(
    fault
    for file in pkgutil.iter_modules(__path__)
    for fault in importlib.import_module(f"{__name__}.{file.name}").FAULTS
)
