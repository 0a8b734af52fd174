"""``python -m kvatlas`` is ``kvatlas``."""

from kvatlas.cli import main

if __name__ == "__main__":
    main()
