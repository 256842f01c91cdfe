//! Multi-query associative recall (Arora et al. 2023, "Zoology"; spec section 7): read key-value pairs, then answer
//! queries for their values.
//!
//! A sequence is `k1 v1 k2 v2 ...` and then, in the remainder, each key once more in random order and followed by its
//! value, the gaps between filled with random tokens that are none of its keys. As there, gaps follow a power law that
//! prefers queries soon after the pairs.

use super::{Batch, purpose};
use crate::random::{Philox, subkey};
use crate::tensor::{Tensor, checked_numel};
use crate::{Error, Result};
use rayon::prelude::*;

/// The label of a position where nothing is to be predicted.
pub const IGNORE: i64 = -100;
/// The vocabulary of the paper's task.
pub const VOCAB_SIZE: usize = 8192;
/// Exponent a of the gaps: slot j (from 1) is asked in with weight j^(a - 1).
const GAP_POWER: f64 = 0.01;

/// The task: batches are a function of (seed, step), one endless stream for training and one for validation.
#[derive(Clone, Debug)]
pub struct Mqar {
    vocab_size: usize,
    pairs: usize,
    len: usize,
    key: u64,
}

impl Mqar {
    /// Sequences of `len` tokens with `pairs` key-value pairs: keys from the first half of the vocabulary, values from
    /// the second, both without repetition in a sequence. Needs `len >= 4 * pairs` and `pairs <= vocab_size / 2`.
    pub fn new(vocab_size: usize, pairs: usize, len: usize, seed: u64) -> Result<Self> {
        if pairs == 0 {
            return Err(Error::config("MQAR with 0 key-value pairs asks nothing: choose at least 1"));
        }
        if pairs > vocab_size / 2 {
            let most = vocab_size / 2;
            return Err(Error::config(format!(
                "MQAR: a vocabulary of {vocab_size} has {most} keys, not {pairs}: choose fewer pairs or a larger vocabulary"
            )));
        }
        let need = pairs.checked_mul(4);
        if need.is_none_or(|need| len < need) {
            let most = len / 4;
            return Err(Error::config(format!(
                "MQAR: {pairs} pairs and their queries do not fit {len} tokens, which hold {most}: choose a longer sequence"
            )));
        }
        if i64::try_from(vocab_size).is_err() {
            return Err(Error::config(format!(
                "MQAR: a vocabulary of {vocab_size} does not fit int64: choose a smaller one"
            )));
        }
        Ok(Self { vocab_size, pairs, len, key: subkey(seed, purpose::MQAR) })
    }
    /// The same task on the validation stream, which has a key of its own and so shares no draw with training.
    pub fn validation(&self) -> Self {
        Self { key: !self.key, ..self.clone() }
    }
    /// Ids are below this.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
    /// Batch number `step`: ids [B, len]; labels [B, len] hold the value at each queried key and -100 elsewhere, so a
    /// batch has B * pairs answers.
    pub fn batch(&self, step: u64, batch: usize) -> Result<Batch> {
        let shape = [batch, self.len];
        let n = checked_numel("Mqar::batch", &shape)?;
        if batch == 0 {
            return Err(Error::Usage("an MQAR batch of 0 sequences: choose at least 1".into()));
        }
        let (mut inputs, mut labels) = (vec![0; n], vec![IGNORE; n]);
        let rows = inputs.par_chunks_mut(self.len).zip(labels.par_chunks_mut(self.len));
        rows.enumerate().for_each(|(b, (inputs, labels))| {
            // A row takes far fewer than 2^32 blocks, so rows of a step stay apart within the step's stream.
            self.row(&mut Philox::at(self.key, step, (b as u64) << 32), inputs, labels);
        });
        Ok(Batch { input_ids: Tensor::ids(&inputs, &shape)?, labels: Tensor::ids(&labels, &shape)? })
    }

    fn row(&self, draw: &mut Philox, inputs: &mut [i64], labels: &mut [i64]) {
        let half = self.vocab_size / 2;
        let keys = distinct(draw, half, self.pairs);
        let values = distinct(draw, self.vocab_size - half, self.pairs);
        for (i, (&k, &v)) in keys.iter().zip(&values).enumerate() {
            inputs[2 * i] = k as i64;
            inputs[2 * i + 1] = (half + v) as i64;
        }
        let context = 2 * self.pairs;
        let fillers = Fillers::new(keys, self.vocab_size);
        inputs[context..].iter_mut().for_each(|x| *x = fillers.draw(draw));
        for (slot, i) in self.slots(draw).into_iter().zip(distinct(draw, self.pairs, self.pairs)) {
            let at = context + 2 * slot;
            inputs[at] = inputs[2 * i];
            inputs[at + 1] = inputs[2 * i + 1];
            labels[at] = inputs[2 * i + 1];
        }
    }
    /// In which of the two-token slots after the pairs the queries stand, ascending: drawn without repetition by a race
    /// of exponential clocks, of which slot j's (from 1) rings with rate j^(a - 1).
    fn slots(&self, draw: &mut Philox) -> Vec<usize> {
        let all = self.len / 2 - self.pairs;
        let clock = |j: usize| (-(1.0 - draw.uniform()).ln() * ((j + 1) as f64).powf(1.0 - GAP_POWER), j);
        let mut race: Vec<(f64, usize)> = (0..all).map(clock).collect();
        race.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut slots: Vec<usize> = race.into_iter().take(self.pairs).map(|(_, j)| j).collect();
        slots.sort_unstable();
        slots
    }
}

/// The tokens that are none of a sequence's keys.
struct Fillers {
    count: u64,
    /// For key j in ascending order: how many fillers lie below it.
    below: Vec<u64>,
}

impl Fillers {
    fn new(mut keys: Vec<usize>, vocab_size: usize) -> Self {
        keys.sort_unstable();
        let below = keys.iter().enumerate().map(|(j, &k)| (k - j) as u64).collect();
        Self { count: (vocab_size - keys.len()) as u64, below }
    }
    fn draw(&self, draw: &mut Philox) -> i64 {
        let rank = draw.below(self.count);
        (rank + self.below.partition_point(|&below| below <= rank) as u64) as i64
    }
}

/// `k` of the numbers `0..n` in random order, without repetition (a Fisher-Yates shuffle cut short).
fn distinct(draw: &mut Philox, n: usize, k: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..n).collect();
    for i in 0..k {
        all.swap(i, i + draw.below((n - i) as u64) as usize);
    }
    all.truncate(k);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn rows(task: &Mqar, step: u64, b: usize) -> Vec<(Vec<i64>, Vec<i64>)> {
        let batch = task.batch(step, b).unwrap();
        let (x, y) = (batch.input_ids.to_vec::<i64>().unwrap(), batch.labels.to_vec::<i64>().unwrap());
        x.chunks(task.len).zip(y.chunks(task.len)).map(|(x, y)| (x.to_vec(), y.to_vec())).collect()
    }

    #[test]
    fn answers_are_right_and_only_keys_are_asked() {
        // The last two have no gaps: every slot is a query; and every token of the first half is a key.
        for (vocab, pairs, len) in [(8192, 64, 1024), (50, 7, 41), (64, 32, 128), (3, 1, 4)] {
            let task = Mqar::new(vocab, pairs, len, 5).unwrap();
            for (x, y) in rows(&task, 3, 5) {
                let half = (vocab / 2) as i64;
                let map: HashMap<i64, i64> = x[..2 * pairs].chunks(2).map(|kv| (kv[0], kv[1])).collect();
                assert_eq!(map.len(), pairs, "keys repeat");
                assert!(map.iter().all(|(&k, &v)| (0..half).contains(&k) && (half..vocab as i64).contains(&v)));
                let mut asked = Vec::new();
                for t in 0..len {
                    assert!((0..vocab as i64).contains(&x[t]));
                    if t >= 2 * pairs && map.contains_key(&x[t]) {
                        assert_eq!((y[t], x[t + 1]), (map[&x[t]], map[&x[t]]), "the label is the next token");
                        asked.push(x[t]);
                    } else {
                        assert_eq!(y[t], IGNORE);
                    }
                }
                asked.sort_unstable();
                asked.dedup();
                assert_eq!(asked.len(), pairs, "each key is asked once");
                assert_eq!(y.iter().filter(|&&l| l != IGNORE).count(), pairs);
            }
        }
    }

    #[test]
    fn a_batch_is_a_function_of_seed_and_step() {
        let task = Mqar::new(512, 8, 64, 1).unwrap();
        let a = rows(&task, 9, 4);
        assert_eq!(a, rows(&task, 9, 4));
        assert_eq!(a[..2], rows(&task, 9, 2)[..], "rows do not depend on the batch size");
        assert_ne!(a, rows(&task, 10, 4));
        assert_ne!(a, rows(&task.validation(), 9, 4));
        assert_ne!(a, rows(&Mqar::new(512, 8, 64, 2).unwrap(), 9, 4));
        assert!(a.iter().enumerate().all(|(i, r)| a[..i].iter().all(|other| other != r)));
    }

    #[test]
    fn queries_come_in_random_order_and_early_slots_are_preferred() {
        let task = Mqar::new(512, 4, 64, 1).unwrap();
        let (mut in_order, mut first_half) = (0, 0);
        for (x, y) in rows(&task, 0, 1000) {
            let at: Vec<usize> = (0..64).filter(|&t| y[t] != IGNORE).collect();
            let place = |t: &usize| x[..8].iter().position(|k| *k == x[*t]).unwrap();
            in_order += usize::from(at.iter().map(place).is_sorted());
            first_half += at.iter().filter(|&&t| t < 36).count();
        }
        // 1000 / 4! = 42 expected with standard deviation 6.3; 2000 of 4000 queries would be an even spread.
        assert!((10..75).contains(&in_order), "{in_order}");
        assert!(first_half > 2600, "{first_half}");
    }

    #[test]
    fn sizes_that_do_not_fit() {
        for (vocab, pairs, len, says) in [
            (64, 0, 64, "at least 1"),
            (64, 33, 512, "32 keys"),
            (64, 16, 63, "hold 15"),
            (usize::MAX, usize::MAX / 2, 10, "hold 2"),
            (0, 1, 8, "0 keys"),
        ] {
            let e = Mqar::new(vocab, pairs, len, 0).unwrap_err().to_string();
            assert!(e.contains(says), "{e}");
        }
        assert!(Mqar::new(64, 4, 16, 0).unwrap().batch(0, 0).is_err());
    }
}
