"""What SafeLoader does beside the stock class and other loaders, on your machine. See `README.md` here."""

from typing import Final

BENCHMARKS: Final = ("transport", "startup", "memory", "scaling", "ordering")
"""All of them, in the order in which they are run and reported; each is a module here."""
