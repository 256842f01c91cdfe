//! Every model once more, written as the formulas stand, in float64, one sequence at a time: whole chunks padded with
//! id 0, every row of the decoder's sequence, and an explicit boolean mask. Nothing here is shared with `src/model`
//! but the names of parameters and config fields.
//!
//! Run with roundings drawn at random ([`super::rough`]) it also says how far off such an implementation may be.

use super::rough::{Real, dot};
use felid::model::{Cat, ChunkSizes, LayerType, ModelConfig, ModelType, TransformerConfig};
use std::collections::BTreeMap;

type Rows = Vec<Vec<Real>>;

pub struct Naive {
    c: ModelConfig,
    /// Matrices as rows; vectors as one row.
    w: BTreeMap<String, Rows>,
}

/// Sizes of one attention: head width, query and key heads, elements that RoPE turns, its base.
struct Heads {
    d: usize,
    h: usize,
    hkv: usize,
    n_rope: usize,
    base: f64,
    eps: f64,
}

fn add(a: &Rows, b: &Rows) -> Rows {
    a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(&x, &y)| x + y).collect()).collect()
}
fn rms(x: &[Real], weight: &[Real], eps: f64) -> Vec<Real> {
    let mean = dot(x, x) / Real(x.len() as f64);
    x.iter().zip(weight).map(|(&x, &w)| x / (mean + Real(eps)).sqrt() * w).collect()
}
/// `x' = x cos + concat(-x2, x1) sin` on the first n elements, the angles repeated twice.
fn rope(x: &mut [Real], n: usize, position: usize, base: f64) {
    let old = x.to_vec();
    for i in 0..n {
        let angle = Real(position as f64 * base.powf(-2.0 * (i % (n / 2)) as f64 / n as f64));
        let turned = if i < n / 2 { -old[i + n / 2] } else { old[i - n / 2] };
        x[i] = old[i] * angle.cos() + turned * angle.sin();
    }
}
/// Section 3: column j of `[out, n]` reads x = max(0, (j + 1/2) r - 1/2) of the wider table.
fn resize(w: &Rows, n: usize) -> Rows {
    let from = w[0].len();
    let column = |row: &Vec<Real>, j: usize| {
        let x = ((j as f64 + 0.5) * from as f64 / n as f64 - 0.5).max(0.0);
        let (i, t) = (x.floor() as usize, x - x.floor());
        Real(1.0 - t) * row[i] + Real(t) * row[(i + 1).min(from - 1)]
    };
    w.iter().map(|row| (0..n).map(|j| column(row, j)).collect()).collect()
}
fn product(x: &Rows, w: &Rows) -> Rows {
    x.iter().map(|x| w.iter().map(|w| dot(x, w)).collect()).collect()
}

impl Naive {
    pub fn new(model: &Cat) -> Self {
        let rows = |p: felid::model::Param| {
            let (flat, width) = (p.value().to_f64_vec().unwrap(), *p.shape().last().unwrap());
            (p.name, flat.chunks(width).map(|row| row.iter().copied().map(Real).collect()).collect())
        };
        Self { c: model.config().clone(), w: model.params().into_iter().map(rows).collect() }
    }
    fn get(&self, name: &str) -> &Rows {
        self.w.get(name).unwrap_or_else(|| panic!("no {name}"))
    }
    fn linear(&self, x: &Rows, name: &str) -> Rows {
        product(x, self.get(name))
    }
    fn norm(&self, x: &Rows, name: &str, eps: f64) -> Rows {
        x.iter().map(|x| rms(x, &self.get(name)[0], eps)).collect()
    }
    fn embed(&self, ids: &[i64], name: &str) -> Rows {
        ids.iter().map(|&id| self.get(name)[id as usize].clone()).collect()
    }

    fn heads(&self, t: &TransformerConfig) -> Heads {
        let d = t.dim / t.n_head;
        let (hkv, eps) = (t.n_local_heads.unwrap_or(t.n_head), t.qk_norm_eps.unwrap_or(t.norm_eps));
        Heads { d, h: t.n_head, hkv, n_rope: d, base: t.rope_base, eps }
    }

    /// Attention of section 1 under `mask[i][j]`, rows at `positions`.
    fn attention(&self, x: &Rows, at: &str, s: &Heads, positions: &[usize], mask: &[Vec<bool>]) -> Rows {
        let mut qkv = self.linear(x, &format!("{at}wqkv.weight"));
        if let Some(bias) = self.w.get(&format!("{at}wqkv.bias")) {
            qkv.iter_mut().for_each(|row| row.iter_mut().zip(&bias[0]).for_each(|(x, &b)| *x = *x + b));
        }
        let part = |first: usize, head: usize, norm: Option<&str>, turn: bool| -> Rows {
            let one = |(row, &p): (&Vec<Real>, &usize)| {
                let mut y = row[(first + head) * s.d..(first + head + 1) * s.d].to_vec();
                if let Some(w) = norm.and_then(|n| self.w.get(&format!("{at}{n}.weight"))) {
                    y = rms(&y, &w[0], s.eps);
                }
                if turn {
                    rope(&mut y, s.n_rope, p, s.base);
                }
                y
            };
            qkv.iter().zip(positions).map(one).collect()
        };
        let mut out = vec![Vec::new(); x.len()];
        for head in 0..s.h {
            let kv = head / (s.h / s.hkv);
            let q = part(0, head, Some("q_norm"), true);
            let k = part(s.h, kv, Some("k_norm"), true);
            let v = part(s.h + s.hkv, kv, None, false);
            for (i, q) in q.iter().enumerate() {
                let score = |k: &Vec<Real>| dot(q, k) / Real(s.d as f64).sqrt();
                let weight = |(k, &see)| if see { score(k).exp() } else { Real(0.0) };
                let e: Vec<Real> = k.iter().zip(&mask[i]).map(weight).collect();
                let sum: Real = e.iter().copied().sum();
                out[i].extend((0..s.d).map(|c| e.iter().zip(&v).map(|(&e, v)| e / sum * v[c]).sum::<Real>()));
            }
        }
        self.linear(&out, &format!("{at}wo.weight"))
    }

    /// Blocks and the norm after them; `mix(layer, x)` is what stands for attention.
    fn stack(&self, mut x: Rows, at: &str, t: &TransformerConfig, mix: impl Fn(usize, &Rows) -> Rows) -> Rows {
        for i in 0..t.n_layer {
            let layer = format!("{at}layers.{i}.");
            let h = add(&x, &mix(i, &self.norm(&x, &format!("{layer}attention_norm.weight"), t.norm_eps)));
            let n = self.norm(&h, &format!("{layer}ffn_norm.weight"), t.norm_eps);
            let gate = self.linear(&n, &format!("{layer}feed_forward.fc_1.weight"));
            let up = self.linear(&n, &format!("{layer}feed_forward.fc_2.weight"));
            let silu = |x: Real| x / (Real(1.0) + (-x).exp());
            let hidden = gate.iter().zip(&up).map(|(g, u)| g.iter().zip(u).map(|(&g, &u)| silu(g) * u).collect()).collect();
            x = add(&h, &self.linear(&hidden, &format!("{layer}feed_forward.proj.weight")));
        }
        self.norm(&x, &format!("{at}norm.weight"), t.norm_eps)
    }

    /// Representation of chunk k, sections 2 and 3.
    fn compress(&self, tokens: &[i64], k: usize, table_row: Option<usize>) -> Vec<Real> {
        let t = self.c.compressor.as_ref().unwrap();
        let mut x: Rows = table_row.map(|r| self.get("f.adaptive_token.weight")[r].clone()).into_iter().collect();
        // the padded last chunk may have no place of its own; no output that is kept depends on it
        let places = self.get("f.pos_tokens.weight");
        x.push(places.get(k).cloned().unwrap_or_else(|| vec![Real(0.0); t.dim]));
        let header = x.len();
        x.extend(self.embed(tokens, "f.wte.weight"));
        let (len, s) = (x.len(), self.heads(t));
        let (positions, mask): (Vec<usize>, _) = ((0..len).collect(), vec![vec![true; len]; len]);
        let mix = |i: usize, x: &Rows| self.attention(x, &format!("f.layers.{i}.attention."), &s, &positions, &mask);
        let flat: Vec<Real> = self.stack(x, "f.", t, mix)[header..].concat();
        let proj = resize(self.get("f.proj_fx.weight"), flat.len());
        product(&vec![flat], &proj).remove(0)
    }

    /// The mask of section 2 over L rows with stride S.
    fn mask(len: usize, stride: usize) -> Vec<Vec<bool>> {
        let see = |i: usize, j: usize| j <= i && (j.is_multiple_of(stride) || j / stride == i / stride);
        (0..len).map(|i| (0..len).map(|j| see(i, j)).collect()).collect()
    }
    /// Sections 2 and 4: block 0 rows 1..=C-1, later blocks rows 0..=C-1, the last row; one less or more for a
    /// separator (section 3).
    fn outputs(k: usize, chunk: usize, header: usize) -> Vec<usize> {
        let s = chunk + header;
        let first = header..header + chunk - 1;
        let later = (1..k).flat_map(|b| (header - 1..header + chunk - 1).map(move |r| b * s + r));
        first.chain(later).chain([k * s + header - 1]).collect()
    }

    /// The CAT layer of section 4 on x `[K*C, dim]`.
    fn layer(&self, x: &Rows, at: &str, chunk: usize) -> Rows {
        let t = &self.c.decoder;
        let k = x.len() / chunk;
        let w = self.get(&format!("{at}compressor.weight"));
        let w = if self.c.adaptive_layers { resize(w, chunk * t.dim) } else { w.clone() };
        let bias = &self.get(&format!("{at}compressor.bias"))[0];
        let fx = |c: usize| -> Vec<Real> {
            let y = product(&vec![x[c * chunk..(c + 1) * chunk].concat()], &w).remove(0);
            y.iter().zip(bias).map(|(&y, &b)| y + b).collect()
        };
        let expanded = self.linear(x, &format!("{at}expand.weight"));
        let mut seq = self.get(&format!("{at}dummy_fx.weight")).clone();
        for c in 0..k {
            seq.extend_from_slice(&expanded[c * chunk..(c + 1) * chunk]);
            seq.push(fx(c));
        }
        let (len, stride, heads) = (seq.len(), chunk + 1, self.c.dim_fx.unwrap() / 64);
        let positions: Vec<usize> = (0..len).map(|i| i % stride).collect();
        let s = Heads { d: 64, h: heads, hkv: heads, n_rope: t.dim / t.n_head, ..self.heads(t) };
        let y = self.attention(&seq, &format!("{at}attention."), &s, &positions, &Self::mask(len, stride));
        let kept = Self::outputs(k, chunk, 1).into_iter().map(|i| y[i].clone()).collect();
        self.linear(&kept, &format!("{at}final_proj.weight"))
    }

    /// Logits `[N][V]` of one sequence.
    pub fn logits(&self, ids: &[i64], chunk: Option<usize>) -> Vec<Vec<f64>> {
        self.run(ids, chunk).into_iter().map(|row| row.into_iter().map(|x| x.0).collect()).collect()
    }
    /// Mean cross-entropy of `labels`, ids or negative, given the decoder's output, rows of D.
    pub fn loss(&self, hidden: &[f64], labels: &[i64]) -> f64 {
        let rows = hidden.chunks(self.c.decoder.dim).map(|row| row.iter().copied().map(Real).collect()).collect();
        let one = |(row, &label): (&Vec<Real>, &i64)| {
            let at = usize::try_from(label).ok()?;
            Some(row.iter().map(|l| l.exp()).sum::<Real>().ln() + -row[at])
        };
        let each: Vec<Real> = self.linear(&rows, "output.weight").iter().zip(labels).filter_map(one).collect();
        (each.iter().copied().sum::<Real>() / Real(each.len() as f64)).0
    }

    fn run(&self, ids: &[i64], chunk: Option<usize>) -> Rows {
        let t = &self.c.decoder;
        let s = self.heads(t);
        let hidden = match self.c.model_type {
            ModelType::Transformer | ModelType::CatLayer => {
                let mut padded = ids.to_vec();
                padded.resize(ids.len().next_multiple_of(chunk.unwrap_or(1)), 0);
                let n = padded.len();
                let positions: Vec<usize> = (0..n).collect();
                let causal: Vec<Vec<bool>> = (0..n).map(|i| (0..n).map(|j| j <= i).collect()).collect();
                let is_cat = |i: usize| match &self.c.layer_types {
                    Some(types) => types[i] == LayerType::Cat,
                    None => self.c.model_type == ModelType::CatLayer,
                };
                let mix = |i: usize, x: &Rows| {
                    let at = format!("layers.{i}.attention.");
                    if is_cat(i) {
                        self.layer(x, &at, chunk.unwrap())
                    } else {
                        self.attention(x, &at, &s, &positions, &causal)
                    }
                };
                self.stack(self.embed(&padded, "wte.weight"), "", t, mix)
            }
            ModelType::Cat | ModelType::CatAdaptive => {
                let chunk = chunk.unwrap();
                let k = ids.len().div_ceil(chunk);
                let mut padded = ids.to_vec();
                padded.resize(k * chunk, 0);
                let row = (self.c.model_type == ModelType::CatAdaptive).then(|| match self.c.chunk_sizes {
                    ChunkSizes::PowersOfTwo => (0..).find(|p| 1 << p == chunk).unwrap(),
                    ChunkSizes::Any => chunk,
                });
                let separator: Rows = row.map(|_| self.get("seperator.weight")[0].clone()).into_iter().collect();
                let mut seq = vec![self.get("dummy_fx.weight")[row.unwrap_or(0)].clone()];
                seq.extend_from_slice(&separator);
                for (i, tokens) in padded.chunks(chunk).enumerate() {
                    seq.extend(self.embed(tokens, "wte.weight"));
                    seq.push(self.compress(tokens, i, row));
                    seq.extend_from_slice(&separator);
                }
                let header = 1 + separator.len();
                let (len, stride) = (seq.len(), chunk + header);
                assert_eq!(len, k * stride + header);
                let positions: Vec<usize> = (0..len).map(|i| i % stride).collect();
                let mask = Self::mask(len, stride);
                let mix = |i: usize, x: &Rows| self.attention(x, &format!("layers.{i}.attention."), &s, &positions, &mask);
                let y = self.stack(seq, "", t, mix);
                let outputs = Self::outputs(k, chunk, header);
                assert_eq!(outputs.len(), k * chunk);
                outputs.into_iter().map(|i| y[i].clone()).collect()
            }
        };
        self.linear(&hidden[..ids.len()].to_vec(), "output.weight")
    }
}
