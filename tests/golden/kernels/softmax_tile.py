import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def softmax_tile(
    x_ptr, y_ptr, x_stride, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    """y from x: ROWS rows at once, each in one block."""
    col = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(0) * ROWS
    row = (first + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = (row < rows) & (col < columns)
    # the rows, held in registers from here on; beyond their ends loads give zero
    x = tl.load(x_ptr + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(inside, x, float("-inf")), axis=1, keep_dims=True)
    e = tl.exp(x - largest)
    total = tl.sum(tl.where(inside, e, 0.0), axis=1, keep_dims=True)
    tl.store(y_ptr + row * columns + col, e / total, mask=inside)
