"""`python -m ferro` runs the `ferro` command."""

import sys

from ferro.cli.main import main

sys.exit(main())
