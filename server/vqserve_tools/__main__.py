"""`python -m vqserve_tools` is `vqserved`."""

import sys

from vqserve_tools.cli import main

sys.exit(main())
