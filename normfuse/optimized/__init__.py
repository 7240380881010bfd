"""The module that optimize returns, its archive, and how it is compared."""
