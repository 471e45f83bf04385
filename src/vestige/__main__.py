"""``python -m vestige``: the command line."""

from vestige.cli.main import main

if __name__ == "__main__":
    main()
