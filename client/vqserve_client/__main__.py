"""`python -m vqserve_client` is `vqserve`."""

import sys

from vqserve_client.cli import main

sys.exit(main())
