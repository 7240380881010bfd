import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def carried_rms_norm_backward_sweeps(
    x_ptr, weight_ptr, bias_ptr, d_y_ptr, d_sum_ptr, d_x_ptr, d_weight_ptr, d_bias_ptr, x_stride, d_y_stride,
    d_sum_stride, rows, columns, BLOCK: tl.constexpr,
):
    """d_x, d_weight, d_bias from x, weight, bias, d_y, d_sum: one row at once, read 1 time for its
    statistics and once to write."""
    lane = tl.arange(0, BLOCK)[None, :]
    # sums over the rows of this program, in a fixed order; a second reduction adds the programs
    for first in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = (first + tl.arange(0, 1)[:, None]).to(tl.int64)
        # sweep 1: the statistics, lane by lane, then across the lanes
        sums = tl.full([1, BLOCK], 0.0, tl.float32)
        sums_2 = tl.full([1, BLOCK], 0.0, tl.float32)
        for start in range(0, columns, BLOCK):
            col = start + lane
            inside = col < columns
            x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
            d_y = tl.load(d_y_ptr + row * d_y_stride + col, mask=inside, other=0.0).to(tl.float32)
            sums += x * x
            sums_2 += d_y * weight * x
        total = tl.sum(sums, axis=1, keep_dims=True)
        total_2 = tl.sum(sums_2, axis=1, keep_dims=True)
        # the results, block by block
        scale = tl.rsqrt(total / columns + 1e-06)
        product = total_2 * (scale * scale * scale * -0.5) / columns * 2.0
        for start in range(0, columns, BLOCK):
            col = start + lane
            inside = col < columns
            x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
            d_y = tl.load(d_y_ptr + row * d_y_stride + col, mask=inside, other=0.0).to(tl.float32)
            d_sum = tl.load(d_sum_ptr + row * d_sum_stride + col, mask=inside, other=0.0).to(tl.float32)
            tl.store(d_x_ptr + row * columns + col, d_sum + (d_y * weight * scale + product * x), mask=inside)
            at = d_weight_ptr + tl.program_id(0).to(tl.int64) * columns + col
            tl.store(at, tl.load(at, mask=inside) + d_y * (x * scale), mask=inside)
            at = d_bias_ptr + tl.program_id(0).to(tl.int64) * columns + col
            tl.store(at, tl.load(at, mask=inside) + d_y, mask=inside)
