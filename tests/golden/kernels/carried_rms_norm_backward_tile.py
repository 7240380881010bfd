import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def carried_rms_norm_backward_tile(
    x_ptr, weight_ptr, bias_ptr, d_y_ptr, d_sum_ptr, d_x_ptr, d_weight_ptr, d_bias_ptr, x_stride, d_y_stride,
    d_sum_stride, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """d_x, d_weight, d_bias from x, weight, bias, d_y, d_sum: ROWS rows at once, each in one block."""
    col = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
    # sums over the rows of this program, in a fixed order; a second reduction adds the programs
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (col < columns)
        # the rows, held in registers from here on; beyond their ends loads give zero
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + row * d_y_stride + col, mask=inside, other=0.0).to(tl.float32)
        d_sum = tl.load(d_sum_ptr + row * d_sum_stride + col, mask=inside, other=0.0).to(tl.float32)
        product = d_y * weight
        total = tl.sum(x * x, axis=1, keep_dims=True)
        scale = tl.rsqrt(total / columns + 1e-06)
        total_2 = tl.sum(product * x, axis=1, keep_dims=True)
        product_2 = total_2 * (scale * scale * scale * -0.5) / columns * 2.0
        tl.store(d_x_ptr + row * columns + col, d_sum + (product * scale + product_2 * x), mask=inside)
        d_weight += tl.where(inside, d_y * (x * scale), 0.0)
        d_bias += tl.where(inside, d_y, 0.0)
    at = d_weight_ptr + tl.program_id(0).to(tl.int64) * columns + col
    tl.store(at, tl.sum(d_weight, axis=0, keep_dims=True), mask=col < columns)
    at = d_bias_ptr + tl.program_id(0).to(tl.int64) * columns + col
    tl.store(at, tl.sum(d_bias, axis=0, keep_dims=True), mask=col < columns)
