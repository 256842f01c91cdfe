//! What backward needs of a value: its tensor, or how to compute it again.
//!
//! Some ops are cheap to run again from what their own backward keeps anyway: a norm, a gate. They say so with
//! [`compute_again`], and whoever consumes their output keeps a way to it ([`Var::save`]) instead of the tensor, which is then
//! freed as soon as forward is past it. In backward the first consumer computes it, the last one frees it. The same kernel on
//! the same inputs gives the same bits.

use super::Var;
use super::tape::saves_all;
use crate::tensor::Tensor;
use crate::{Result, profile};
use std::sync::{Arc, Mutex, MutexGuard};

type Make = dyn Fn() -> Result<Vec<Tensor>> + Send + Sync;
type Form = dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync;

/// How an op computes its outputs again, and the outputs while some of those who saved them still wait.
struct Recipe {
    make: Box<Make>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Who saved an output and has not taken it yet.
    waiting: usize,
    made: Option<Vec<Tensor>>,
}

impl Recipe {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One value by a recipe: an output, or a view of one.
#[derive(Clone)]
pub(super) struct Again {
    recipe: Arc<Recipe>,
    output: usize,
    form: Option<Arc<Form>>,
}

impl std::fmt::Debug for Again {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Again(output {})", self.output)
    }
}

/// Called by an op for outputs that it has just recorded: `make` computes all of them again, bit by bit, from tensors that
/// its backward keeps. Nothing happens where they were not recorded, or the tape saves all.
pub fn compute_again(outputs: &mut [Var], make: impl Fn() -> Result<Vec<Tensor>> + Send + Sync + 'static) {
    if saves_all() || outputs.iter().all(|v| v.id.is_none()) {
        return;
    }
    let recipe = Arc::new(Recipe { make: Box::new(make), state: Mutex::default() });
    for (output, v) in outputs.iter_mut().enumerate() {
        v.again = Some(Again { recipe: recipe.clone(), output, form: None });
    }
}

impl Var {
    /// What backward will need of this value.
    pub fn save(&self) -> Saved {
        self.save_as(self.value.clone())
    }
    /// As [`Var::save`]; where the tensor itself is kept, in the form given: the same elements as the caller likes them.
    pub fn save_as(&self, tensor: Tensor) -> Saved {
        Saved(match &self.again {
            Some(again) => Kind::Again(Ticket::new(again.clone())),
            None => Kind::Tensor(tensor),
        })
    }
    /// This value, recorded as `form` of `x`: computed again where x is.
    pub(crate) fn viewing(mut self, x: &Var, form: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static) -> Self {
        if let (Some(again), true) = (&x.again, self.id.is_some()) {
            let form: Arc<Form> = match again.form.clone() {
                Some(inner) => Arc::new(move |t: &Tensor| form(&inner(t)?)),
                None => Arc::new(form),
            };
            self.again = Some(Again { form: Some(form), ..again.clone() });
        }
        self
    }
}

/// What an op's backward keeps of one of its inputs: see [`Var::save`].
#[derive(Debug)]
pub struct Saved(Kind);

#[derive(Debug)]
enum Kind {
    Tensor(Tensor),
    Again(Ticket),
}

impl Saved {
    /// The tensor, computed if need be. It is freed with the last of those who saved it.
    pub fn take(self) -> Result<Tensor> {
        match self.0 {
            Kind::Tensor(t) => Ok(t),
            Kind::Again(ticket) => ticket.tensor(),
        }
    }
}

/// One of those who wait for a recipe's outputs.
#[derive(Debug)]
struct Ticket(Again);

impl Ticket {
    fn new(again: Again) -> Self {
        again.recipe.state().waiting += 1;
        Self(again)
    }
    fn tensor(self) -> Result<Tensor> {
        let Again { recipe, output, form } = &self.0;
        let made = recipe.state().made.clone();
        let made = match made {
            Some(made) => made,
            // not under the lock: this is work for all threads
            None => {
                let _again = profile::again();
                let made = (recipe.make)()?;
                let mut state = recipe.state();
                if state.waiting > 1 {
                    state.made = Some(made.clone());
                }
                made
            }
        };
        match form {
            Some(form) => form(&made[*output]),
            None => Ok(made[*output].clone()),
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.0.recipe.state();
        state.waiting -= 1;
        if state.waiting == 0 {
            state.made = None;
        }
    }
}
