//! Generation on a CUDA device: runs of captured steps give what single steps give. Skipped, with a word, where there is no
//! device.
#![cfg(feature = "cuda")]

mod common;
#[path = "common/devices.rs"]
mod devices;

use common::{KINDS, cast, chunk_size, ids, model};
use felid::data::Tokenizer;
use felid::generate::{CacheFormat, Decoding, Generation, Generator, GeneratorOptions, Output, Request};
use felid::model::Cat;
use felid::ops::Sampling;
use felid::random::Philox;
use felid::tensor::DType;

fn upto(n: usize, draw: &mut Philox) -> usize {
    1 + draw.below(n as u64) as usize
}

/// A request of any length and sampling, seldom one that runs cannot serve.
fn any_request(m: &Cat, draw: &mut Philox) -> Request {
    let c = m.config();
    let n = upto(c.block_size / 2, draw);
    let max_new_tokens = upto(c.block_size + 1 - n, draw);
    let sampling = match draw.below(3) {
        0 => Sampling::default(),
        1 => Sampling { temperature: 0.5 + draw.uniform(), ..Default::default() },
        _ => Sampling { temperature: 1.0, top_k: upto(6, draw), top_p: 0.3 + 0.7 * draw.uniform(), ..Default::default() },
    };
    let penalty = if draw.below(8) == 0 { 1.5 } else { 1.0 };
    let mut changes = vec![];
    if c.chunk_size.is_some() && draw.below(3) == 0 {
        changes.push((upto(20, draw), chunk_size(c, draw.next_u64() >> 8).unwrap()));
    }
    Request {
        prompt: ids(c, 1, n, draw.next_u64()).to_vec().unwrap(),
        max_new_tokens,
        chunk_size: chunk_size(c, draw.next_u64() >> 8),
        chunk_changes: changes,
        sampling: Sampling { repetition_penalty: penalty, ..sampling },
        seed: draw.below(1000),
        stop_tokens: (0..draw.below(2)).map(|_| draw.below(c.vocab_size as u64) as i64).collect(),
        stop_strings: (0..draw.below(2)).map(|_| String::from(draw.below(c.vocab_size as u64) as u8 as char)).collect(),
        logprobs: (draw.below(8) == 0).then_some(1),
    }
}

fn serve(generation: &mut Generation, outputs: &mut Vec<Output>, events: usize) {
    for event in generation.by_ref().take(events) {
        let event = event.unwrap();
        outputs.resize(outputs.len().max(event.row + 1), Output::default());
        assert!(outputs[event.row].finish.is_none(), "an event after the end");
        outputs[event.row].add(event);
    }
}

/// Requests of every sort, together or one after another, cancelled, asked for late, and with chunk sizes that change when a
/// run is under way: the tokens are those of single steps. Products of another number of rows may round otherwise, so the
/// same rows run beside each other in all.
#[test]
fn runs_give_the_tokens_of_single_steps() {
    let Some(cuda) = devices::cuda() else { return };
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(40u64);
    for (i, kind) in KINDS.into_iter().enumerate() {
        for case in 0..cases {
            let draw = &mut Philox::new(100 * i as u64 + case);
            let m = model(kind, case).to_device(cuda).unwrap();
            let m = if case % 4 == 3 { cast(&m, DType::BF16) } else { m };
            let alone = case % 2 == 0;
            let cache = if case % 3 == 2 { CacheFormat::Int8 } else { CacheFormat::Plain };
            let requests: Vec<Request> = (0..upto(3, draw)).map(|_| any_request(&m, draw)).collect();
            let requests = if alone { requests[..1].to_vec() } else { requests };
            check_decodings(&m, cache, &requests, &format!("{kind:?} {case}"));
        }
    }
}

/// Texts as long as one another fill their chunks in the same steps, which the device takes without a word from main memory: as
/// long as none leaves, as some do early, and past several runs.
#[test]
fn texts_in_step_fill_chunks_together() {
    let Some(cuda) = devices::cuda() else { return };
    for (i, kind) in KINDS.into_iter().enumerate() {
        for case in 0..12 {
            let draw = &mut Philox::new(5000 + 100 * i as u64 + case);
            let m = model(kind, case).to_device(cuda).unwrap();
            // where one leaves, products of 16 bits with fewer rows may round otherwise
            let early = case % 2 == 0;
            let m = if early { m } else { cast(&m, DType::BF16) };
            let cache = if case % 3 == 2 { CacheFormat::Int8 } else { CacheFormat::Plain };
            let (c, chunk) = (m.config(), chunk_size(m.config(), draw.next_u64() >> 8));
            let n = upto(c.block_size / 3, draw);
            let request = |early: bool, draw: &mut Philox| Request {
                chunk_size: chunk,
                stop_tokens: if early { (0..c.vocab_size as i64 / 8).collect() } else { vec![] },
                sampling: Sampling { temperature: 1.0, ..Default::default() },
                seed: draw.below(1000),
                ..Request::new(ids(c, 1, n, draw.next_u64()).to_vec().unwrap(), c.block_size + 1 - n)
            };
            let requests: Vec<Request> = (0..1 + upto(6, draw)).map(|j| request(early && j % 3 == 2, draw)).collect();
            check_decodings(&m, cache, &requests, &format!("{kind:?} {case}"));
        }
    }
}

fn generator(m: &Cat, decoding: Decoding, cache: CacheFormat) -> Generator {
    let options = GeneratorOptions { decoding, cache, ..Default::default() };
    Generator::new(m).with_tokenizer(Tokenizer::Bytes).with_options(options)
}

fn outputs(m: &Cat, decoding: Decoding, cache: CacheFormat, requests: &[Request]) -> Vec<Output> {
    generator(m, decoding, cache).run(requests.to_vec()).unwrap()
}

/// Runs, captured or not, give what single steps give.
fn check_decodings(m: &Cat, cache: CacheFormat, requests: &[Request], case: &str) {
    let want = outputs(m, Decoding::Single, cache, requests);
    for decoding in [Decoding::Runs, Decoding::Graphs] {
        assert_eq!(outputs(m, decoding, cache, requests), want, "{case} {decoding:?} {requests:?}");
    }
}

/// What is done while a run is under way counts from the next token on.
#[test]
fn runs_give_way() {
    let Some(cuda) = devices::cuda() else { return };
    for (i, kind) in KINDS.into_iter().enumerate() {
        for case in 0..6 {
            let draw = &mut Philox::new(1000 + 100 * i as u64 + case);
            let m = model(kind, case).to_device(cuda).unwrap();
            let c = m.config();
            let request = |n: usize, draw: &mut Philox| Request {
                chunk_size: chunk_size(c, draw.next_u64() >> 8),
                sampling: Sampling { temperature: 1.0, ..Default::default() },
                ..Request::new(ids(c, 1, n, draw.next_u64()).to_vec().unwrap(), c.block_size + 1 - n)
            };
            let (first, second) = (request(3, draw), request(5, draw));
            let (after, chunk) = (upto(c.block_size - 6, draw), chunk_size(c, draw.next_u64() >> 8));
            let served = |decoding| {
                let mut generation = generator(&m, decoding, CacheFormat::Plain).start(vec![first.clone()]).unwrap();
                let mut outputs = vec![Output::default(); 2];
                serve(&mut generation, &mut outputs, after);
                if let Some(chunk) = chunk {
                    // refused, where the cache has no room, by all alike
                    let _ = generation.set_chunk_size(0, chunk);
                }
                serve(&mut generation, &mut outputs, 1);
                if case % 2 == 1 {
                    generation.cancel(0);
                    let _ = generation.push(second.clone());
                }
                serve(&mut generation, &mut outputs, usize::MAX);
                outputs
            };
            let want = served(Decoding::Single);
            for decoding in [Decoding::Runs, Decoding::Graphs] {
                assert_eq!(served(decoding), want, "{kind:?} {case} {decoding:?}");
            }
        }
    }
}
