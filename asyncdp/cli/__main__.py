"""Lets ``python -m asyncdp.cli`` do what ``asyncdp`` does."""

from asyncdp.cli import main

if __name__ == "__main__":
    main()
