//! The command line: parsing and printing only. One file a subcommand.
//!
//! Text goes to stdout, statistics and progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.

mod bench;
mod convert;
mod doctor;
mod generate;
mod logits;
mod parity;
mod print;
mod tokenize;
mod train;

use clap::{Args, Parser, Subcommand};
use felid::tensor::{DType, Device};
use felid::{Error, Result};
use std::io::{ErrorKind, IsTerminal};
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// A tensor engine for Compress & Attend Transformers: train, generate, inspect, measure.
#[derive(Parser)]
#[command(name = "felid", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train a model; without arguments, a small adaptive CAT on data/shakespeare.txt
    Train(Box<train::Train>),
    /// Continue a prompt, chunk by chunk with the compressed cache
    Generate(Box<generate::Generate>),
    /// Logits (loss, gradients, greedy tokens) of ids in a safetensors file
    Logits(logits::Logits),
    /// Compare a model with golden numbers
    Parity(parity::Parity),
    /// Turn a model folder into the native or the Hugging Face form
    Convert(convert::Convert),
    /// Turn text into token shards, training a tokenizer if wanted
    Tokenize(tokenize::Tokenize),
    /// Measure speed, and what a smaller cache costs
    Bench(bench::Bench),
    /// What this machine offers and what is missing
    Doctor(doctor::Doctor),
}

/// Where and how to compute.
#[derive(Args, Clone, Debug)]
struct Compute {
    /// Device to run on: cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Matrix products on CUDA: auto (cuBLASLt where it is there) or native (Felid's own kernel)
    #[cfg(feature = "cuda")]
    #[arg(long, default_value = "auto", value_name = "auto|native")]
    gemm: String,
    /// Let cuBLASLt round f32 operands to TF32
    #[cfg(feature = "cuda")]
    #[arg(long)]
    tf32: bool,
    /// CPU threads [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
}

impl Compute {
    /// Apply these settings to the process.
    fn set(&self) -> Result<Device> {
        let device: Device = self.device.parse()?;
        #[cfg(feature = "cuda")]
        {
            felid::cuda::set_gemm(self.gemm.parse()?);
            felid::cuda::set_tf32(self.tf32);
        }
        if let Some(n) = self.threads {
            if n == 0 || n > 4096 {
                return Err(Error::Usage(format!("--threads {n}: use 1..=4096")));
            }
            // fails only when the pool exists already, which no command makes before this
            let _ = rayon::ThreadPoolBuilder::new().num_threads(n).build_global();
        }
        device.check()?;
        Ok(device)
    }
}

fn parse_dtype(s: &str) -> std::result::Result<DType, String> {
    match s.parse() {
        Ok(d @ (DType::F32 | DType::BF16 | DType::F16)) => Ok(d),
        _ => Err("use f32, bf16 or f16".into()),
    }
}

/// Set by Ctrl-C, for a command that stops at a place of its own choosing. A second Ctrl-C ends the process at once.
fn interrupts() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = move || {
        if flag.swap(true, Relaxed) {
            std::process::exit(130);
        }
    };
    // a second handler cannot be installed; then Ctrl-C ends the process as it would have
    if ctrlc::set_handler(handler).is_err() {
        tracing::warn!("no Ctrl-C handler: an interrupt ends the command at once");
    }
    stop
}

pub fn main() -> ExitCode {
    let color = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && std::io::stderr().is_terminal();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(color).init();
    let command = match Cli::try_parse() {
        Ok(cli) => cli.command,
        Err(e) => return wrong_usage(&e),
    };
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|_| {}));
    }
    match std::panic::catch_unwind(AssertUnwindSafe(|| run(command))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        // whoever read our output has seen enough
        Ok(Err(Error::Io { source, .. })) if source.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Ok(Err(e)) => {
            print::note(&format!("felid: {}", print::one_line(&e.to_string())));
            ExitCode::from(e.exit_code())
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let text = print::one_line(text.unwrap_or("no message"));
            print::note(&format!("felid: a defect of this program, please report it (RUST_BACKTRACE=1 says where): {text}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Train(c) => c.run(),
        Command::Generate(c) => c.run(),
        Command::Logits(c) => c.run(),
        Command::Parity(c) => c.run(),
        Command::Convert(c) => c.run(),
        Command::Tokenize(c) => c.run(),
        Command::Bench(c) => c.run(),
        Command::Doctor(c) => c.run(),
    }
}

/// Help and version go to stdout whole; a mistake becomes one line on stderr.
fn wrong_usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() || e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = e.print();
        return ExitCode::from(e.exit_code() as u8);
    }
    let text = e.to_string();
    let lines =
        text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more information"));
    let line = lines.filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ");
    print::note(&format!("felid: {} (--help says more)", print::one_line(line.trim_start_matches("error: "))));
    ExitCode::from(2)
}
