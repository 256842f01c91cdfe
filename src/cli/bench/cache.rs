//! `felid bench cache`. What an 8-bit cache saves and costs.

use crate::cli::{Compute, parse_dtype, print};
use clap::Args;
use felid::data::{Dataset, Tokenizer, VAL_FRACTION, Windows};
use felid::eval::{CacheCost, cache_cost};
use felid::model::{load, write_json};
use felid::tensor::DType;
use felid::{Error, Result};
use serde::Serialize;
use std::path::PathBuf;

#[derive(Args)]
pub struct Cache {
    /// Model folder (native or Hugging Face)
    #[arg(long)]
    model: PathBuf,
    /// Text file, .bin shard or folder of shards; its held-out part is read
    #[arg(long, default_value = "data/shakespeare.txt")]
    data: PathBuf,
    /// The part of the text that is held out, at its end
    #[arg(long, default_value_t = VAL_FRACTION)]
    val_fraction: f64,
    /// Windows of the held-out part, evenly spaced
    #[arg(long, default_value_t = 64)]
    windows: usize,
    /// Tokens of a window [default: the model's block size]
    #[arg(long)]
    seq_len: Option<usize>,
    /// Windows that are read at once
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// [default: those that the model trains with]
    #[arg(long, value_delimiter = ',')]
    chunk_sizes: Option<Vec<usize>>,
    /// Weights' dtype, and that of a plain cache [default: as stored]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    /// JSON file to write
    #[arg(long)]
    out: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Serialize)]
struct Row {
    /// C; 0 for a dense model.
    chunk_size: usize,
    #[serde(flatten)]
    cost: CacheCost,
}

impl Cache {
    pub fn run(self) -> Result<()> {
        let device = self.compute.set()?;
        let model = load(&self.model, self.dtype)?.model.to_device(device)?;
        let c = model.config();
        let tokenizer = Tokenizer::load(Some(&self.model))?;
        let data = Dataset::open(&self.data, &tokenizer, self.val_fraction)?;
        let len = self.seq_len.unwrap_or(c.block_size);
        if len > c.block_size {
            return Err(Error::Length { len, block_size: c.block_size });
        }
        if let (None, Some(sizes)) = (c.chunk_size, &self.chunk_sizes) {
            return Err(Error::Usage(format!("this model has no chunks: leave out --chunk-sizes {sizes:?}")));
        }
        let chunk_sizes = self.chunk_sizes.unwrap_or_else(|| c.training_chunk_sizes());
        let chunk_size = |size: usize| c.chunk_size.map(|_| size);
        chunk_sizes.iter().try_for_each(|&size| c.resolve_chunk_size(chunk_size(size)).map(drop))?;
        let mut rows = vec![];
        for size in chunk_sizes {
            let windows = Windows::new(&data.val, self.batch_size, len, Some(self.windows))?;
            let cost = cache_cost(&model, windows, chunk_size(size))?;
            rows.push(Row { chunk_size: size, cost });
        }
        if let Some(path) = &self.out {
            write_json(path, &rows)?;
        }
        if self.json {
            return print::json(&rows);
        }
        let unit = if matches!(tokenizer, Tokenizer::Bytes) { "byte" } else { "token" };
        print::line(&format!("nats a held-out {unit}, read token by token; bytes of a text of {len} tokens"))?;
        print::line("   C      plain       int8       cost  same choice  plain cache  int8 cache")?;
        for Row { chunk_size, cost: c } in &rows {
            print::line(&format!(
                "{chunk_size:>4}  {:>9.5}  {:>9.5}  {:>+9.5}  {:>10.2}%  {:>11}  {:>10}",
                c.plain.loss,
                c.int8.loss,
                c.int8.loss - c.plain.loss,
                100.0 * c.same_choice,
                print::bytes(c.plain_bytes),
                print::bytes(c.int8_bytes)
            ))?;
        }
        Ok(())
    }
}
