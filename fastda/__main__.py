import sys

from fastda.tools.cli import main

sys.exit(main())
