import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_tile(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, x_stride, residual_stride, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """y, sum from x, residual, weight, bias: ROWS rows at once, each in one block."""
    col = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = (row < rows) & (col < columns)
    # the rows, held in registers from here on; beyond their ends loads give zero
    x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + col, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + residual).to(tl.bfloat16).to(tl.float32)
    total = tl.sum(tl.where(inside, rounded * rounded, 0.0), axis=1, keep_dims=True)
    added = rounded * tl.rsqrt(total / columns + 1e-06) * weight + bias
    tl.store(y_ptr + row * columns + col, added, mask=inside)
    tl.store(sum_ptr + row * columns + col, rounded, mask=inside)
