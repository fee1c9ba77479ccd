"""`python -m detkernel`: the command line, for `torchrun -m detkernel run config.yaml`."""

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd():  # noqa: PTH109 - before anything is imported
    del sys.path[0]  # a `torch.py` there is not what is meant; the command `detkernel` has it not either

from detkernel.cli import main

main()
