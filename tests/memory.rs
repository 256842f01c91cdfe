//! What a training step holds: counted from the code, and measured. Counts are of the whole process, so this is a program of
//! its own, with one test.

#[path = "common/devices.rs"]
mod devices;

use felid::autograd::{Gradients, Tape};
use felid::model::{Cat, ForwardOptions, ModelConfig, TransformerConfig};
use felid::ops::{self, cast_tensor};
use felid::tensor::{DType, Device, Tensor};

const ROWS: usize = 128;
/// Width, heads and width of SwiGLU: all tensors of a layer then have sizes that memory comes in.
const D: usize = 256;
const H: usize = 4;
const M: usize = 768;

#[derive(Clone, Copy)]
struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    /// Bytes that forward leaves behind, and bytes other than gradients that are left when the tape is walked.
    fn step(self, layers: usize, tape: Tape, recompute: bool) -> (usize, usize) {
        let config = ModelConfig::dense(16, ROWS, TransformerConfig::new(D, H, layers, true));
        let mut model = Cat::new(config, 1).unwrap();
        for p in model.params_mut() {
            *p.value_mut() = cast_tensor(p.value(), self.dtype).unwrap();
        }
        let model = model.to_device(self.device).unwrap();
        let ids = Tensor::ids(&(0..ROWS as i64).map(|i| i * 7 % 16).collect::<Vec<_>>(), &[1, ROWS]).unwrap();
        let held = || self.device.memory_stats().current;
        let before = held();
        let mut grads = Gradients::default();
        let options = ForwardOptions { recompute, ..Default::default() };
        let loss = tape.record(|| model.loss(&ids, &ids, options)).unwrap();
        let saved = held() - before;
        tape.backward(&loss, 1.0, &mut grads).unwrap();
        drop(loss);
        let gradients: usize = model.params().iter().map(|p| self.counted(p.value())).sum();
        (saved, held() - before - gradients)
    }
    /// As memory is counted: in lines of 64 bytes on the CPU, of 512 on CUDA.
    fn counted(self, t: &Tensor) -> usize {
        (t.numel() * t.dtype().size()).next_multiple_of(if self.device == Device::Cpu { 64 } else { 512 })
    }
    /// What one more layer saves, in bytes a row.
    fn of_a_layer(self, tape: impl Fn() -> Tape, recompute: bool) -> usize {
        let [two, three] = [2, 3].map(|layers| self.step(layers, tape(), recompute));
        assert_eq!((two.1, three.1), (0, 0), "nothing but gradients outlives backward");
        (three.0 - two.0) / ROWS
    }
    fn check(self) {
        // libraries take their workspaces
        self.step(1, ops::tape(), false);
        let s = self.dtype.size();
        // the projection, attention's output, gate and up, the residual stream after attention and after the feed-forward; in
        // f32 the log-sum-exp of attention's rows, 1/rms of query and key heads, and of both norms
        let needed = s * (3 * D + D + 2 * M + 2 * D) + 4 * (H + 2 * H + 2);
        // normed rows twice, turned queries and keys; the gated product is never saved
        let cheap = s * (2 * D + 2 * D);
        assert_eq!(self.of_a_layer(ops::tape, false), needed);
        assert_eq!(self.of_a_layer(|| ops::tape().saving_all(), false), needed + cheap);
        // blocks computed again keep their inputs: the residual stream and its normed rows
        assert_eq!(self.of_a_layer(ops::tape, true), s * 2 * D);
    }
}

#[test]
fn a_layer_saves_what_backward_cannot_cheaply_compute_again() {
    Place { device: Device::Cpu, dtype: DType::F32 }.check();
    if let Some(device) = devices::cuda() {
        Place { device, dtype: DType::F32 }.check();
        Place { device, dtype: DType::BF16 }.check();
    }
}
