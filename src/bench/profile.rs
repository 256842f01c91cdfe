//! Where the time of a step goes, by op and, on CUDA, by kernel.

use crate::tensor::Device;
use crate::{Result, profile};
use serde::Serialize;
use std::time::Instant;

/// A profile of some work on a device.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// From the first kernel's begin to the last one's end, by the device's clock; on the CPU, by the host's.
    pub total_ms: f64,
    /// In kernels, products, copies and memsets; on the CPU, in ops.
    pub busy_ms: f64,
    /// How many of these there were.
    pub launches: usize,
    /// By op, longest first. Products are one op; their kernels are listed by shape.
    pub ops: Vec<ProfiledOp>,
    /// The longest times with nothing to do, longest first: milliseconds, and the kernel that came then.
    pub gaps: Vec<(f64, String)>,
}

/// One op of a profile, or what happened outside of all.
#[derive(Clone, Debug, Serialize)]
pub struct ProfiledOp {
    /// The function that computes it; `(again)` where backward recomputes what forward did not keep.
    pub op: String,
    /// How often it was called.
    pub calls: usize,
    /// Its time.
    pub ms: f64,
    /// Of all busy time.
    pub share: f64,
    /// Bytes that must move, where they are counted; else 0.
    pub bytes: f64,
    /// Operations, where they are counted; else 0.
    pub flops: f64,
    /// What it submitted to the device, longest first.
    pub kernels: Vec<ProfiledKernel>,
}

/// One kernel, shape of product, or other work of the device.
#[derive(Clone, Debug, Serialize)]
pub struct ProfiledKernel {
    /// Its symbol; for products, sizes and dtypes.
    pub kernel: String,
    /// How often it ran.
    pub count: usize,
    /// Its time, all runs together.
    pub ms: f64,
    /// Bytes that must move, where they are counted; else 0.
    pub bytes: f64,
    /// Operations, where they are counted; else 0.
    pub flops: f64,
}

/// Profile what `f` does on a device, on this thread. On CUDA nothing waits for the device before `f` has returned.
pub fn profile(device: Device, f: impl FnOnce() -> Result<()>) -> Result<Profile> {
    device.synchronize()?;
    profile::start();
    #[cfg(feature = "cuda")]
    crate::cuda::start_spans();
    let start = Instant::now();
    let done = f();
    let total = start.elapsed().as_secs_f64();
    let mut ops: Vec<ProfiledOp> = profile::stop()
        .iter()
        .map(|op| ProfiledOp {
            op: op.name(),
            calls: op.calls,
            ms: op.time.as_secs_f64() * 1e3,
            share: 0.0,
            bytes: op.bytes,
            flops: op.flops,
            kernels: vec![],
        })
        .collect();
    let (total_ms, launches, mut gaps): (f64, usize, Vec<(f64, String)>) = match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(n) => {
            let spans = done.and_then(|()| crate::cuda::gpu(n)?.spans());
            crate::cuda::stop_spans();
            let spans = spans?;
            ops = by_op(ops, &spans);
            let total = spans.iter().map(|s| s.seconds + s.gap).sum::<f64>();
            (total * 1e3, spans.len(), spans.iter().map(|s| (s.gap * 1e3, s.work.name.clone())).collect())
        }
        _ => {
            #[cfg(feature = "cuda")]
            crate::cuda::stop_spans();
            done?;
            (total * 1e3, ops.iter().map(|op| op.calls).sum(), vec![])
        }
    };
    let busy_ms: f64 = ops.iter().map(|op| op.ms).sum();
    ops.iter_mut().for_each(|op| op.share = op.ms / busy_ms);
    ops.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    gaps.sort_by(|a, b| b.0.total_cmp(&a.0));
    gaps.truncate(10);
    Ok(Profile { total_ms, busy_ms, launches, ops, gaps })
}

/// Device time in the place of the host's.
#[cfg(feature = "cuda")]
fn by_op(mut ops: Vec<ProfiledOp>, spans: &[crate::cuda::Span]) -> Vec<ProfiledOp> {
    let outside = ops.len();
    let name = "(outside of ops)".into();
    ops.push(ProfiledOp { op: name, calls: 1, ms: 0.0, share: 0.0, bytes: 0.0, flops: 0.0, kernels: vec![] });
    ops.iter_mut().for_each(|op| op.ms = 0.0);
    for s in spans {
        let op = &mut ops[s.op.unwrap_or(outside).min(outside)];
        let at = op.kernels.iter().position(|k| k.kernel == s.work.name).unwrap_or_else(|| {
            let kernel = s.work.name.clone();
            op.kernels.push(ProfiledKernel { kernel, count: 0, ms: 0.0, bytes: 0.0, flops: 0.0 });
            op.kernels.len() - 1
        });
        let k = &mut op.kernels[at];
        k.count += 1;
        k.ms += s.seconds * 1e3;
        k.bytes += s.work.bytes;
        k.flops += s.work.flops;
        op.ms += s.seconds * 1e3;
        // products know their operations; what an op says of itself comes on top
        op.flops += s.work.flops;
    }
    ops.retain(|op| !op.kernels.is_empty());
    ops.iter_mut().for_each(|op| op.kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms)));
    ops
}
