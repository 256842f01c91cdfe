//! Random numbers that are a function of a key and a position: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel
//! random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! Nothing here has hidden state. Number `i` of key `k` is the same whatever was drawn before, in whatever order and
//! on however many threads, so that a resumed run draws what the uninterrupted one would have drawn.

use rayon::prelude::*;

/// Elements that one parallel task of a filler writes; fixed, so that results do not depend on the thread count.
const FILL_CHUNK: usize = 16_384;

/// Philox4x32-10: the 128-bit block number `counter` of the 64-bit `key`, words from low to high.
pub fn philox4x32(mut key: [u32; 2], mut counter: [u32; 4]) -> [u32; 4] {
    // Multipliers and Weyl increments of the paper, section 3.3.
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Block `counter` of `key` in stream 0: four independent uniform words.
pub fn philox(key: u64, counter: u64) -> [u32; 4] {
    block(key, 0, counter)
}

/// Block `counter` of one of the 2^64 streams of `key`; streams of one key never overlap.
fn block(key: u64, stream: u64, counter: u64) -> [u32; 4] {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let ([c0, c1], [c2, c3]) = (words(counter), words(stream));
    philox4x32(words(key), [c0, c1, c2, c3])
}

/// A key of its own for one purpose of a seed, so that (say) weights and batches of seed 1 are unrelated.
pub fn subkey(seed: u64, purpose: u64) -> u64 {
    // The highest stream, which no drawing with a step or row number as its stream reaches.
    join(block(seed, u64::MAX, purpose))
}

fn join(w: [u32; 4]) -> u64 {
    u64::from(w[0]) | u64::from(w[1]) << 32
}
/// Uniform in [0, 1) on a grid of 2^-53: the top bits of two words.
fn unit(low: u32, high: u32) -> f64 {
    ((u64::from(low) | u64::from(high) << 32) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
/// Two independent standard normals by Box-Muller: r = sqrt(-2 ln u), angle 2 pi v, with u in (0, 1] and v in [0, 1).
fn box_muller(u: u32, v: u32) -> [f64; 2] {
    const STEP: f64 = 1.0 / (1u64 << 32) as f64;
    let r = (-2.0 * ((f64::from(u) + 1.0) * STEP).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * (f64::from(v) * STEP)).sin_cos();
    [r * cos, r * sin]
}
fn normals(w: [u32; 4]) -> [f64; 4] {
    let ([a, b], [c, d]) = (box_muller(w[0], w[1]), box_muller(w[2], w[3]));
    [a, b, c, d]
}
/// `x * n / 2^64`, uniform below n up to a bias under n / 2^64. Zero for n = 0.
fn scale(x: u64, n: u64) -> u64 {
    ((u128::from(x) * u128::from(n)) >> 64) as u64
}

/// Number `i` of the standard normals of `key`.
pub fn normal_at(key: u64, i: u64) -> f64 {
    normals(philox(key, i / 4))[(i % 4) as usize]
}
/// Number `i` of the uniforms in [0, 1) of `key`.
pub fn uniform_at(key: u64, i: u64) -> f64 {
    let w = philox(key, i / 2);
    if i.is_multiple_of(2) { unit(w[0], w[1]) } else { unit(w[2], w[3]) }
}
/// Number `i` of the integers in `0..n` of `key`; 0 when `n` is 0.
pub fn below_at(key: u64, i: u64, n: u64) -> u64 {
    scale(join(philox(key, i)), n)
}

/// Fill with Normal(0, std): element i is `normal_at(key, i) * std`, on any number of threads.
pub fn fill_normal(out: &mut [f32], key: u64, std: f64) {
    fill(out, 4, |i, x| {
        for (x, z) in x.iter_mut().zip(normals(philox(key, i))) {
            *x = (z * std) as f32;
        }
    });
}
/// Fill with Uniform(low, high): element i is `low + (high - low) * uniform_at(key, i)`, on any number of threads.
pub fn fill_uniform(out: &mut [f32], key: u64, low: f64, high: f64) {
    fill(out, 2, |i, x| {
        let w = philox(key, i);
        for (x, u) in x.iter_mut().zip([unit(w[0], w[1]), unit(w[2], w[3])]) {
            *x = (low + (high - low) * u) as f32;
        }
    });
}
/// Call `f(i, elements)` for each group of `per_block` elements that block i yields.
fn fill(out: &mut [f32], per_block: usize, f: impl Fn(u64, &mut [f32]) + Sync) {
    out.par_chunks_mut(FILL_CHUNK).enumerate().for_each(|(task, chunk)| {
        let first = (task * FILL_CHUNK / per_block) as u64;
        for (i, group) in chunk.chunks_mut(per_block).enumerate() {
            f(first + i as u64, group);
        }
    });
}

/// Draws one after another from one stream of a key; where it starts is part of what it is.
#[derive(Clone, Debug)]
pub struct Philox {
    key: u64,
    stream: u64,
    counter: u64,
    words: [u32; 4],
    used: usize,
}

impl Philox {
    /// Stream 0 of `key`, from its beginning.
    pub fn new(key: u64) -> Self {
        Self::at(key, 0, 0)
    }
    /// Stream `stream` of `key`, from block `counter` on.
    pub fn at(key: u64, stream: u64, counter: u64) -> Self {
        Self { key, stream, counter, words: [0; 4], used: 4 }
    }
    /// The next 32 uniform bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = block(self.key, self.stream, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }
    /// The next 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        let low = self.next_u32();
        u64::from(low) | u64::from(self.next_u32()) << 32
    }
    /// Uniform in [0, 1) on a grid of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        let low = self.next_u32();
        unit(low, self.next_u32())
    }
    /// Uniform in [0, 1) on a grid of 2^-24.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
    }
    /// Uniform in `0..n`, up to a bias under n / 2^64; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        scale(self.next_u64(), n)
    }
    /// Two independent standard normals.
    pub fn normal_pair(&mut self) -> [f64; 2] {
        let u = self.next_u32();
        box_muller(u, self.next_u32())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // kat_vectors of the paper's library, philox4x32 with 10 rounds.
        let pi = ([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0; 2], [!0; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(philox4x32(pi.0, pi.1), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
        assert_eq!(philox(0, 0), philox4x32([0; 2], [0; 4]));
    }

    #[test]
    fn fillers_do_not_depend_on_threads_and_equal_single_draws() {
        let n = 3 * FILL_CHUNK + 7;
        let filled = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (mut z, mut u) = (vec![0f32; n], vec![0f32; n]);
            pool.install(|| fill_normal(&mut z, 11, 0.5));
            pool.install(|| fill_uniform(&mut u, 11, -1.0, 3.0));
            (z, u)
        };
        let (z, u) = filled(1);
        assert_eq!((z.clone(), u.clone()), filled(3));
        for i in [0, 1, 2, 3, 5, FILL_CHUNK, n - 1] {
            assert_eq!(z[i], (normal_at(11, i as u64) * 0.5) as f32);
            assert_eq!(u[i], (-1.0 + 4.0 * uniform_at(11, i as u64)) as f32);
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let n = 200_000;
        let mut z = vec![0f32; n];
        fill_normal(&mut z, 3, 2.0);
        let moment = |p: i32| z.iter().map(|&x| f64::from(x).powi(p)).sum::<f64>() / n as f64;
        // Five standard errors of the first four moments of Normal(0, 2).
        let se = 5.0 / (n as f64).sqrt();
        assert!(moment(1).abs() < 2.0 * se);
        assert!((moment(2) - 4.0).abs() < 4.0 * 2f64.sqrt() * se);
        assert!(moment(3).abs() < 8.0 * 15f64.sqrt() * se);
        assert!((moment(4) - 48.0).abs() < 16.0 * 96f64.sqrt() * se);
        let mean = (0..n as u64).map(|i| uniform_at(3, i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < se / 12f64.sqrt());
        assert!((0..1000).all(|i| (0.0..1.0).contains(&uniform_at(9, i))));
    }

    #[test]
    fn streams_and_positions_are_addressable() {
        let mut whole = Philox::at(5, 2, 0);
        let words: Vec<u32> = (0..12).map(|_| whole.next_u32()).collect();
        let mut later = Philox::at(5, 2, 1);
        assert_eq!((0..8).map(|_| later.next_u32()).collect::<Vec<_>>(), words[4..]);
        assert_ne!(Philox::at(5, 3, 0).next_u64(), Philox::at(5, 2, 0).next_u64());
        assert_eq!(Philox::new(7).below(10), below_at(7, 0, 10));
        assert_eq!(Philox::new(7).uniform(), uniform_at(7, 0));
        assert_eq!(Philox::new(7).normal_pair(), [normal_at(7, 0), normal_at(7, 1)]);
        assert!((0..1000).all(|_| whole.uniform_f32() < 1.0));
        assert_ne!(subkey(1, 0), subkey(1, 1));
        assert_ne!(subkey(1, 0), subkey(2, 0));
    }

    #[test]
    fn below_covers_its_range_evenly() {
        let mut counts = [0usize; 7];
        (0..70_000).for_each(|i| counts[below_at(1, i, 7) as usize] += 1);
        // Six standard deviations of a binomial with n = 70000, p = 1/7.
        assert!(counts.iter().all(|&c| c.abs_diff(10_000) < 556), "{counts:?}");
        assert_eq!(below_at(1, 1, 0), 0);
        assert_eq!(below_at(1, 1, 1), 0);
    }
}
