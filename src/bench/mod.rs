//! Speed, measured as `docs/performance.md` says: medians with their spread, and what they are to be compared with.
