//! What memory is held for. Device memory is counted by category, so that running out can name who holds it.

use std::cell::Cell;

/// What an allocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Category {
    /// Parameters.
    Weights,
    /// Moments and f32 masters.
    Optimizer,
    /// Gradients, and what backward needs for a moment.
    Gradients,
    /// Outputs of ops, and what backward will need of them.
    Activations,
    /// Keys and values of generation.
    Cache,
    /// Workspaces of libraries and everything else.
    Other,
}

impl Category {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Weights, Self::Optimizer, Self::Gradients, Self::Activations, Self::Cache, Self::Other];

    /// As messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Optimizer => "optimizer",
            Self::Gradients => "gradients",
            Self::Activations => "activations",
            Self::Cache => "cache",
            Self::Other => "other",
        }
    }
}

thread_local! {
    static CURRENT: Cell<Category> = const { Cell::new(Category::Activations) };
}

/// Run `f`; what it allocates on this thread counts as `category`, save inside another `counted_as`.
pub fn counted_as<R>(category: Category, f: impl FnOnce() -> R) -> R {
    struct Restore(Category);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let _restore = Restore(CURRENT.replace(category));
    f()
}

/// What an allocation on this thread counts as now.
#[cfg(feature = "cuda")]
pub(crate) fn category() -> Category {
    CURRENT.get()
}
