//! `felid convert`.

use super::{parse_dtype, print};
use clap::{Args, ValueEnum};
use felid::model::formats::write_atomically;
use felid::model::{FolderFormat, load, save};
use felid::tensor::DType;
use felid::{Error, Result};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, ValueEnum)]
enum To {
    Native,
    Hf,
}

/// Turn a model folder into another form.
#[derive(Args)]
pub struct Convert {
    /// Model folder: native, Hugging Face, or with a state_dict.pt
    input: PathBuf,
    /// Folder to write
    out: PathBuf,
    #[arg(long)]
    to: To,
    /// Weights' dtype [default: as stored]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    /// Write over a model that OUT holds
    #[arg(long)]
    overwrite: bool,
}

/// Files that travel with a model unchanged.
const COMPANIONS: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"];

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

impl Convert {
    pub fn run(self) -> Result<()> {
        if self.out.join("config.json").exists() && !self.overwrite {
            return Err(Error::Usage(format!(
                "{} holds a model: choose another folder or add --overwrite",
                self.out.display()
            )));
        }
        let from = load(&self.input, self.dtype)?;
        let format = match self.to {
            To::Native => FolderFormat::Native,
            To::Hf => FolderFormat::HuggingFace,
        };
        save(&self.out, &from.model, format, from.chunk_step)?;
        for name in COMPANIONS {
            let (source, target) = (self.input.join(name), self.out.join(name));
            let real = |p: &Path| std::fs::canonicalize(p).ok();
            match real(&source) {
                // copied onto itself, a file would end up empty
                Some(s) if Some(&s) == real(&target).as_ref() => {}
                Some(s) => {
                    let bytes = std::fs::read(&s).map_err(io("read", &source))?;
                    write_atomically(&target, |w| w.write_all(&bytes).map_err(io("write", &target)))?;
                }
                // what an overwritten model left does not belong to this one
                None if target.exists() => std::fs::remove_file(&target).map_err(io("remove", &target))?,
                None => {}
            }
        }
        print::note(&format!("{} parameters written to {}", from.model.numel(), self.out.display()));
        Ok(())
    }
}
