//! Matrix products on CUDA: by cuBLASLt where it is there, else by Felid's own kernel (`--gemm native` asks for it).
//! Both accumulate in f32; f32 operands stay f32 unless TF32 was asked for.

use super::gemm_native::native_product;
use crate::cuda::{self, Gemm, Kind, Matrix, Product, View, Work};
use crate::ops::elementwise::same_dtype;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

fn kind(dtype: DType) -> Result<Kind> {
    match dtype {
        DType::F32 => Ok(Kind::F32),
        DType::BF16 => Ok(Kind::BF16),
        DType::F16 => Ok(Kind::F16),
        other => Err(Error::dtype("matmul", format!("needs f32, bf16 or f16 on CUDA, got {other}"))),
    }
}

/// The last two dimensions of t as they lie, where one of their strides is 1 and nothing repeats; else `None`.
fn matrix(t: &Tensor) -> Result<Option<Matrix>> {
    let r = t.rank();
    let (rows, cols) = (t.dim(r - 2), t.dim(r - 1));
    // a stride over one element is never used: call it whatever suits
    let stride = |d: usize, of: usize| if t.dim(d) <= 1 { of.max(1) } else { t.layout().strides()[d] };
    let along_rows = (stride(r - 1, 1), stride(r - 2, cols));
    let along_columns = (stride(r - 2, 1), stride(r - 1, rows));
    let pointer = t.pointer()?;
    let of = |leading, by_columns| Some(Matrix { pointer, rows, cols, leading, by_columns, batch_stride: 0 });
    Ok(match (along_rows, along_columns) {
        ((1, leading), _) if leading >= cols => of(leading, false),
        (_, (1, leading)) if leading >= rows => of(leading, true),
        _ => None,
    })
}

/// As [`matrix`], copying where it must. The tensor is the one that the matrix points into.
fn operand(t: &Tensor) -> Result<(Tensor, Matrix)> {
    if let Some(m) = matrix(t)? {
        return Ok((t.clone(), m));
    }
    let t = t.copy()?;
    match matrix(&t)? {
        Some(m) => Ok((t, m)),
        None => Err(Error::shape("matmul", format!("a matrix of shape {:?}", t.shape()))),
    }
}

/// `start + a b` in `dtype`: a `[m, k]`, b `[k, n]`, any strides.
pub(crate) fn gemm(a: &Tensor, b: &Tensor, start: Option<Tensor>, dtype: DType) -> Result<Tensor> {
    let shape = [a.dim(0), b.dim(1)];
    if a.dim(1) != b.dim(0) || start.as_ref().is_some_and(|s| s.shape() != shape) {
        let start = start.map(|s| s.shape().to_vec());
        return Err(Error::shape("gemm", format!("{start:?} + {:?} times {:?} does not fit", a.shape(), b.shape())));
    }
    let accumulate = start.is_some();
    let mut y = match start {
        Some(start) => start,
        None if a.dim(1) == 0 => Tensor::zeros(&shape, dtype, a.device())?,
        None => Tensor::empty(&shape, dtype, a.device())?,
    };
    if y.numel() == 0 || a.dim(1) == 0 {
        return Ok(y);
    }
    y.make_owner()?;
    let ((a, am), (b, bm)) = (operand(a)?, operand(b)?);
    multiply(&a, &b, am, bm, &mut y, 1, accumulate)?;
    Ok(y)
}

/// Two products of the same sizes as [`gemm`]'s: a batch of two for cuBLASLt, wherever their operands lie in memory, if the
/// second follows the first in all of them or is the same.
pub(crate) fn gemm_pair(a: [&Tensor; 2], b: [&Tensor; 2], start: [Option<Tensor>; 2], dtype: DType) -> Result<[Tensor; 2]> {
    let [m, k, n] = [a[0].dim(0), a[0].dim(1), b[0].dim(1)];
    let new = start[0].is_none() && start[1].is_none();
    let alike = a[0].shape() == a[1].shape() && b[0].shape() == b[1].shape() && start[0].is_some() == start[1].is_some();
    let (one, two) = (a[0].dtype(), [a[1], b[0], b[1]]);
    let whole = m > 0 && n > 0 && k > 0 && b[0].dim(0) == k && two.iter().all(|t| t.dtype() == one);
    let [first, second] = start;
    // what is added to lies where it lies: whether in order may differ from run to run, and results must not
    if !alike || !whole || !new || cuda::gemm() != Gemm::Auto || !cuda::has_blas() {
        return Ok([gemm(a[0], b[0], first, dtype)?, gemm(a[1], b[1], second, dtype)?]);
    }
    let target = || Tensor::empty(&[m, n], dtype, a[0].device());
    let mut ys = [target()?, target()?];
    let [(a0, am), (a1, am2)] = [operand(a[0])?, operand(a[1])?];
    let [(b0, bm), (b1, bm2)] = [operand(b[0])?, operand(b[1])?];
    let sizes = [a0.dtype().size(), b0.dtype().size(), dtype.size()];
    let (mut ams, mut bms) = ([am, am2], [bm, bm2]);
    let ascending = |m: &[Matrix; 2]| m[0].pointer <= m[1].pointer;
    let back = !(ascending(&ams) && ascending(&bms));
    if back {
        ams.reverse();
        bms.reverse();
        ys.reverse();
    }
    if ys[0].pointer()? > ys[1].pointer()? {
        ys.reverse();
    }
    let d =
        |y: &Tensor| Ok(Matrix { pointer: y.pointer()?, rows: m, cols: n, leading: n, by_columns: false, batch_stride: 0 });
    let apart = |of: [Matrix; 2], size: usize| {
        let same = of[0].leading == of[1].leading && of[0].by_columns == of[1].by_columns;
        let bytes = of[1].pointer.checked_sub(of[0].pointer).filter(|n| same && n % 16 == 0)? as usize;
        Some(Matrix { batch_stride: bytes / size, ..of[0] })
    };
    let ds = [d(&ys[0])?, d(&ys[1])?];
    let (gpu, input, output) = (a0.gpu()?, kind(a0.dtype())?, kind(dtype)?);
    if let (Some(a), Some(b), Some(d)) = (apart(ams, sizes[0]), apart(bms, sizes[1]), apart(ds, sizes[2])) {
        let product = Product { a, b, d, batch: 2, input, output, accumulate: false };
        // SAFETY: as in `multiply`, for both.
        if gpu.timed(|| work(&product), || unsafe { gpu.blas_product(&product) })? {
            if back {
                ys.reverse();
            }
            return Ok(ys);
        }
    }
    for (i, y) in ys.iter_mut().enumerate() {
        let (a, b) = if back == (i == 0) { (&a1, &b1) } else { (&a0, &b0) };
        multiply(a, b, ams[i], bms[i], y, 1, false)?;
    }
    if back {
        ys.reverse();
    }
    Ok(ys)
}

/// `a b` over leading dimensions that already agree: a `[.., m, k]`, b `[.., k, n]`.
pub(crate) fn batched(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let r = a.rank();
    let mut shape = a.shape().to_vec();
    shape[r - 1] = b.dim(r - 1);
    if shape.contains(&0) || a.dim(r - 1) == 0 {
        return Tensor::zeros(&shape, a.dtype(), a.device());
    }
    let mut y = Tensor::empty(&shape, a.dtype(), a.device())?;
    let batch = shape[..r - 2].iter().product();
    let ((a, am), (b, bm)) = (in_batch(a)?, in_batch(b)?);
    multiply(&a, &b, am, bm, &mut y, batch, false)?;
    Ok(y)
}

/// An operand whose matrices follow one another by one stride, copied where they do not.
fn in_batch(t: &Tensor) -> Result<(Tensor, Matrix)> {
    let lead = t.rank() - 2;
    let view = View::new("matmul", &t.shape()[..lead], &t.layout().strides()[..lead])?;
    let mut dims = view.dims();
    let first = dims.next();
    let single = first.filter(|_| dims.next().is_none());
    if let (Some((_, stride)), Some(m)) = (single, matrix(t)?) {
        return Ok((t.clone(), Matrix { batch_stride: stride, ..m }));
    }
    let t = t.copy()?;
    match matrix(&t)? {
        Some(m) => Ok((t, Matrix { batch_stride: m.rows * m.cols, ..m })),
        None => Err(Error::shape("matmul", format!("matrices of shape {:?}", t.shape()))),
    }
}

/// `y = a b (+ y)`; y is contiguous and has one owner.
fn multiply(a: &Tensor, b: &Tensor, am: Matrix, bm: Matrix, y: &mut Tensor, batch: usize, accumulate: bool) -> Result<()> {
    same_dtype("matmul", &[a, b])?;
    let gpu = a.gpu()?;
    let (rows, cols) = (am.rows, bm.cols);
    let pointer = y.pointer()?;
    let d = Matrix { pointer, rows, cols, leading: cols, by_columns: false, batch_stride: rows * cols };
    let product = Product { a: am, b: bm, d, batch, input: kind(a.dtype())?, output: kind(y.dtype())?, accumulate };
    // SAFETY: a, b and y are alive and as large as their shapes; y is new or owned alone, so it overlaps neither.
    let submit = || unsafe {
        match cuda::gemm() == Gemm::Auto && gpu.blas_product(&product)? {
            true => Ok(()),
            false => native_product(gpu, &product),
        }
    };
    gpu.timed(|| work(&product), submit)
}

/// A product as profiles name it: rows, columns and depth, operands that lie transposed as such, and dtypes.
fn work(p: &Product) -> Work {
    let matrix = |name: &str, m: &Matrix| format!("{name}{}", if m.by_columns { "^T" } else { "" });
    let batch = if p.batch > 1 { format!("{} of ", p.batch) } else { String::new() };
    let (m, n, k, a, b) = (p.a.rows, p.b.cols, p.a.cols, matrix("A", &p.a), matrix("B", &p.b));
    let (add, input, output) = (if p.accumulate { " +" } else { "" }, p.input.element(), p.output.element());
    let elements = p.batch as f64 * p.a.rows as f64 * p.b.cols as f64;
    let moved = |m: &Matrix| (m.rows * m.cols * p.batch) as f64;
    let written = elements * p.output.size() as f64 * if p.accumulate { 2.0 } else { 1.0 };
    Work {
        name: format!("{batch}{m} x {n} x {k}, {a} {b}, {input} ->{add} {output}"),
        bytes: (moved(&p.a) + moved(&p.b)) * p.input.size() as f64 + written,
        flops: 2.0 * elements * k as f64,
    }
}
