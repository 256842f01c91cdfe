//! The one error type. Every variant names what was attempted (the op, the shapes, the path) and says what to do.

use std::path::{Path, PathBuf};

/// Everything that can go wrong in Felid. No public function panics on bad input: it returns one of these.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes, strides or sizes that an op cannot take.
    #[error("{op}: {detail}")]
    Shape {
        /// The op.
        op: &'static str,
        /// The shapes, and what would fit.
        detail: String,
    },
    /// A dtype that an op cannot take.
    #[error("{op}: {detail}")]
    DType {
        /// The op.
        op: &'static str,
        /// The dtypes, and what would fit.
        detail: String,
    },
    /// An id or index outside its table.
    #[error("{op}: {detail}")]
    Index {
        /// The op.
        op: &'static str,
        /// The index, where it is, and the size of the table.
        detail: String,
    },
    /// An op without a backward was differentiated through, or backward was called on something not recorded.
    #[error("{op}: {detail}")]
    Gradient {
        /// The op.
        op: &'static str,
        /// What is wrong with the gradient.
        detail: String,
    },
    /// A chunk size that the model does not allow.
    #[error("chunk size {asked} is not allowed by this model: use {allowed}")]
    ChunkSize {
        /// The size that was asked for.
        asked: usize,
        /// Those that may be, in words.
        allowed: String,
    },
    /// More tokens than the model has positions for.
    #[error("{len} tokens do not fit this model's block_size of {block_size}: shorten the input or the continuation")]
    Length {
        /// Tokens, those yet to be generated included.
        len: usize,
        /// The most that the model takes.
        block_size: usize,
    },
    /// Something that must not be empty is.
    #[error("{what} is empty: {fix}")]
    Empty {
        /// What is empty.
        what: String,
        /// What to do about it.
        fix: String,
    },
    /// A configuration that contradicts itself or the weights.
    #[error("config: {0}")]
    Config(String),
    /// Weights that do not fit the configuration; all offending names at once.
    #[error("{}: weights do not fit the config: {detail}", path.display())]
    Weights {
        /// Where the weights came from.
        path: PathBuf,
        /// The names, and what is wrong with each.
        detail: String,
    },
    /// A file that is not what it should be: truncated, corrupt or hostile.
    #[error("{}: {detail}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        detail: String,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted, such as `read`.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A shared library that is not there.
    #[error("{name} is missing: {fix}; tried {tried}")]
    Library {
        /// Its name.
        name: &'static str,
        /// Files and folders that were tried.
        tried: String,
        /// What to do.
        fix: &'static str,
    },
    /// A kernel that does not compile, load or launch.
    #[error("kernel {kernel}: {detail}")]
    Kernel {
        /// The file or the entry point.
        kernel: String,
        /// What the compiler or the driver said.
        detail: String,
    },
    /// No memory left on a device. What failed has changed no tensor, and the process can go on.
    #[error("device {device}: out of memory: {detail}: use a smaller batch, shorter rows, or recompute")]
    OutOfMemory {
        /// The device.
        device: String,
        /// The request, and what is held by what.
        detail: String,
    },
    /// A device that is not there, or a library that it needs.
    #[error("device {device}: {detail}")]
    Device {
        /// The device as it was asked for.
        device: String,
        /// What is missing, and what to do.
        detail: String,
    },
    /// One of several requests that cannot be served.
    #[error("request {row}: {source}")]
    Request {
        /// Its number, from 0.
        row: usize,
        /// What is wrong with it.
        source: Box<Error>,
    },
    /// Flags or arguments that do not fit together. The command exits with 2.
    #[error("{0}")]
    Usage(String),
    /// Ctrl-C. The command exits with 130.
    #[error("interrupted: {0}")]
    Interrupted(String),
}

/// `std::result::Result` with Felid's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn shape(op: &'static str, detail: impl Into<String>) -> Self {
        Self::Shape { op, detail: detail.into() }
    }
    pub(crate) fn dtype(op: &'static str, detail: impl Into<String>) -> Self {
        Self::DType { op, detail: detail.into() }
    }
    pub(crate) fn index(op: &'static str, detail: impl Into<String>) -> Self {
        Self::Index { op, detail: detail.into() }
    }
    pub(crate) fn gradient(op: &'static str, detail: impl Into<String>) -> Self {
        Self::Gradient { op, detail: detail.into() }
    }
    pub(crate) fn config(detail: impl Into<String>) -> Self {
        Self::Config(detail.into())
    }
    pub(crate) fn empty(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Empty { what: what.into(), fix: fix.into() }
    }
    pub(crate) fn format(path: impl AsRef<Path>, detail: impl Into<String>) -> Self {
        Self::Format { path: path.as_ref().into(), detail: detail.into() }
    }
    pub(crate) fn weights(path: impl AsRef<Path>, detail: impl Into<String>) -> Self {
        Self::Weights { path: path.as_ref().into(), detail: detail.into() }
    }
    /// For `map_err`: `fs::read(p).map_err(Error::io("read", p))`.
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { action, path, source }
    }

    /// The exit code of a command that ends with this error: 2 for usage, 130 for Ctrl-C, 1 otherwise.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Request { source, .. } => source.exit_code(),
            Self::Interrupted(_) => 130,
            _ => 1,
        }
    }
}
