"""`python -m holdfast`, and `torchrun -m holdfast`."""

import sys

from holdfast.cli.main import main

sys.exit(main())
