"""`python -m stackproof` is the same as `stack`."""

from stackproof.cli import main

if __name__ == "__main__":
    main()
