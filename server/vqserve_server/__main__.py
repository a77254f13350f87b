"""`python -m vqserve_server` is `vqserved`."""

import sys

from vqserve_server.cli import main

sys.exit(main())
