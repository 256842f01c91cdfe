//! `felid bench`.
use clap::Args;
use felid::Result;
#[derive(Args)]
pub struct Bench {}
impl Bench {
    pub fn run(self) -> Result<()> {
        Ok(())
    }
}
