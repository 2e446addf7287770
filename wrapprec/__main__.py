"""`python -m wrapprec`."""

from wrapprec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
