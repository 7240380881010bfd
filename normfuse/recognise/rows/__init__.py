"""Functions of rows, however they are written: cut, tried on numbers, named."""
