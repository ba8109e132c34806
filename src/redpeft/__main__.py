"""`python -m redpeft` is the same as `redpeft`."""

from redpeft.cli import main

main()
