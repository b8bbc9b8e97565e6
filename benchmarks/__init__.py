"""What SafeLoader does beside the stock class and other loaders, on your machine. See `README.md` here."""

from typing import Final

BENCHMARKS: Final = (
    "transport", "nnunet", "startup", "memory", "scaling", "chaos", "recovery", "ordering", "gpu",
)  # fmt: skip
"""All of them, in the order in which they are run and reported; each is a module here."""
