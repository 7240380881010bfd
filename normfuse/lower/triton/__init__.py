"""Generated Triton kernels for row regions: pointwise steps and reductions along the columns of a matrix of rows."""
