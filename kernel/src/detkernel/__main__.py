"""`python -m detkernel`: the command line, for launchers that start a module."""

import os
import sys

if not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd():  # noqa: PTH109 - before anything is imported
    del sys.path[
        0
    ]  # a module there with the name of a library is not what is meant; the command `detkernel` has it not either

from detkernel.cli import main

main()
