//! Load a model folder and stream a continuation of a prompt.
//!
//! ```sh
//! cargo run --release --example generate -- runs/nano "ROMEO:" 8    # folder, prompt, chunk size
//! ```

use felid::data::Tokenizer;
use felid::generate::{Generator, Request};
use felid::model::load;
use felid::ops::Sampling;
use felid::{Error, Result};
use std::io::Write;
use std::path::Path;

fn main() -> Result<()> {
    let usage = || Error::Usage("usage: generate MODEL_FOLDER PROMPT [CHUNK_SIZE]".into());
    let mut args = std::env::args().skip(1);
    let (Some(dir), Some(prompt)) = (args.next(), args.next()) else { return Err(usage()) };
    let chunk_size = args.next().map(|c| c.parse().map_err(|_| usage())).transpose()?;

    let dir = Path::new(&dir);
    let model = load(dir, None)?.model;
    let tokenizer = Tokenizer::load(Some(dir))?;
    let ids = tokenizer.encode(&prompt)?;
    let request = Request {
        chunk_size,
        sampling: Sampling { temperature: 0.8, ..Default::default() },
        // the last token is chosen but not read, so one more than block_size fits
        max_new_tokens: (model.config().block_size + 1).saturating_sub(ids.len()),
        prompt: ids,
        ..Default::default()
    };

    print!("{prompt}");
    // with a tokenizer a generator yields text too, and chooses only ids that the tokenizer knows
    let generator = Generator::new(&model).with_tokenizer(tokenizer);
    for event in generator.start(vec![request])? {
        print!("{}", event?.text);
        // whoever stopped reading (head, a closed terminal) has seen enough
        if std::io::stdout().flush().is_err() {
            return Ok(());
        }
    }
    println!();
    Ok(())
}
