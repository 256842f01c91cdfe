//! Models: what they are made of and the files they live in.

pub mod formats;
