"""Triton kernels behind the operators: `fastda.triton.<op>` has the signature of `torch.ops.fastda.<op>`.

Each family's are in the file of its name. Imported by the first call that they serve, never by
`import fastda`.
"""

import importlib
import pkgutil

from fastda import registry

for _file in pkgutil.iter_modules(__path__):
    _found = vars(importlib.import_module(f"{__name__}.{_file.name}"))
    globals().update({raw: _found[raw] for raw in registry.RAW if raw in _found})
