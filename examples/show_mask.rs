//! Draw the CAT decoder's sequence: what each row holds, its position, which rows it sees, and what that costs.
//!
//! ```sh
//! cargo run --example show_mask -- 10 4      # N tokens, chunk size C; the adaptive layout (two header rows)
//! cargo run --example show_mask -- 10 4 1    # the fixed layout (one header row)
//! ```

use felid::model::{ChunkPlan, ModelConfig};
use felid::ops::Mask;
use felid::{Error, Result};

/// A sequence of rows: what each holds, its RoPE position, and whether its output is wanted.
struct Sequence {
    stride: usize,
    rows: Vec<Row>,
}

struct Row {
    name: String,
    wanted: bool,
}

/// What is at place `i` of block `b`: its header, then its tokens.
fn name(b: usize, i: usize, chunk: usize, header: usize) -> String {
    match (b, i) {
        (0, 0) => "dummy".into(),
        (_, 0) => format!("fx{}", b - 1),
        (_, i) if i < header => "sep".into(),
        _ => format!("t{}", b * chunk + i - header),
    }
}

/// As in the paper: padded to whole chunks, every token there, a header after the last block.
fn paper(chunk: usize, header: usize, tokens: usize) -> Sequence {
    let (stride, blocks) = (chunk + header, tokens.div_ceil(chunk));
    let len = blocks * stride + header;
    // a block's last token predicts nothing: the next block's header does. What predicts past token N is cut.
    let predicts = |at: usize| at >= header && at % stride >= header - 1 && (at % stride != stride - 1);
    let wanted: Vec<usize> = (0..len).filter(|&at| predicts(at)).take(tokens).collect();
    let row = |at: usize| {
        let name = name(at / stride, at % stride, chunk, header);
        let padding = name[1..].parse::<usize>().is_ok_and(|t| name.starts_with('t') && t >= tokens);
        Row { name: if padding { "pad".into() } else { name }, wanted: wanted.contains(&at) }
    };
    Sequence { stride, rows: (0..len).map(row).collect() }
}

/// As Felid computes it: without the rows that nobody reads.
fn felid(plan: &ChunkPlan) -> Sequence {
    let (stride, wanted) = (plan.stride(), plan.outputs());
    let row =
        |at: usize| Row { name: name(at / stride, at % stride, plan.chunk, plan.header), wanted: wanted.contains(&at) };
    Sequence { stride, rows: (0..plan.len()).map(row).collect() }
}

impl Sequence {
    fn draw(&self, title: &str) {
        println!("{title}: {} rows, stride {}", self.rows.len(), self.stride);
        println!("row  holds  position  output   sees");
        let mask = Mask::Cat { stride: self.stride };
        for (i, row) in self.rows.iter().enumerate() {
            let sees: String = (0..=i).map(|j| if mask.allows(i, j) { '#' } else { '.' }).collect();
            let output = if row.wanted { "wanted" } else { "-" };
            println!("{i:>3}  {:<5}  {:>8}  {output:<7}  {sees}", row.name, i % self.stride);
        }
        println!();
    }
}

/// Visible pairs, and FLOPs of the forward pass of one decoder layer of the preset `nano` (D 128, M 512) over all rows.
fn cost(rows: usize, mask: Mask) -> Result<(usize, usize)> {
    let (t, pairs) = (ModelConfig::preset("nano")?.decoder, mask.pairs(rows, rows));
    // a row passes q, k, v and o (4 D^2 weights) and SwiGLU (3 D M), 2 FLOPs a weight; a pair costs 2 D for q k, 2 D for p v
    Ok((pairs, 2 * rows * (4 * t.dim * t.dim + 3 * t.dim * t.ffn_width()) + 4 * t.dim * pairs))
}

fn main() -> Result<()> {
    let usage = || Error::Usage("usage: show_mask [TOKENS] [CHUNK_SIZE] [HEADER_ROWS, 1 or 2]".into());
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().map_err(|_| usage())).collect::<Result<_>>()?;
    let (tokens, chunk, header) = match args[..] {
        [] => (10, 4, 2),
        [n, c] => (n, c, 2),
        [n, c, h] => (n, c, h),
        _ => return Err(usage()),
    };
    if tokens == 0 || chunk == 0 || !(1..=2).contains(&header) {
        return Err(usage());
    }
    let (paper, felid) = (paper(chunk, header, tokens), felid(&ChunkPlan { chunk, header, tokens }));
    // a picture wider than a terminal says nothing
    if paper.rows.len() <= 100 {
        paper.draw("The paper's layout");
        felid.draw("Felid's layout, without the rows that nobody reads");
    }
    println!(
        "{:<24}  {:>9}  {:>14}  {:>16}",
        format!("N {tokens}, C {chunk}, header {header}"),
        "rows",
        "pairs",
        "FLOPs a layer"
    );
    let masks = [
        ("the paper's layout", paper.rows.len(), Mask::Cat { stride: paper.stride }),
        ("Felid's layout", felid.rows.len(), Mask::Cat { stride: felid.stride }),
        ("dense causal", tokens, Mask::Causal),
    ];
    for (title, rows, mask) in masks {
        let (pairs, flops) = cost(rows, mask)?;
        println!("{title:<24}  {rows:>9}  {pairs:>14}  {flops:>16}");
    }
    Ok(())
}
