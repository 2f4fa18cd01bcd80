import sys

from fastda.cli import main

sys.exit(main())
