"""`python -m detkernel`: the command line, for `torchrun -m detkernel run config.yaml`."""

from detkernel.cli import main

main()
