import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def softmax_sweeps(
    x_ptr, y_ptr, x_stride, rows, columns, BLOCK: tl.constexpr,
):
    """y from x: one row at once, read 1 time for its statistics and once to write."""
    lane = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(0)
    row = (first + tl.arange(0, 1)[:, None]).to(tl.int64)
    # sweep 1: the statistics, lane by lane, then across the lanes
    maxima = tl.full([1, BLOCK], float("-inf"), tl.float32)
    sums = tl.full([1, BLOCK], 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        col = start + lane
        inside = col < columns
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(maxima, tl.where(inside, x, float("-inf")))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        shrink = tl.exp(maxima - finite)
        grown = tl.where(inside, tl.exp(x - finite), 0.0)
        sums = sums * shrink + grown
        maxima = higher
    largest = tl.max(maxima, axis=1, keep_dims=True)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    shrink = tl.exp(maxima - finite)
    total = tl.sum(sums * shrink, axis=1, keep_dims=True)
    # the results, block by block
    for start in range(0, columns, BLOCK):
        col = start + lane
        inside = col < columns
        x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        e = tl.exp(x - largest)
        tl.store(y_ptr + row * columns + col, e / total, mask=inside)
