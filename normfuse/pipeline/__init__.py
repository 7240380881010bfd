"""The way through: select passes, run them, explain them."""
