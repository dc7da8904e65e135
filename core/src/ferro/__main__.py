"""`python -m ferro`: the same as the `ferro` command."""

import sys

from ferro.cli.main import main

sys.exit(main())
