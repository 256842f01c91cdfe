//! Generation: whatever runs together gives what each request gives alone, computed from scratch at every token.

mod common;

use common::{KINDS, Kind, cast, chunk_size, config, ids, model, model_of};
use felid::autograd::no_grad;
use felid::data::Tokenizer;
use felid::generate::{Finish, Generation, Generator, GeneratorOptions, Output, Request, generate};
use felid::model::{Cat, ForwardOptions, ModelConfig};
use felid::ops::{self, Draw, Sampling};
use felid::random::{Philox, subkey, uniform_at};
use felid::tensor::{DType, Tensor};
use felid::{Error, Result};
use proptest::prelude::*;
use std::time::Duration;

fn upto(n: usize, draw: &mut Philox) -> usize {
    1 + draw.below(n as u64) as usize
}
/// One in `n`.
fn seldom(n: u64, draw: &mut Philox) -> bool {
    draw.below(n) == 0
}

/// Any request that a model can serve.
fn any_request(m: &Cat, draw: &mut Philox) -> Request {
    let c = m.config();
    let n = upto(c.block_size, draw);
    let max_new_tokens = upto(c.block_size + 1 - n, draw) - usize::from(seldom(20, draw));
    let sampling = match draw.below(3) {
        0 => Sampling::default(),
        _ => Sampling {
            temperature: 0.2 + 2.0 * draw.uniform(),
            top_k: draw.below(6) as usize,
            top_p: if seldom(2, draw) { 1.0 } else { 0.1 + 0.9 * draw.uniform() },
            min_p: if seldom(2, draw) { 0.0 } else { 0.3 * draw.uniform() },
            repetition_penalty: 1.0,
        },
    };
    let penalty = if seldom(2, draw) { 1.0 } else { 0.5 + 1.5 * draw.uniform() };
    let word = |draw: &mut Philox| {
        let bytes = (0..upto(2, draw)).map(|_| draw.below(c.vocab_size as u64) as u8).collect();
        String::from_utf8(bytes).unwrap()
    };
    let (mut changes, mut after) = (vec![], 0);
    while c.chunk_size.is_some() && seldom(2, draw) {
        after += upto(4, draw);
        changes.push((after, chunk_size(c, draw.next_u64() >> 8).unwrap()));
    }
    Request {
        prompt: ids(c, 1, n, draw.next_u64()).to_vec().unwrap(),
        max_new_tokens,
        chunk_size: chunk_size(c, draw.next_u64() >> 8).filter(|_| !seldom(4, draw)),
        chunk_changes: changes,
        sampling: Sampling { repetition_penalty: penalty, ..sampling },
        seed: draw.below(1000),
        stop_tokens: (0..draw.below(2)).map(|_| draw.below(c.vocab_size as u64) as i64).collect(),
        stop_strings: (0..draw.below(3)).map(|_| word(draw)).collect(),
        logprobs: seldom(2, draw).then(|| draw.below(4) as usize),
    }
}

/// The request served by the definition: all tokens so far through the whole model, at every token anew.
fn by_definition(m: &Cat, r: &Request, limit: usize) -> Output {
    let (mut text, mut out, mut seen) = (r.prompt.clone(), Output::default(), vec![0u64; 8]);
    let mark = |seen: &mut Vec<u64>, id: i64| seen[id as usize / 64] |= 1 << (id % 64);
    text.iter().for_each(|&id| mark(&mut seen, id));
    for n in 0..r.max_new_tokens {
        let changed = r.chunk_changes.iter().rfind(|c| c.0 <= n).map(|c| c.1);
        let options = ForwardOptions { chunk_size: changed.or(r.chunk_size), ..Default::default() };
        let ids = Tensor::ids(&text, &[1, text.len()]).unwrap();
        let logits = no_grad(|| m.logits(&ids, options)).unwrap().into_value();
        let last = logits.narrow(1, text.len() - 1, 1).unwrap().reshape(&[1, m.config().vocab_rows()]).unwrap();
        let uniform = uniform_at(subkey(r.seed, 0), n as u64);
        let id = ops::sample(&last, limit, &[Draw { how: r.sampling, uniform, seen: &seen }]).unwrap()[0];
        out.finish = (n + 1 == r.max_new_tokens).then_some(Finish::Length);
        if r.stop_tokens.contains(&id) {
            out.finish = Some(Finish::StopToken);
            break;
        }
        if let Some(top) = r.logprobs {
            out.logprobs.extend(ops::log_probs(&last, limit, &[id], top).unwrap());
        }
        text.push(id);
        mark(&mut seen, id);
        out.tokens.push(id);
        out.text.push(id as u8 as char);
        let found = r.stop_strings.iter().filter(|s| out.text.ends_with(s.as_str())).map(String::len).max();
        if let Some(found) = found {
            out.text.truncate(out.text.len() - found);
            out.finish = Some(Finish::StopString);
            break;
        }
    }
    out
}

/// Log-probabilities may differ by roundings of float64, which the model may amplify; all else must be the same.
fn assert_same(got: &Output, want: &Output, what: &str) {
    let plain = |o: &Output| Output { logprobs: vec![], ..o.clone() };
    assert_eq!(plain(got), plain(want), "{what}");
    assert_eq!(got.logprobs.len(), want.logprobs.len(), "{what}");
    for (got, want) in got.logprobs.iter().zip(&want.logprobs) {
        // logits are taken as f32
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
        assert!(near(got.logprob, want.logprob) && got.top.len() == want.top.len(), "{got:?} {want:?} {what}");
        assert!(got.top.iter().zip(&want.top).all(|(g, w)| near(g.1, w.1)), "{got:?} {want:?} {what}");
    }
}

fn serve(generation: &mut Generation, outputs: &mut Vec<Output>, turns: usize) {
    let mut left = turns;
    while left > 0
        && let Some(event) = generation.next()
    {
        let event = event.unwrap();
        let row = event.row;
        outputs.resize(outputs.len().max(row + 1), Output::default());
        assert!(outputs[row].finish.is_none(), "an event after the end");
        outputs[row].add(event);
        left -= 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Requests of every sort, together, some asked for while others run, in any order of coming and going: each gives
    /// what the whole model gives from scratch. In float64, where no two tokens are within a rounding of a tie.
    #[test]
    fn together_as_alone(i in 0..KINDS.len(), seed in 0u64..100_000, draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let m = cast(&model(KINDS[i], seed), DType::F64);
        let requests: Vec<Request> = (0..upto(6, draw)).map(|_| any_request(&m, draw)).collect();
        let max_batch = (!seldom(3, draw)).then(|| upto(requests.len(), draw));
        let generator = Generator::new(&m)
            .with_tokenizer(Tokenizer::Bytes)
            .with_options(GeneratorOptions { max_batch, ..Default::default() });
        let limit = m.config().vocab_rows();
        let want: Vec<Output> = requests.iter().map(|r| by_definition(&m, r, limit)).collect();
        let plan = generator.plan(&requests).unwrap();
        prop_assert!(plan.batch == max_batch.unwrap_or(requests.len()));

        let together = generator.run(requests.clone()).unwrap();
        for (r, (got, want)) in together.iter().zip(&want).enumerate() {
            assert_same(got, want, &format!("row {r} of {requests:?}, {:?}", m.config()));
        }
        // some later, where they fit what was taken at the start
        let mut outputs = vec![];
        let mut generation = generator.start(requests.clone()).unwrap();
        prop_assert_eq!(generation.memory(), plan);
        let mut all = want.clone();
        for _ in 0..draw.below(4) {
            serve(&mut generation, &mut outputs, upto(9, draw));
            prop_assert!(generation.running().len() <= plan.batch);
            let again = draw.below(requests.len() as u64) as usize;
            prop_assert_eq!(generation.push(requests[again].clone()).unwrap(), all.len());
            all.push(want[again].clone());
        }
        serve(&mut generation, &mut outputs, usize::MAX);
        outputs.resize(all.len(), Output::default());
        for (r, (got, want)) in outputs.iter().zip(&all).enumerate() {
            assert_same(got, want, &format!("row {r} of {requests:?}, {:?}", m.config()));
        }
    }

    /// The chunk size changed from outside, between tokens, is the change that a request can ask for; and what a cancelled
    /// row leaves does not disturb the others.
    #[test]
    fn chunk_sizes_change_while_it_runs(i in 1..KINDS.len(), seed in 0u64..100_000, draw in any::<u64>()) {
        let draw = &mut Philox::new(draw);
        let m = cast(&model(KINDS[i], seed), DType::F64);
        let c = m.config();
        let plain = |draw: &mut Philox| Request {
            chunk_changes: vec![],
            stop_strings: vec![],
            stop_tokens: vec![],
            logprobs: None,
            max_new_tokens: 12.min(c.block_size - 1),
            prompt: ids(c, 1, upto((c.block_size + 1).saturating_sub(12).max(1), draw), draw.next_u64()).to_vec().unwrap(),
            ..any_request(&m, draw)
        };
        let (mut asked, other, dropped) = (plain(draw), plain(draw), plain(draw));
        let mut generation = Generator::new(&m).start(vec![asked.clone(), other.clone(), dropped]).unwrap();
        let (mut outputs, mut n) = (vec![Output::default(); 3], 0);
        while outputs[0].finish.is_none() {
            let turn = if n == 0 { 3 } else { generation.running().len() };
            serve(&mut generation, &mut outputs, turn);
            n += 1;
            if n == 2 {
                generation.cancel(2);
            }
            if seldom(3, draw) && outputs[0].finish.is_none() {
                let to = chunk_size(c, draw.next_u64() >> 8).unwrap();
                // smaller chunks may need more than there is; then all stays as it was
                if generation.set_chunk_size(0, to).is_ok() {
                    asked.chunk_changes.push((outputs[0].tokens.len(), to));
                }
            }
        }
        serve(&mut generation, &mut outputs, usize::MAX);
        let limit = c.vocab_rows();
        let text = |o: Output| Output { text: String::new(), ..o };
        assert_same(&outputs[0], &text(by_definition(&m, &asked, limit)), &format!("{asked:?} {c:?}"));
        assert_same(&outputs[1], &text(by_definition(&m, &other, limit)), &format!("{other:?} {c:?}"));
        prop_assert!(outputs[2].finish.is_none() && outputs[2].tokens.len() <= 2);
    }
}

/// A generator and its generations cross threads, and serve several at once.
#[test]
fn threads_share_a_generator() {
    fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<Generator>();
    send_and_sync::<Generation>();
    let m = cast(&model(Kind::Hybrid, 9), DType::F64);
    let generator = Generator::new(&m);
    let mut draw = Philox::new(3);
    let mut plain = || Request { stop_strings: vec![], ..any_request(&m, &mut draw) };
    let requests: Vec<Vec<Request>> = (0..4).map(|_| (0..3).map(|_| plain()).collect()).collect();
    let want: Vec<Vec<Output>> = requests.iter().map(|r| generator.run(r.clone()).unwrap()).collect();
    std::thread::scope(|s| {
        let served: Vec<_> = requests.iter().map(|r| s.spawn(|| generator.run(r.clone()).unwrap())).collect();
        for (thread, want) in served.into_iter().zip(&want) {
            assert_eq!(&thread.join().unwrap(), want);
        }
    });
}

#[test]
fn sixteen_bits_generate() {
    for kind in KINDS {
        for dtype in [DType::BF16, DType::F16] {
            let m = cast(&model(kind, 5), dtype);
            let mut draw = Philox::new(8);
            let requests: Vec<Request> =
                (0..4).map(|_| Request { stop_strings: vec![], ..any_request(&m, &mut draw) }).collect();
            let (a, b) = (Generator::new(&m).run(requests.clone()).unwrap(), Generator::new(&m).run(requests).unwrap());
            assert_eq!(a, b, "{kind:?} {dtype}");
        }
    }
}

/// What is wrong is said before any work, with the row where there are several.
#[test]
fn bad_requests_are_refused() {
    let m = model(Kind::Adaptive, 7);
    let c = m.config().clone();
    let good = Request::new(vec![1, 2, 3], 4);
    let generator = Generator::new(&m);
    let refused = |bad: Request, what: &str| {
        for requests in [vec![bad.clone()], vec![good.clone(), bad.clone()]] {
            let several = requests.len() > 1;
            for e in [generator.check(&requests).unwrap_err(), generator.start(requests.clone()).unwrap_err()] {
                let text = e.to_string();
                assert!(text.contains(what) && !text.contains('\n'), "{text}");
                assert_eq!(text.contains("request 1"), several, "{text}");
            }
        }
    };
    refused(Request::new(vec![], 4), "prompt is empty");
    let long = Request::new(vec![1; c.block_size], 2);
    refused(long.clone(), "block_size");
    assert!(matches!(generator.run(vec![long]), Err(Error::Length { .. })));
    for n in [1 << 40, usize::MAX] {
        refused(Request::new(vec![1], n), "block_size");
    }
    refused(Request { chunk_size: Some(3), ..good.clone() }, "chunk size 3");
    refused(Request { chunk_changes: vec![(1, 3)], ..good.clone() }, "chunk size 3");
    refused(Request { chunk_changes: vec![(2, 1), (2, 2)], ..good.clone() }, "in order");
    refused(Request { chunk_changes: vec![(0, 1)], ..good.clone() }, "in order");
    refused(Request::new(vec![1, -1], 2), "-1");
    refused(Request::new(vec![1, c.vocab_rows() as i64], 2), "vocabulary");
    refused(Request { stop_tokens: vec![c.vocab_rows() as i64], ..good.clone() }, "stop token");
    refused(Request { stop_strings: vec!["a".into()], ..good.clone() }, "tokenizer");
    let how = |sampling| Request { sampling, ..good.clone() };
    let greedy = Sampling::default();
    refused(how(Sampling { top_k: 5, ..greedy }), "top-k contradicts");
    refused(how(Sampling { top_p: 0.5, ..greedy }), "top-p contradicts");
    refused(how(Sampling { min_p: 0.5, ..greedy }), "min-p contradicts");
    refused(how(Sampling { temperature: f64::NAN, ..greedy }), "temperature");
    refused(how(Sampling { temperature: 1.0, top_p: 0.0, ..greedy }), "top-p");
    refused(how(Sampling { temperature: 1.0, min_p: 1.5, ..greedy }), "min-p");
    refused(how(Sampling { repetition_penalty: 0.0, ..greedy }), "repetition penalty");
    let with_text = generator.clone().with_tokenizer(Tokenizer::Bytes);
    let empty = Request { stop_strings: vec![String::new()], ..good.clone() };
    assert!(with_text.check(&[empty]).unwrap_err().to_string().contains("empty"));
    let dense = Generator::new(&model(Kind::Dense, 1)).check(&[Request { chunk_size: Some(2), ..good.clone() }]);
    assert!(dense.unwrap_err().to_string().contains("dense"));

    // no batch, and no token to choose
    let limited = |options| Generator::new(&m).with_options(options);
    assert!(
        limited(GeneratorOptions { max_batch: Some(0), ..Default::default() }).plan(std::slice::from_ref(&good)).is_err()
    );
    assert!(limited(GeneratorOptions { vocab_limit: Some(0), ..Default::default() }).run(vec![good.clone()]).is_err());
    assert_eq!(generator.run(vec![]).unwrap(), []);
    assert_eq!(generator.run(vec![Request::new(vec![1], 0)]).unwrap(), [Output::default()]);
    let ids = Tensor::ids(&[1, 2], &[1, 2]).unwrap();
    assert!(generate(&m, &ids.reshape(&[2]).unwrap(), &good).is_err());
    assert!(generate(&m, &ids, &Request { stop_tokens: vec![1], ..good }).is_err());
}

/// Memory is known before it is taken, and a batch that does not fit says which rows would.
#[test]
fn memory_is_planned() -> Result<()> {
    let mut c = config(Kind::Adaptive, 3);
    (c.block_size, c.chunk_size) = (256, Some(8));
    let m = model_of(c, 0);
    let request = |n: usize| Request { chunk_size: Some(8), ..Request::new(vec![1; n], 16) };
    let bytes = |requests: &[Request]| Generator::new(&m).plan(requests).map(|p| p.cache_bytes);
    let (small, large) = (bytes(&[request(8)])?, bytes(&[request(200)])?);
    assert!(small < large);
    assert_eq!(bytes(&[request(8), request(200), request(8)])?, 2 * small + large);
    let limit = |cache_bytes, max_batch| {
        let options = GeneratorOptions { cache_bytes: Some(cache_bytes), max_batch, ..Default::default() };
        Generator::new(&m).with_options(options)
    };
    let all: Vec<Request> = [8, 8, 8, 200].map(request).into();
    let refused = limit(3 * small, None).plan(&all[..]).unwrap_err().to_string();
    assert!(refused.contains("request 3 alone"), "{refused}");
    let refused = limit(large + small, None).start(all.clone()).unwrap_err().to_string();
    assert!(refused.contains("requests 0 to 2 fit") && refused.contains("any 2 of all"), "{refused}");
    let tight = limit(large + small, Some(2));
    let together = tight.run(all.clone())?;
    assert_eq!(together.iter().map(|o| o.tokens.len()).collect::<Vec<_>>(), [16; 4]);
    // what came later and can never fit
    let mut generation = limit(small, None).start(vec![request(8)])?;
    assert!(generation.push(request(200)).unwrap_err().to_string().contains("no such room"));
    assert!(generation.push(Request::new(vec![], 1)).is_err());
    assert_eq!(generation.push(request(5))?, 1);
    assert_eq!(generation.by_ref().map(|e| e.unwrap().row).filter(|r| *r == 1).count(), 16);
    let stats = generation.stats();
    assert_eq!((stats.new_tokens, stats.prompt_tokens), (32, 13));
    assert!(stats.first_token > Some(Duration::ZERO) && stats.tokens_per_second() > 0.0);
    Ok(())
}

/// The first turn's tokens are not counted with the time after it, however many texts begin together.
#[test]
fn rates_are_of_the_turns_after_the_first() {
    let m = model(Kind::Dense, 2);
    let mut generation = Generator::new(&m).start(vec![Request::new(vec![1, 2], 3); 4]).unwrap();
    assert_eq!(generation.by_ref().map(Result::unwrap).count(), 12);
    let stats = generation.stats();
    assert_eq!((stats.new_tokens, stats.first_tokens), (12, 4));
    let seconds = (stats.last_token.unwrap() - stats.first_token.unwrap()).as_secs_f64();
    assert!((stats.tokens_per_second() * seconds - 8.0).abs() < 1e-9);
}

/// A request that has ended takes any chunk size, whether there would be room for it or not.
#[test]
fn what_has_ended_does_not_mind_another_chunk_size() {
    let mut c = config(Kind::Adaptive, 3);
    (c.block_size, c.chunk_size) = (64, Some(8));
    let m = model_of(c, 0);
    let request = Request { chunk_size: Some(8), ..Request::new(vec![1; 63], 2) };
    let mut generation = Generator::new(&m).start(vec![request, Request::new(vec![1], 0)]).unwrap();
    assert!(generation.next().unwrap().unwrap().finish.is_none());
    assert!(generation.set_chunk_size(0, 1).unwrap_err().to_string().contains("no such room"));
    assert_eq!(generation.by_ref().map(Result::unwrap).count(), 1);
    generation.set_chunk_size(0, 1).unwrap();
    generation.set_chunk_size(1, 1).unwrap();
    assert!(generation.set_chunk_size(0, 3).is_err() && generation.set_chunk_size(2, 8).is_err());
    assert!(generation.next().is_none());
}

/// A vocabulary may have ids that name no token: chosen, they have no text, and nobody is disturbed.
#[test]
fn ids_without_a_token_have_no_text() {
    // ids from 256 on are no bytes
    let m = model_of(ModelConfig { vocab_size: 512, padded_vocab_size: Some(512), ..config(Kind::Dense, 1) }, 0);
    let first = |id: i64| Generator::new(&m).run(vec![Request::new(vec![id], 1)]).unwrap()[0].tokens[0];
    let with = |text: bool| (0..512).find(|&id| (first(id) < 256) == text).unwrap();
    let requests = vec![Request::new(vec![with(true)], 2), Request::new(vec![with(false)], 2)];
    let options = GeneratorOptions { vocab_limit: Some(512), ..Default::default() };
    let generator = Generator::new(&m).with_tokenizer(Tokenizer::Bytes).with_options(options);
    let outputs = generator.run(requests).unwrap();
    assert!(outputs.iter().all(|o| o.tokens.len() == 2 && o.finish == Some(Finish::Length)));
    assert!(outputs[1].tokens[0] >= 256 && outputs[1].text.chars().count() <= 1);
}
