"""`python -m listener`: the same as `listener`."""

from listener.cli import main

main()
