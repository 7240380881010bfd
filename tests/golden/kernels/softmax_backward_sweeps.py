import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def softmax_backward_sweeps(
    x_ptr, d_y_ptr, d_x_ptr, x_stride, d_y_stride, rows, columns, BLOCK: tl.constexpr,
):
    """d_x from x, d_y: one row at once, read 1 time for its statistics and once to write."""
    lane = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(0)
    row = (first + tl.arange(0, 1)[:, None]).to(tl.int64)
    # sweep 1: the statistics, lane by lane, then across the lanes
    maxima = tl.full([1, BLOCK], float("-inf"), tl.float32)
    sums = tl.full([1, BLOCK], 0.0, tl.float32)
    sums_2 = tl.full([1, BLOCK], 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        col = start + lane
        inside = col < columns
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + row * d_y_stride + col, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(maxima, tl.where(inside, x, float("-inf")))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        shrink = tl.exp(maxima - finite)
        grown = tl.where(inside, tl.exp(x - finite), 0.0)
        sums = sums * shrink + grown
        sums_2 = sums_2 * shrink + d_y * grown
        maxima = higher
    largest = tl.max(maxima, axis=1, keep_dims=True)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    shrink = tl.exp(maxima - finite)
    total = tl.sum(sums * shrink, axis=1, keep_dims=True)
    total_2 = tl.sum(sums_2 * shrink, axis=1, keep_dims=True)
    # the results, block by block
    negative = -(total_2 / total / total)
    for start in range(0, columns, BLOCK):
        col = start + lane
        inside = col < columns
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + row * d_y_stride + col, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(x - largest)
        tl.store(d_x_ptr + row * columns + col, (d_y / total + negative) * e, mask=inside)
