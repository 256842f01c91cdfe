//! `felid tokenize`.

use super::{interrupts, print};
use clap::Args;
use felid::data::{TokenizeOptions, Tokenizer, tokenize_files, train_bpe};
use felid::{Error, Result};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;

/// Turn text into token shards (llm.c's .bin format): train_*.bin, val_*.bin and tokenizer.json.
#[derive(Args)]
pub struct Tokenize {
    /// Text files; each is a document
    #[arg(required = true)]
    texts: Vec<PathBuf>,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// tokenizer.json or a folder with one [default: bytes]
    #[arg(long, conflicts_with = "train_bpe")]
    tokenizer: Option<PathBuf>,
    /// Train a byte-level BPE of this many tokens on the texts, and use it
    #[arg(long, value_name = "VOCAB_SIZE")]
    train_bpe: Option<usize>,
    /// Part of the text, at its end, that becomes the validation shards
    #[arg(long, default_value_t = 0.05)]
    val_fraction: f64,
    /// Tokens in a shard
    #[arg(long, default_value_t = 100_000_000)]
    shard_tokens: usize,
    /// Id put in front of each document [default: the tokenizer's <|endoftext|>, if it has one]
    #[arg(long)]
    eot: Option<i64>,
    /// Write over shards that OUT holds
    #[arg(long)]
    overwrite: bool,
    /// Print the summary as JSON
    #[arg(long)]
    json: bool,
}

impl Tokenize {
    pub fn run(self) -> Result<()> {
        let tokenizer = match self.train_bpe {
            None => Tokenizer::load(self.tokenizer.as_deref())?,
            Some(size) => {
                let read = |path: &PathBuf| {
                    std::fs::read_to_string(path).map_err(|source| Error::Io { action: "read", path: path.clone(), source })
                };
                train_bpe(&self.texts.iter().map(read).collect::<Result<Vec<_>>>()?, size)?
            }
        };
        let options = TokenizeOptions {
            val_fraction: self.val_fraction,
            shard_tokens: self.shard_tokens,
            eot: self.eot.or_else(|| tokenizer.end_of_text()),
            overwrite: self.overwrite,
            ..Default::default()
        };
        let stop = interrupts();
        let bar = indicatif::ProgressBar::new(0);
        let s = tokenize_files(&self.texts, &tokenizer, &self.out, &options, &mut |p| {
            bar.set_length(p.total);
            bar.set_position(p.bytes);
            match stop.load(Relaxed) {
                true => Err(Error::Interrupted("nothing was written".into())),
                false => Ok(()),
            }
        })?;
        bar.finish_and_clear();
        if self.json {
            return print::json(&serde_json::json!({
                "bytes": s.bytes, "documents": s.documents, "train_tokens": s.train_tokens, "val_tokens": s.val_tokens,
                "vocab_size": tokenizer.vocab_size(), "files": s.files,
            }));
        }
        print::note(&format!(
            "{} bytes in {} documents -> {} training and {} validation tokens in {}",
            s.bytes,
            s.documents,
            s.train_tokens,
            s.val_tokens,
            self.out.display()
        ));
        Ok(())
    }
}
