"""Lets ``python -m asyncdp.cli`` do what ``asyncdp`` does."""

from . import main

if __name__ == "__main__":
    main()
