"""The command `python -m asyncdp.cli`, which does what `asyncdp` does."""

# Not relative: worker processes import this file as no part of a package.
from asyncdp.cli import main

if __name__ == "__main__":
    main()
