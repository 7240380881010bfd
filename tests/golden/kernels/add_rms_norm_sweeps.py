import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def add_rms_norm_sweeps(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, sum_ptr, x_stride, residual_stride, rows, columns,
    BLOCK: tl.constexpr,
):
    """y, sum from x, residual, weight, bias: one row at once, read 1 time for its statistics and once to
    write."""
    lane = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(0)
    row = (first + tl.arange(0, 1)[:, None]).to(tl.int64)
    # sweep 1: the statistics, lane by lane, then across the lanes
    sums = tl.full([1, BLOCK], 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        col = start + lane
        inside = col < columns
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + residual).to(tl.bfloat16).to(tl.float32)
        sums += tl.where(inside, rounded * rounded, 0.0)
    total = tl.sum(sums, axis=1, keep_dims=True)
    # the results, block by block
    scale = tl.rsqrt(total / columns + 1e-06)
    for start in range(0, columns, BLOCK):
        col = start + lane
        inside = col < columns
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + row * residual_stride + col, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + col, mask=col < columns, other=0.0).to(tl.float32)
        rounded_2 = (x + residual).to(tl.bfloat16).to(tl.float32)
        tl.store(y_ptr + row * columns + col, rounded_2 * scale * weight + bias, mask=inside)
        tl.store(sum_ptr + row * columns + col, rounded_2, mask=inside)
