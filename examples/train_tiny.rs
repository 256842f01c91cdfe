//! Train a tiny adaptive CAT from scratch on one sentence, then let it recite at each chunk size.
//!
//! ```sh
//! cargo run --release --example train_tiny
//! ```

use felid::Result;
use felid::autograd::Gradients;
use felid::data::{BatchSampler, Dataset, Tokenizer};
use felid::generate::{Request, generate};
use felid::model::{Cat, ForwardOptions, ModelConfig, ModelType, TransformerConfig};
use felid::ops::{self, AdamWSettings};
use felid::tensor::Tensor;
use felid::train::Optimizer;

const TEXT: &str = "Cats sleep for most of the day, hunt at dusk and at dawn, and answer to no one in between. ";

fn main() -> Result<()> {
    // chunks of 1, 2, 4 or 8 bytes; decoder 64 wide with 2 layers, compressor 32 wide with 1
    let config = ModelConfig {
        model_type: ModelType::CatAdaptive,
        chunk_size: Some(8),
        compressor: Some(TransformerConfig::new(32, 2, 1, true)),
        ..ModelConfig::dense(256, 128, TransformerConfig::new(64, 4, 2, true))
    };
    let mut model = Cat::new(config, 0)?;
    println!("{} parameters", model.numel());

    let data = Dataset::from_tokens(&Tokenizer::Bytes.encode(&TEXT.repeat(8))?, 256, 0.0)?;
    let (batch, len, steps) = (8, 96, 300);
    let mut sampler = BatchSampler::new(0, batch, len)?;
    let mut optimizer = Optimizer::new(&model)?;
    let round = model.config().training_chunk_sizes();

    for step in 0..steps {
        let batch = sampler.next(&data.train)?;
        let chunk_size = Some(round[step % round.len()]);
        // run the model on a tape, then walk the tape back
        let (tape, mut grads) = (ops::tape(), Gradients::default());
        let options = ForwardOptions { chunk_size, ..Default::default() };
        let loss = tape.record(|| model.loss(&batch.input_ids, &batch.labels, options))?;
        tape.backward(&loss, 1.0, &mut grads)?;
        let lr = 6e-3 * (1.0 - step as f64 / steps as f64);
        let settings = AdamWSettings { lr, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        optimizer.step(&mut model, &mut grads, step as u64 + 1, &settings, 1.0)?;
        if (step + 1) % 50 == 0 {
            println!("step {:>3}: {:.3} nats a byte", step + 1, loss.value().item()?);
        }
    }

    let prompt = Tokenizer::Bytes.encode(&TEXT[..16])?;
    let prompt = Tensor::ids(&prompt, &[1, prompt.len()])?;
    for chunk_size in round {
        let like = Request { max_new_tokens: 75, chunk_size: Some(chunk_size), ..Default::default() };
        let text = Tokenizer::Bytes.decode(&generate(&model, &prompt, &like)?.to_vec()?)?;
        println!("C {chunk_size}: {}|{text}", &TEXT[..16]);
    }
    Ok(())
}
