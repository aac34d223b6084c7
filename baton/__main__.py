"""`python -m baton` is `baton`."""

import sys

from baton.main import main

sys.exit(main())
